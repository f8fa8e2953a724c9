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


# Sizes are "full", which the tables and the promises are about, those of a "quick" smoke test, and those of a
# "gpu" (benchmarks/gpu_check.py).
SPARSE = {
    "full": {
        "topk": SparseSize(64, 262144, 32),
        "topk of heads": SparseSize(1024, 128256, 64, 1024),
        "sparse step": SparseSize(2048, 32000, 64, 512),
    },
    "quick": {
        "topk": SparseSize(4, 3000, 8),
        "topk of heads": SparseSize(4, 3000, 8, 32),
        "sparse step": SparseSize(48, 384, 8, 32),
    },
    "gpu": {
        "topk of heads": SparseSize(8192, 151936, 64, 4096),
        "sparse step": SparseSize(8192, 151936, 64, 4096),
    },
}
# Promises about these sizes: time over the yardstick, and plain torch's time over ours.
SPARSE_OVER_FLOOR = {
    ("sparse step", SPARSE["full"]["sparse step"]): 1.1,
    ("sparse step", SPARSE["gpu"]["sparse step"]): 1.2,
    ("topk of heads", SPARSE["gpu"]["topk of heads"]): 1.15,
}
SPARSE_SPEEDUP = {("topk", SPARSE["full"]["topk"], "fp32"): 12.0}
CACHE = {
    "full": (
        CacheSize("read", 32, 4096, 32000, 64, 0),
        CacheSize("read", 32, 4096, 32000, 64, 0, "float16"),
        CacheSize("read", 128, 4096, 32000, 0, 50),
        CacheSize("loader", 64, 512, 32000, 64, 0, width=1024),
        CacheSize("loader", 64, 512, 32000, 0, 50, width=1024),
    ),
    "quick": (CacheSize("read", 4, 16, 384, 8, 5), CacheSize("loader", 4, 16, 384, 8, 5, "float16", 32)),
}
# Promises about these sizes: reading at 80 % of the raw read's speed; share of a step.
CACHE_OVER_YARDSTICK = {"read": 1.25, "loader": 0.02}

_RELATIONAL = {
    "relational angle": RelationalSize(128, 1024),
    "relational distance": RelationalSize(128, 1024),
    "class transport": RelationalSize(16, 1000),
    "feature transport": RelationalSize(128, 1024),
    "sequence transport": RelationalSize(8, 512),
    "multi-level OT": RelationalSize(4, 32000),
    "hybrid ULD": RelationalSize(128, 32000),
}
RELATIONAL = {
    "full": _RELATIONAL,
    "quick": {name: RelationalSize(8, 24) for name in _RELATIONAL},
    "gpu": _RELATIONAL,
}
# The published form's time over ours, at the full sizes.
RELATIONAL_SPEEDUP = {"relational angle": 15.0, "class transport": 40.0}

SINKHORN = {
    "full": {
        "own costs": SinkhornSize(8, 256, 256, 20),
        "one cost": SinkhornSize(64, 200, 200, 10, shared=True),
    },
    "quick": {
        "own costs": SinkhornSize(2, 9, 7, 20),
        "one cost": SinkhornSize(3, 9, 7, 20, shared=True),
    },
    "gpu": {
        "own costs": SinkhornSize(64, 256, 256, 20),
        "few large costs": SinkhornSize(8, 1024, 1024, 50),
        "one cost": SinkhornSize(64, 200, 200, 10, shared=True),
    },
}
# Promises about these: POT's time over ours, and a solve's over one read of its costs.
SINKHORN_SPEEDUP = {(SINKHORN["full"]["own costs"], "fp32"): 8.0}
SINKHORN_OVER_READ = {(SINKHORN["gpu"]["own costs"], "fp32"): 3.0}
QUICK = Shape(48, 384, 32, 48)


@dataclass(frozen=True)
class SortedSize:
    """A student and a teacher with vocabularies of their own."""

    tokens: int
    vocab: int
    teacher_vocab: int
    k: int


SORTED = {"full": SortedSize(64, 152064, 128256, 32), "quick": SortedSize(4, 700, 500, 8)}
SORTED["gpu"] = SORTED["full"]
# Promises about the full size: the exact form over two sorts, and the published form over the top-K one.
SORTED_OVER_FLOOR, SORTED_SPEEDUP = 1.0, 20.0


