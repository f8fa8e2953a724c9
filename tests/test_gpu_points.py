"""The losses between points, sequences and vocabularies on a GPU, as on the CPU. ``pytest -m gpu``."""

import pytest
import torch
from cases import error
from gpu import wants_gpu
from test_hybrid_uld import vocabularies

import kd_kernels as kd

pytestmark = wants_gpu
DEVICE = "cuda"


def ragged(x, *lengths):
    return torch.arange(x.shape[1], device=x.device) < torch.tensor(lengths, device=x.device)[:, None]


def classes(x, y):
    labels = torch.arange(12, device=x.device)
    cost = 1 - torch.eye(40, dtype=x.dtype, device=x.device)
    return kd.class_transport(x[:, :40], y[:, :40], cost, labels, teacher_grad=True, target_weight=0.4)


def sequences(x, y, **options):
    x, y = x.view(3, 4, 64), y.view(3, 4, 64)
    masks = {"student_mask": ragged(x, 4, 2, 3), "teacher_mask": ragged(y, 3, 4, 3)}
    return kd.sequence_transport(x, y, **masks, teacher_grad=True, **options)


def multi_level(x, y, **options):
    student = kd.Head(
        x.view(3, 4, 64), torch.linspace(-1, 1, 50 * 64, device=x.device, dtype=x.dtype).sin().view(50, 64)
    )
    y = y.view(3, 4, 64)
    masks = {"student_mask": ragged(y, 4, 2, 3), "teacher_mask": ragged(y, 3, 4, 3)}
    sharp = {"epsilon": 0.01, "sinkhorn_temperature": 0.2, "sinkhorn_weight": 0.5}
    return kd.multi_level_transport(student, y, top_k=20, teacher_grad=True, **masks, **sharp, **options)


def hybrid(x, y):
    matches = kd.match_vocabularies(*vocabularies()).to(x.device)
    mass = {"student_log_mass": torch.linspace(-1, 0, 12, dtype=x.dtype, device=x.device)}
    return kd.hybrid_uld(x[:, :41], y[:, :29], matches, beta=0.3, teacher_grad=True, **mass)


LOSSES = {
    "relational distance": lambda x, y: kd.relational_distance(x, y, teacher_grad=True),
    "relational angle": lambda x, y: kd.relational_angle(x, y, teacher_grad=True),
    "relational distance, masked": lambda x, y: kd.relational_distance(
        x, y, mask=torch.arange(12, device=x.device) % 5 != 3, beta=0.2, eps=0.0, teacher_grad=True
    ),
    "features": lambda x, y: kd.feature_transport(x, y, epsilon=0.2, teacher_grad=True),
    "sequences": lambda x, y: sequences(x, y, epsilon=0.2),
    "sequences, attention": lambda x, y: sequences(x, y, epsilon=0.2, cost="attention"),
    "sequences, L1, unrolled": lambda x, y: sequences(
        x, y, epsilon=5.0, cost="l1", gradient="unrolled", iterations=5
    ),
    "classes": classes,
    "multi-level": multi_level,
    "multi-level, as published": lambda x, y: multi_level(
        x, y, match="nearest", padding=True, log_of="teacher"
    ),
    "hybrid ULD": hybrid,
}


def made(device, dtype):
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(12, 64, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_()
        for _ in range(2)
    ]


def run(name, device, dtype):
    leaves = made(device, dtype)
    loss = LOSSES[name](*leaves)
    return [x.cpu() for x in (loss.detach(), *torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_as_on_the_cpu(name, dtype):
    exact, plain, found = run(name, "cpu", torch.float64), run(name, "cpu", dtype), run(name, DEVICE, dtype)
    for x, y, z in zip(found, plain, exact):
        assert z.any() and error(x, z) <= 3 * error(y, z) + (1e-9 if dtype == torch.float64 else 1e-4)
