"""What is measured: objectives, dtypes, shapes, inputs and the targets to meet.

The objectives come from ``kd_kernels.objectives.CATALOGUE`` when the package can be imported, so a new
one is benchmarked without a line here; without the package the list below lets the peers run alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor

FLOOR, FLOOR_VOCAB_MAJOR = "floor", "floor [V, C]"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# The parameters the tables are about. An objective of the catalogue that is not named here is measured
# with its own defaults.
PARAMETERS: dict[str, dict[str, float]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jensen_shannon": {"beta": 0.5},
    "skew_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
    "total_variation": {},
    "weighted_kl": {"forward": 1.0, "reverse": 1.0},
}

LABELS = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "jensen_shannon": "JS",
    "skew_kl": "skew KL",
    "skew_reverse_kl": "skew reverse KL",
    "total_variation": "total variation",
    "weighted_kl": "weighted KL",
}


@dataclass(frozen=True)
class Objective:
    """A name of the catalogue with its parameters, hashable so that compiled steps can be kept by it."""

    name: str
    parameters: tuple[tuple[str, float], ...] = ()

    def __getitem__(self, key: str) -> float:
        return dict(self.parameters)[key]

    @property
    def label(self) -> str:
        values = ", ".join(f"{value:g}" for _, value in self.parameters)
        return LABELS.get(self.name, self.name.replace("_", " ")) + (f" ({values})" if values else "")


def objectives(only: Optional[Iterable[str]] = None) -> list[Objective]:
    """Every objective of the catalogue, or those named in ``only``."""
    try:
        from kd_kernels.objectives import CATALOGUE

        names = list(CATALOGUE)
    except ImportError:
        names = list(PARAMETERS)
    if only is not None:
        wanted = list(only)
        unknown = sorted(set(wanted) - set(names))
        if unknown:
            raise SystemExit(f"unknown objective {unknown}; there are {names}")
        names = [name for name in names if name in wanted]
    return [Objective(name, tuple(PARAMETERS.get(name, {}).items())) for name in names]


@dataclass(frozen=True)
class Shape:
    """One distillation step: tokens x vocabulary with the two hidden sizes."""

    tokens: int
    vocab: int
    d_student: int = 512
    d_teacher: int = 1024

    @property
    def label(self) -> str:
        return f"{self.tokens} tokens, V={self.vocab}, hidden {self.d_student}/{self.d_teacher}"

    @property
    def gemm_flops(self) -> int:
        """The four products: both logits, d hidden, d weight."""
        return 2 * self.tokens * self.vocab * (3 * self.d_student + self.d_teacher)


@dataclass(frozen=True)
class SparseSize:
    """A saved teacher: K of V at each token; ``width`` is the student's hidden size where one trains."""

    tokens: int
    vocab: int
    k: int
    width: int = 0


@dataclass(frozen=True)
class CacheSize:
    """A teacher on disk, to be read or, with the student's hidden size as ``width``, to be trained from."""

    what: str
    sequences: int
    length: int
    vocab: int
    k: int
    samples: int
    dtype: str = "float32"
    width: int = 0


@dataclass(frozen=True)
class RelationalSize:
    """Points, samples or sequences, and their features or classes."""

    rows: int
    width: int


@dataclass(frozen=True)
class SinkhornSize:
    """Transport problems; ``shared``: of one cost."""

    problems: int
    rows: int
    columns: int
    iterations: int
    shared: bool = False


HEAD = Shape(2048, 32000)
SPARSE = {"topk": SparseSize(64, 262144, 32), "sparse step": SparseSize(2048, 32000, 64, 512)}
SPARSE_QUICK = {"topk": SparseSize(4, 3000, 8), "sparse step": SparseSize(48, 384, 8, 32)}
# Promises about these sizes: time over the yardstick, and plain torch's time over ours.
SPARSE_OVER_FLOOR = {"sparse step": 1.1}
SPARSE_SPEEDUP = {("topk", "fp32"): 12.0}
CACHE = (
    CacheSize("read", 32, 4096, 32000, 64, 0),
    CacheSize("read", 32, 4096, 32000, 64, 0, "float16"),
    CacheSize("read", 128, 4096, 32000, 0, 50),
    CacheSize("loader", 64, 512, 32000, 64, 0, width=1024),
    CacheSize("loader", 64, 512, 32000, 0, 50, width=1024),
)
CACHE_QUICK = (CacheSize("read", 4, 16, 384, 8, 5), CacheSize("loader", 4, 16, 384, 8, 5, "float16", 32))
# Promises about these sizes: reading at 80 % of the raw read's speed; share of a step.
CACHE_OVER_YARDSTICK = {"read": 1.25, "loader": 0.02}