@dataclass(frozen=True)
class SinkhornBatchSize:
    """As many rows of a student as of a teacher, all pairs of them."""

    tokens: int
    vocab: int


SINKHORN_BATCH = {
    "full": (SinkhornBatchSize(64, 32000), SinkhornBatchSize(64, 152064)),
    "quick": (SinkhornBatchSize(4, 700),),
    "gpu": (SinkhornBatchSize(64, 32000), SinkhornBatchSize(256, 151936)),
}
# Promises about these: plain torch's time over ours, and ours over what the instructions take.
SINKHORN_BATCH_SPEEDUP = {SINKHORN_BATCH["full"][0]: 4.0}
SINKHORN_BATCH_OVER_BOUND = {SINKHORN_BATCH["gpu"][1]: 2.0}


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
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device) * std

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


@dataclass(frozen=True)
class Promise:
    """What a step of one shape shall keep to; also to be faster than every peer."""

    # How many times the floor, by provider and dtype: with forward KL, with any other objective.
    over_floor: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    # How many times faster than plain torch `kd` has to be, by dtype and objective.
    speedup: dict[tuple[str, str], float] = field(default_factory=dict)

    def limit(self, provider: str, dtype: str, objective: str) -> Optional[float]:
        limits = self.over_floor.get((provider, dtype))
        return None if limits is None else limits[objective != "forward_kl"]


HEAD = Shape(2048, 32000)
# Most telling first: what the time of a GPU does not reach is left out.
GPU_HEAD = (
    (Shape(8192, 128256, 2048, 4096), "forward_kl"),
    (Shape(8192, 128256, 2048, 4096), "jensen_shannon"),
    (Shape(8192, 128256, 2048, 4096), "reverse_kl"),
    (Shape(1024, 128256, 2048, 4096), "forward_kl"),
    (Shape(1024, 128256, 2048, 4096), "jensen_shannon"),
    (Shape(8192, 32000, 2048, 4096), "forward_kl"),
    (Shape(8192, 151936, 4096, 4096), "forward_kl"),
    (Shape(8192, 262144, 1024, 8192), "forward_kl"),
    (Shape(32768, 128256, 2048, 4096), "forward_kl"),
    (Shape(8192, 128256, 2048, 4096), "skew_kl"),
    (Shape(8192, 128256, 2048, 4096), "skew_reverse_kl"),
    (Shape(8192, 128256, 2048, 4096), "total_variation"),
    (Shape(8192, 128256, 2048, 4096), "weighted_kl"),
    (Shape(1024, 128256, 2048, 4096), "reverse_kl"),
    (Shape(8192, 32000, 2048, 4096), "jensen_shannon"),
)
PROMISES: dict[Shape, Promise] = {shape: Promise() for shape, _ in GPU_HEAD}
PROMISES[HEAD] = Promise(
    {("kd", "fp32"): (1.08, 1.15), ("kd", "bf16"): (1.75, 2.0), ("kd bf16 logits", "bf16"): (1.2, 1.4)},
    {("fp32", "forward_kl"): 1.4, ("fp32", "jensen_shannon"): 3.5},
)
PROMISES[Shape(8192, 128256, 2048, 4096)] = Promise(
    {("kd", "bf16"): (1.2, 1.3), ("kd 1 GiB", "bf16"): (1.3, 1.4), ("kd cuda", "bf16"): (1.12, 1.12)}
)
PROMISES[Shape(1024, 128256, 2048, 4096)] = Promise({("kd", "bf16"): (1.5, 1.5)})

# The row kernel alone: logits that exist, and the least share of a copy's rate, by provider and dtype.
ROWS = Shape(2048, 32000)
GPU_ROWS = tuple(Shape(4096, vocab) for vocab in (128256, 32000, 151936, 262144))
SHARE_OF_COPY: dict[tuple[Shape, str, str], float] = {
    **{(shape, "kd cuda", dtype): 0.9 for shape in GPU_ROWS for dtype in DTYPES},
    (GPU_ROWS[0], "kd", "bf16"): 0.57,
}

# What a step's memory may be above its workspace, beyond inputs, outputs and gradients.
OVERHEAD_BYTES = {"cpu": 64 << 20, "cuda": 32 << 20}
