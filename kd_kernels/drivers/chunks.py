"""How many tokens a walk takes at a time: what its workspace holds."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Optional, Protocol

import torch

from kd_kernels.drivers.workspace import footprint

CPU_WORKSPACE = 256 << 20
# On a GPU a share of its memory, within these bounds.
GPU_SHARE, GPU_LEAST, GPU_MOST = 32, 256 << 20, 4 << 30
# Chunk widths are multiples of this where the budget allows: the row kernel's vector strip on CPU, a tile of
# the GEMM on a GPU.
_GRANULE = {"cpu": 32, "cuda": 128}


class Side(Protocol):
    """One model's end of a walk."""

    def buffer_itemsizes(self, later: bool = False) -> list[int]:
        """Of the tensors ``[tokens, vocab]`` that a chunk takes from the workspace, in this walk or in the
        one to come (:attr:`Model.later`)."""
        ...


def cut(
    sides: Sequence[Side],
    n: int,
    vocab: int,
    device: torch.device,
    workspace_bytes: Optional[int],
    vocabulary_major: bool = False,
    beside: int = 0,
) -> tuple[int, int]:
    """(tokens per chunk, bytes of workspace that they take) of a walk over n tokens; ``beside`` is what a
    kernel takes for itself meanwhile, in bytes per token and vocabulary entry."""
    itemsizes, later = ([size for side in sides for size in side.buffer_itemsizes(x)] for x in (False, True))

    def room(tokens: int, sizes: Sequence[int] = itemsizes) -> int:
        shape = (vocab, tokens) if vocabulary_major else (tokens, vocab)
        return sum(footprint(*shape, size) for size in sizes)

    budget = default_workspace(device) if workspace_bytes is None else workspace_bytes
    counted = [*itemsizes, beside] if beside else itemsizes
    rows = chunk_rows(
        n,
        vocab,
        counted,
        budget,
        lambda tokens: room(tokens) + beside * vocab * tokens,
        _GRANULE.get(device.type, 1),
        least=room(1, later) + beside * vocab,
    )
    return rows, room(rows)


def default_workspace(device: torch.device) -> int:
    """Bytes of scratch memory where the caller names none."""
    if device.type != "cuda":
        return CPU_WORKSPACE
    if not torch.cuda.is_available():  # a plan for a machine that is not here
        return GPU_LEAST
    share = torch.cuda.get_device_properties(device).total_memory // GPU_SHARE
    return min(max(share, GPU_LEAST), GPU_MOST)


def chunk_rows(
    n: int,
    vocab: int,
    itemsizes: list[int],
    budget: int,
    room: Callable[[int], int],
    granule: int,
    least: int = 0,
) -> int:
    """Tokens per chunk; ``room(c)`` is what a chunk of c tokens takes in the workspace, in bytes. ``least``:
    what a walk to come takes for one, so that no backward pass is refused after its forward.

    Every chunk reads and writes all of d weight once (8 V D bytes in float32) and computes
    2 C V D FLOPs into it, so the traffic per FLOP falls as 4/C: at C = 256 it costs tens of percent of
    a step on CPU, at C = 1024 it disappears. A GPU that computes 170 FLOPs in the time of a byte
    (740 TFLOP/s, 4.3 TB/s) pays for it with 690/C of that product's time: two thirds at C = 1024, a fifth
    at the 3300 rows that 4 GiB hold of a vocabulary of 128256. Hence as many rows as the budget holds,
    and all chunks of the same size.
    """
    if not itemsizes or n == 0:
        return max(1, n)
    # Fewer than the numbers alone would leave room for: rows are filled up to whole cache lines.
    most = bisect.bisect_right(range(budget // (vocab * sum(itemsizes)) + 1), budget, key=room) - 1
    if most < 1 or budget < least:
        raise ValueError(
            f"workspace_bytes={budget} holds less than one row of {vocab} logits; "
            f"at least {max(room(1), least)} bytes are needed"
        )
    chunks = -(-n // most)
    even = -(-n // chunks)
    padded = -(-even // granule) * granule
    return min(padded, most, n)