RELATIONAL = {
    "relational angle": RelationalSize(128, 1024),
    "relational distance": RelationalSize(128, 1024),
    "class transport": RelationalSize(16, 1000),
    "feature transport": RelationalSize(128, 1024),
    "sequence transport": RelationalSize(8, 512),
    "multi-level OT": RelationalSize(4, 32000),
    "hybrid ULD": RelationalSize(128, 32000),
}
RELATIONAL_QUICK = {name: RelationalSize(8, 24) for name in RELATIONAL}
# The published form's time over ours, at these sizes.
RELATIONAL_SPEEDUP = {"relational angle": 15.0, "class transport": 40.0}

SINKHORN = {
    "own costs": SinkhornSize(8, 256, 256, 20),
    "one cost": SinkhornSize(64, 200, 200, 10, shared=True),
}
SINKHORN_QUICK = {"own costs": SinkhornSize(2, 9, 7, 20), "one cost": SinkhornSize(3, 9, 7, 20, shared=True)}
# The promise about the first: POT's time over ours.
SINKHORN_SPEEDUP = {("own costs", "fp32"): 8.0}
QUICK = Shape(48, 384, 32, 48)


@dataclass(frozen=True)
class SortedSize:
    """A student and a teacher with vocabularies of their own."""

    tokens: int
    vocab: int
    teacher_vocab: int
    k: int


SORTED = SortedSize(64, 152064, 128256, 32)
SORTED_QUICK = SortedSize(4, 700, 500, 8)
# Promises about that size: the exact form over two sorts, and the published form over the top-K one.
SORTED_OVER_FLOOR, SORTED_SPEEDUP = 1.0, 20.0


@dataclass(frozen=True)
class SinkhornBatchSize:
    """As many rows of a student as of a teacher, all pairs of them."""

    tokens: int
    vocab: int


SINKHORN_BATCH = (SinkhornBatchSize(64, 32000), SinkhornBatchSize(64, 152064))
SINKHORN_BATCH_QUICK = (SinkhornBatchSize(4, 700),)
# A promise about the first of these sizes: plain torch's time over ours.
SINKHORN_BATCH_SPEEDUP = 4.0


@dataclass
class Inputs:
    """Leaves of one step. The student's tensors collect gradients; the teacher is frozen."""

    h_s: Tensor
    w_s: Tensor
    h_t: Tensor
    w_t: Tensor
    labels: Tensor = field(repr=False)  # Liger insists on labels; none is ignored

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.h_s, self.w_s, self.h_t, self.w_t))

    def clear_gradients(self) -> None:
        self.h_s.grad = None
        self.w_s.grad = None


def make_inputs(shape: Shape, dtype: torch.dtype, *, seed: int = 0, device: str = "cpu") -> Inputs:
    """Hidden states and heads whose logits have a standard deviation of 3 and a correlation of about 0.7.

    Independent models would make every divergence large and its row arithmetic unlike training's; equal
    ones would hide rounding. So the teacher shares the student's features and adds its own.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * std

    h_s = normal(shape.tokens, shape.d_student, 1.0)
    w_s = normal(shape.vocab, shape.d_student, 3.0 / shape.d_student**0.5)
    h_t = normal(shape.tokens, shape.d_teacher, 1.0)
    w_t = normal(shape.vocab, shape.d_teacher, 3.0 / shape.d_teacher**0.5)
    shared = min(shape.d_student, shape.d_teacher // 2)
    h_t[:, :shared] = h_s[:, :shared]
    w_t[:, :shared] = w_s[:, :shared] * (shape.d_student / shape.d_teacher) ** 0.5

    def leaf(tensor: Tensor, trained: bool) -> Tensor:
        return tensor.to(device, dtype).requires_grad_(trained)

    return Inputs(
        leaf(h_s, True),
        leaf(w_s, True),
        leaf(h_t, False),
        leaf(w_t, False),
        torch.zeros(shape.tokens, dtype=torch.long, device=device),
    )


def target_ratio(provider: str, dtype: str, objective: str) -> Optional[float]:
    """How many times the floor a provider of ours may take at ``HEAD``; None where nothing was promised."""
    limits = {
        ("kd", "fp32"): (1.08, 1.15),
        ("kd", "bf16"): (1.75, 2.0),
        ("kd bf16 logits", "bf16"): (1.2, 1.4),
    }.get((provider, dtype))
    if limits is None:
        return None
    return limits[0] if objective == "forward_kl" else limits[1]


# Times faster than plain torch that `kd` has to be, by (dtype, objective).
TARGET_SPEEDUP = {("fp32", "forward_kl"): 1.4, ("fp32", "jensen_shannon"): 3.5}

# Peak memory above inputs, outputs and gradients: the package's default budget plus this much.
WORKSPACE_BYTES = 256 << 20
TARGET_OVERHEAD_BYTES = 64 << 20
