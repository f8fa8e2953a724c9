"""Which backend serves which op, and why one cannot serve a call.

``backend=None`` takes the first of :data:`TABLE` without an objection. A backend named by the caller
serves the call or raises with its reasons: nothing falls back silently.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Optional

import torch

from kd_kernels import native, native_cuda, triton_runtime, triton_topk, triton_transport
from kd_kernels.reference.angle import angle as reference_angle
from kd_kernels.reference.distance import distance as reference_distance
from kd_kernels.reference.gather import gather as reference_gather
from kd_kernels.reference.gibbs import gibbs as reference_gibbs
from kd_kernels.reference.half_step import half_step as reference_half_step
from kd_kernels.reference.pairwise_l1 import pairwise_l1 as reference_pairwise_l1
from kd_kernels.reference.row_divergence import row_divergence as reference_row_divergence
from kd_kernels.reference.sinkhorn import sinkhorn as reference_sinkhorn
from kd_kernels.reference.sorted_l1 import sorted_l1 as reference_sorted_l1
from kd_kernels.reference.topk import topk as reference_topk

RowKernel = Callable[..., None]  # (job, phases), or (job) where there is one phase


class BackendUnavailable(RuntimeError):
    """A backend was named that cannot serve the call, or none can; the message holds the reasons."""


# Why a backend cannot serve a device, and, where its kernel has a limit, a call of this size.
Objections = Callable[..., list[str]]
Offer = tuple[Optional[RowKernel], Objections]


def _cpu_objections(device: torch.device, **size: int) -> list[str]:
    reasons = []
    if device.type != "cpu":
        reasons.append(f"serves CPU tensors, got {device}")
    if (missing := native.why_not()) is not None:
        reasons.append(missing)
    return reasons


def _not_built(device: torch.device, **size: int) -> list[str]:
    return ["not part of this release"]


def _none(device: torch.device, **size: int) -> list[str]:
    return []


def _offers(
    cpu: RowKernel,
    triton: RowKernel,
    reference: RowKernel,
    cuda: Optional[RowKernel] = None,
    triton_objections: Objections = triton_runtime.why_not,
) -> dict[str, Offer]:
    """By backend, in the order in which they are tried."""
    return {
        "cpu": (cpu, _cpu_objections),
        "triton": (triton, triton_objections),
        "cuda": (cuda, native_cuda.why_not if cuda is not None else _not_built),
        "reference": (reference, _none),
    }


TABLE: dict[str, dict[str, Offer]] = {
    "row_divergence": _offers(
        native.row_divergence,
        triton_runtime.row_divergence,
        reference_row_divergence,
        native_cuda.row_divergence,
    ),
    "gather": _offers(native.gather, triton_runtime.gather, reference_gather),
    # torch.sort is the well-kept sort of a GPU.
    "sorted_l1": _offers(native.sorted_l1, reference_sorted_l1, reference_sorted_l1),
    "topk": _offers(native.topk, triton_topk.topk, reference_topk, triton_objections=triton_topk.why_not),
    "angle": _offers(native.angle, triton_runtime.angle, reference_angle),
    "distance": _offers(native.distance, triton_runtime.distance, reference_distance),
    "pairwise_l1": _offers(native.pairwise_l1, triton_transport.pairwise_l1, reference_pairwise_l1),
    # Once a call and entry by entry: torch's own on a GPU.
    "gibbs": _offers(native.gibbs, reference_gibbs, reference_gibbs),
    "half_step": _offers(native.half_step, triton_transport.half_step, reference_half_step),
    "sinkhorn": _offers(native.sinkhorn, triton_transport.sinkhorn, reference_sinkhorn),
}

# Backends that take the vocabulary-major layout too; the others read rows along the vocabulary.
VOCABULARY_MAJOR = frozenset({"cpu", "reference"})
# Backends whose gather overwrites the logits at the ids: a driver gives it memory of its own.
OVERWRITES = frozenset({"triton"})
# Backends whose pairwise_l1 takes memory of its own that its driver must count: how many bytes.
PAIRWISE_L1_SCRATCH = {"triton": triton_transport.pairwise_l1_scratch}


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _warn_slow(refused: list[str]) -> None:
    _warn_once(
        f"kd_kernels runs on its plain-torch reference, which is slow, because: {refused[0]}. "
        f'backend="reference" silences this.'
    )


def pick(op: str, device: torch.device, backend: Optional[str], **size: int) -> tuple[str, RowKernel]:
    """(name, kernel) of the backend that serves ``op`` on ``device``, for a call of ``size``.

    Raises:
        ValueError: ``backend`` is not a backend's name.
        BackendUnavailable: the named backend cannot serve the call.
    """
    offers = TABLE[op]
    if backend is not None and backend not in offers:
        raise ValueError(f"backend must be one of {', '.join(offers)} or None, got {backend!r}")
    refused = []
    for name in [backend] if backend else offers:
        kernel, objections = offers[name]
        reasons = objections(device, **size)
        if backend is None and name == "triton" and device.type == "cpu":
            reasons = reasons or ["interpreted only when named"]
        if backend is None and name == "cuda":
            reasons = reasons or [native_cuda.STANDING]
        if not reasons and kernel is not None:
            if name == "reference" and backend is None and device.type == "cpu":
                _warn_slow(refused)
            return name, kernel
        refused.append(f"{name}: {'; '.join(reasons)}")
    raise BackendUnavailable(f"{op} on {device}: " + " | ".join(refused))
