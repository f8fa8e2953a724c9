"""The CUDA kernels on a GPU: options, shapings, rows that no cluster holds. ``pytest -m gpu``."""

import functools

import pytest
import torch
from cases import OBJECTIVES, OPTIONS, SHAPING, SOURCES, Batch
from gpu import wants_cuda_kernels, wants_gpu
from plain import compare

import kd_kernels as kd

pytestmark = [*wants_gpu, wants_cuda_kernels]
DEVICE = "cuda"
IDS = {"ids": lambda x: x.name if isinstance(x, kd.Objective) else str(x).replace("torch.", "")}
SMALL = {"workspace_bytes": 8 << 10}  # three chunks and more of 15 tokens of two heads
MOST = 463_104  # float32 entries of two rows that a cluster of 16 blocks holds on sm_90


def models(batch: Batch, kinds: tuple[str, str], dtype: torch.dtype, **shaping):
    return [batch.source(side, kind, dtype, **shaping) for side, kind in zip(("student", "teacher"), kinds)]


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(objective, option):
    batch = Batch(seed=1)
    for kinds in SOURCES:
        student, teacher = models(batch, kinds, torch.float32)
        compare(batch, student, teacher, objective, "cuda", DEVICE, **SMALL, **OPTIONS[option](batch))


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("shaping", SHAPING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], **IDS)
def test_bias_scale_softcap(objective, shaping, dtype):
    batch = Batch(seed=2)
    for kinds in SOURCES:
        student, teacher = models(batch, kinds, dtype, **SHAPING[shaping])
        compare(batch, student, teacher, objective, "cuda", DEVICE, **SMALL, **OPTIONS["everything"](batch))


# Total variation's gradient jumps where p and q meet: among so many entries some do, up to rounding.
SMOOTH = [x for x in OBJECTIVES if x.name != "total_variation"]


@functools.cache
def wide(vocab: int) -> Batch:
    """On the GPU, where float64 takes less long."""
    batch = Batch(lead=(4,), vocab=vocab, student_width=8, teacher_width=8, seed=3)
    batch.tensors = {name: x.to(DEVICE) for name, x in batch.tensors.items()}
    for name in ("labels", "mask", "weight", "temperature", "upstream"):
        setattr(batch, name, getattr(batch, name).to(DEVICE))
    return batch


@pytest.mark.parametrize("objective", SMOOTH, **IDS)
@pytest.mark.parametrize("beyond", [0, 1, 8])  # held, and read again at odd addresses and at even ones
def test_float32_rows_at_what_a_cluster_holds(objective, beyond):
    batch = wide(MOST + beyond)
    for kinds in (("head", "head"), ("logits", "logits")):
        student, teacher = models(batch, kinds, torch.float32)
        compare(batch, student, teacher, objective, "cuda", **OPTIONS["cross-entropy at temperature"](batch))


@pytest.mark.parametrize("objective", SMOOTH, **IDS)
def test_bfloat16_rows_beyond_what_a_cluster_holds(objective):
    batch = wide(2 * MOST + 8)
    student, teacher = models(batch, ("logits", "logits"), torch.bfloat16)
    compare(batch, student, teacher, objective, "cuda", **OPTIONS["cross-entropy at temperature"](batch))
