"""What is tested and benchmarked: objectives, sources, dtypes, options, and the bars they must meet.

Inputs are scaled so that every argument matters; test_catalogue.py proves it by leaving each out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import kd_kernels as kd

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))  # major and minor
OBJECTIVES: list[kd.Objective] = [
    kd.ForwardKL(),
    kd.ReverseKL(),
    kd.JensenShannon(0.5),
    kd.SkewKL(0.1),
    kd.SkewReverseKL(0.1),
    kd.TotalVariation(),
    kd.WeightedKL(0.7, 0.4),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SOURCES = [("head", "head"), ("head", "logits"), ("logits", "logits"), ("logits", "head")]

# err(ours) <= 2 err(plain torch, same dtype) + floor, err(x) = |x - x64| / |x64|. The floors are a few
# roundings of the dtype's own results, for cases in which plain torch happens to be exact.
# In float64 a skew of 0.99, which leaves a hundredth of each term, needs the most.
FLOOR = {torch.float64: 2e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

# Every option of kd.distill that changes the number, as keyword arguments made from a batch.
OPTIONS: dict[str, Callable[[Batch], dict]] = {
    "plain": lambda b: {},
    "labels": lambda b: {"labels": b.labels},
    "mask": lambda b: {"mask": b.mask},
    "labels and mask": lambda b: {"labels": b.labels, "mask": b.mask},
    "cross-entropy": lambda b: {"labels": b.labels, "hard_weight": 0.7, "soft_weight": 0.6},
    "cross-entropy at temperature": lambda b: {"labels": b.labels, "hard_weight": 0.7, "temperature": 2.0},
    "temperature": lambda b: {"temperature": 1.7},
    "token temperature": lambda b: {"temperature": b.temperature},
    "teacher temperature": lambda b: {"temperature": 1.3, "teacher_temperature": b.temperature},
    "temperature squared": lambda b: {"temperature": b.temperature, "temperature_squared": True},
    "token weight": lambda b: {"token_weight": b.weight, "labels": b.labels},
    "sum": lambda b: {"reduction": "sum", "labels": b.labels},
    "batchmean": lambda b: {"reduction": "batchmean", "labels": b.labels},
    "none": lambda b: {"reduction": "none", "labels": b.labels, "hard_weight": 0.3},
    "num_items": lambda b: {"num_items": 11, "labels": b.labels},
    "everything": lambda b: {
        "labels": b.labels,
        "mask": b.mask,
        "token_weight": b.weight,
        "temperature": b.temperature,
        "teacher_temperature": 1.4,
        "temperature_squared": True,
        "hard_weight": 0.4,
        "soft_weight": 0.9,
        "num_items": torch.tensor(7.0),
    },
}

# What a head may do to its logits; the logits source takes scale and softcap.
SHAPING = {
    "bare": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.6},
    "softcap": {"softcap": 4.0},
    "all": {"bias": True, "scale": 1.3, "softcap": 6.0},
}


@dataclass
class Batch:
    """Random models at one set of tokens, in float64; ``source`` hands out what a test needs."""

    lead: tuple[int, ...] = (3, 5)
    vocab: int = 203
    student_width: int = 24
    teacher_width: int = 40
    seed: int = 0
    spread: float = 2.5  # standard deviation of the logits
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        for name, width in (("student", self.student_width), ("teacher", self.teacher_width)):
            self.tensors[f"{name} hidden"] = normal(*self.lead, width)
            self.tensors[f"{name} weight"] = normal(self.vocab, width) * (self.spread / width**0.5)
            self.tensors[f"{name} bias"] = normal(self.vocab) * 2
            self.tensors[f"{name} logits"] = normal(*self.lead, self.vocab) * self.spread
        self.labels = torch.randint(0, self.vocab, self.lead, generator=g)
        self.labels.view(-1)[::4] = -100
        self.mask = torch.rand(self.lead, generator=g) < 0.7
        self.weight = torch.rand(self.lead, generator=g) + 0.2
        self.temperature = torch.rand(self.lead, generator=g) * 1.5 + 0.6
        self.upstream = normal(*self.lead)

    def source(
        self,
        side: str,
        kind: str,
        dtype: torch.dtype,
        *,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float | None = None,
        grad: bool = True,
    ) -> kd.Head | kd.Logits:
        """A fresh source (leaf tensors) of ``side`` "student" or "teacher", ``kind`` "head" or "logits"."""

        def leaf(name: str) -> Tensor:
            return self.tensors[f"{side} {name}"].to(dtype).clone().requires_grad_(grad)

        if kind == "logits":
            return kd.Logits(leaf("logits"), scale=scale, softcap=softcap)
        return kd.Head(
            leaf("hidden"), leaf("weight"), leaf("bias") if bias else None, scale=scale, softcap=softcap
        )


def batch_for(backend: str | None, **options) -> Batch:
    """A batch with fewer tokens where every one of them is interpreted: five that have labels, which is the
    least that makes three chunks of which the last is another size."""
    return Batch(**options, lead=(7, 1)) if backend == "triton" else Batch(**options)


def leaves(*sources: kd.Head | kd.Logits) -> list[Tensor]:
    return [x for source in sources for x in source.tensors() if x is not None]


def error(x: Tensor, exact: Tensor) -> float:
    """``|x - exact| / |exact|`` over all elements."""
    x, exact = x.detach().double(), exact.detach().double()
    assert x.shape == exact.shape, (x.shape, exact.shape)
    return ((x - exact).norm() / exact.norm().clamp(min=1e-300)).item()
