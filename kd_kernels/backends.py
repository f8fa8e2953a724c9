"""Which backend serves which op, and why one cannot serve a call.

``backend=None`` takes the first of :data:`ORDER` without an objection. A backend named by the caller
serves the call or raises with its reasons: nothing falls back silently.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Optional

import torch

from kd_kernels import native, native_cuda, triton_runtime, triton_transport
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


def _cpu_objections(device: torch.device) -> list[str]:
    reasons = []
    if device.type != "cpu":
        reasons.append(f"serves CPU tensors, got {device}")
    if (missing := native.why_not()) is not None:
        reasons.append(missing)
    return reasons


def _not_built(device: torch.device) -> list[str]:
    return ["not part of this release"]


# op -> backend -> (kernel, objections); in the order in which they are tried.
TABLE: dict[str, dict[str, tuple[Optional[RowKernel], Callable[[torch.device], list[str]]]]] = {
    "row_divergence": {
        "cpu": (native.row_divergence, _cpu_objections),
        "triton": (triton_runtime.row_divergence, triton_runtime.why_not),
        "cuda": (native_cuda.row_divergence, native_cuda.why_not),
        "reference": (reference_row_divergence, lambda device: []),
    },
    "gather": {
        "cpu": (native.gather, _cpu_objections),
        "triton": (triton_runtime.gather, triton_runtime.why_not),
        "cuda": (None, _not_built),
        "reference": (reference_gather, lambda device: []),
    },
    "sorted_l1": {
        "cpu": (native.sorted_l1, _cpu_objections),
        # torch.sort is the well-kept sort of a GPU.
        "triton": (reference_sorted_l1, triton_runtime.why_not),
        "cuda": (None, _not_built),
        "reference": (reference_sorted_l1, lambda device: []),
    },
    "topk": {
        "cpu": (native.topk, _cpu_objections),
        "triton": (triton_runtime.topk, triton_runtime.why_not),
        "cuda": (None, _not_built),
        "reference": (reference_topk, lambda device: []),
    },
    "angle": {
        "cpu": (native.angle, _cpu_objections),
        "triton": (triton_runtime.angle, triton_runtime.why_not),
        "cuda": (None, _not_built),
        "reference": (reference_angle, lambda device: []),
    },
    "distance": {
        "cpu": (native.distance, _cpu_objections),
        "triton": (triton_runtime.distance, triton_runtime.why_not),
        "cuda": (None, _not_built),
        "reference": (reference_distance, lambda device: []),
    },
    "pairwise_l1": {
        "cpu": (native.pairwise_l1, _cpu_objections),
        "triton": (triton_transport.pairwise_l1, triton_runtime.why_not),
        "cuda": (None, _not_built),
        "reference": (reference_pairwise_l1, lambda device: []),
    },
    "gibbs": {
        "cpu": (native.gibbs, _cpu_objections),
        # Once a call and entry by entry: torch's own.
        "triton": (reference_gibbs, triton_runtime.why_not),
        "cuda": (None, _not_built),
        "reference": (reference_gibbs, lambda device: []),
    },
    "half_step": {
        "cpu": (native.half_step, _cpu_objections),
        "triton": (triton_transport.half_step, triton_runtime.why_not),
        "cuda": (None, _not_built),
        "reference": (reference_half_step, lambda device: []),
    },
    "sinkhorn": {
        "cpu": (native.sinkhorn, _cpu_objections),
        "triton": (triton_transport.sinkhorn, triton_runtime.why_not),
        "cuda": (None, _not_built),
        "reference": (reference_sinkhorn, lambda device: []),
    },
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


def pick(op: str, device: torch.device, backend: Optional[str]) -> tuple[str, RowKernel]:
    """(name, kernel) of the backend that serves ``op`` on ``device``.

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
        reasons = objections(device)
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
