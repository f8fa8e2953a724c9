"""The door to the compiled CPU code: loading, capability, and addresses instead of tensors."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor

from kd_kernels.problems import GibbsJob, HalfStepJob, SinkhornJob
from kd_kernels.rows import (
    AngleJob,
    DistanceJob,
    GatherJob,
    PairwiseL1Job,
    RowJob,
    Rows,
    SortedL1Job,
    SortedSide,
    TopkJob,
)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


_ABI_VERSION = 8  # that of csrc/bindings.cpp, which says when it goes up
_REBUILD = "run `pip install .` in the source tree with a C++ compiler"


@functools.cache
def _load() -> tuple[Optional[ModuleType], Optional[str]]:
    try:
        from kd_kernels import _native
    except ImportError as error:
        if (Path(__file__).resolve().parent.parent / "setup.py").exists():
            return None, (
                "this is the source tree, which hides an installed kd_kernels; run from another directory, "
                "or build in place with `pip install -e .`"
            )
        return None, f"the compiled part kd_kernels._native cannot be loaded ({error}); {_REBUILD}"
    if _native.abi_version != _ABI_VERSION:
        return None, (
            f"the compiled part {_native.__file__} has version {_native.abi_version} of the kernel "
            f"contract, this Python code {_ABI_VERSION}; {_REBUILD}"
        )
    return _native, None


def why_not() -> Optional[str]:
    """Why the compiled part is unavailable; None when it is there."""
    return _load()[1]


def module() -> ModuleType:
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


def _address(tensor: Optional[Tensor]) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _side(rows: Rows):
    side = module().Side()
    side.logits, side.dtype = rows.logits.data_ptr(), _DTYPES[rows.logits.dtype]
    side.offsets = _address(rows.offsets)
    side.ld = 0 if rows.offsets is not None else rows.logits.stride(0)
    side.scale, side.softcap = rows.scale, rows.softcap
    side.temperature = rows.temperature.data_ptr()
    if rows.grad is not None:
        side.grad, side.grad_dtype = rows.grad.data_ptr(), _DTYPES[rows.grad.dtype]
        side.grad_offsets = _address(rows.grad_offsets)
        side.grad_ld = 0 if rows.offsets is not None else rows.grad.stride(0)
    return side


def row_divergence(job: RowJob, phases: int) -> None:
    """:func:`kd_kernels.reference.row_divergence`, compiled; on ``torch.get_num_threads()`` threads."""
    native = module()
    args = native.RowDivergence()
    args.n, args.vocab = job.n, job.vocab
    args.objective = native.objectives.index(job.objective)
    args.student, args.teacher = _side(job.student), _side(job.teacher)
    args.parameter0, args.parameter1 = job.parameter0.data_ptr(), job.parameter1.data_ptr()
    args.labels = _address(job.labels)
    args.soft_weight, args.hard_weight = job.soft_weight.data_ptr(), job.hard_weight.data_ptr()
    args.statistics, args.terms = job.statistics.data_ptr(), job.terms.data_ptr()
    args.entropies = job.entropies
    args.threads = torch.get_num_threads()
    native.row_divergence(args, phases)


def gather(job: GatherJob, phases: int) -> None:
    """:func:`kd_kernels.reference.gather`, compiled; on ``torch.get_num_threads()`` threads."""
    native = module()
    args = native.Gather()
    args.n, args.vocab = job.n, job.vocab
    args.side = _side(job.side)
    args.k, args.ids = job.ids.shape[1], job.ids.data_ptr()
    args.gathered, args.statistics = job.gathered.data_ptr(), job.statistics.data_ptr()
    args.hard, args.means = job.hard, job.means
    args.soft, args.slope = _address(job.soft), _address(job.slope)
    args.hard_weight, args.at_ids = _address(job.hard_weight), _address(job.at_ids)
    args.threads = torch.get_num_threads()
    native.gather(args, phases)


def _sorted_side(side: SortedSide):
    args = module().SortedSide()
    args.logits, args.vocab = _side(side.rows), side.vocab
    args.max, args.logz, args.mass = side.max.data_ptr(), side.logz.data_ptr(), side.mass.data_ptr()
    args.sum = side.sum.data_ptr()
    return args


def sorted_l1(job: SortedL1Job) -> None:
    """:func:`kd_kernels.reference.sorted_l1`, compiled; on ``torch.get_num_threads()`` threads."""
    native = module()
    args = native.SortedL1()
    args.n = job.n
    args.student, args.teacher = _sorted_side(job.student), _sorted_side(job.teacher)
    args.soft_weight, args.loss = job.soft_weight.data_ptr(), job.loss.data_ptr()
    args.hard_weight, args.hard_logz = _address(job.hard_weight), _address(job.hard_logz)
    args.labels = _address(job.labels)
    args.threads = min(torch.get_num_threads(), max(job.n, 1))
    scratch = torch.empty(args.threads * native.sorted_l1_scratch(args), dtype=torch.uint8, device="cpu")
    args.scratch = scratch.data_ptr()
    native.sorted_l1(args)


def sinkhorn(job: SinkhornJob, phases: int) -> None:
    """:func:`kd_kernels.reference.sinkhorn`, compiled; a problem is one thread's."""
    native = module()
    args = native.Sinkhorn()
    args.count, args.n, args.m = job.cost.shape
    args.cost, args.cost_dtype = job.cost.data_ptr(), _DTYPES[job.cost.dtype]
    args.cost_batch, args.cost_row = job.cost.stride()[:2]
    args.wide = job.a.dtype == torch.float64
    args.iterations, args.tolerance, args.domain = job.iterations, job.tolerance, job.domain
    for name in (
        "a", "b", "epsilons", "phi", "psi", "numbers", "phi_history", "psi_history", "d_transport", "d_value",
        "d_plan", "d_phi", "d_psi", "d_cost", "d_a", "d_b",
    ):  # fmt: skip
        setattr(args, name, _address(getattr(job, name)))
    args.threads = torch.get_num_threads()
    native.sinkhorn(args, phases)


def gibbs(job: GibbsJob) -> None:
    """:func:`kd_kernels.reference.gibbs`, compiled; on ``torch.get_num_threads()`` threads."""
    native = module()
    args = native.Gibbs()
    args.wide, args.epsilon = job.kernel.dtype == torch.float64, job.epsilon
    args.by_column = job.kernel.stride(1) != 1
    cost, kernel, weighted = (x.t() if args.by_column else x for x in (job.cost, job.kernel, job.weighted))
    args.n, args.m = cost.shape
    args.ld, args.out_ld = cost.stride(0), kernel.stride(0)
    args.cost, args.shift, args.reach = cost.data_ptr(), job.shift.data_ptr(), job.reach.data_ptr()
    args.kernel, args.weighted = kernel.data_ptr(), weighted.data_ptr()
    args.threads = torch.get_num_threads()
    native.gibbs(args)


def half_step(job: HalfStepJob) -> None:
    """:func:`kd_kernels.reference.half_step`, compiled; on ``torch.get_num_threads()`` threads."""
    native = module()
    args = native.HalfStep()
    args.count, (args.n, args.m), args.ld = job.x.shape[0], job.kernel.shape, job.kernel.stride(0)
    args.wide = job.kernel.dtype == torch.float64
    args.transposed, args.divide = job.transposed, job.divide
    for name in ("kernel", "x", "weight", "extra", "out"):
        setattr(args, name, _address(getattr(job, name)))
    args.x_ld, args.weight_ld, args.out_ld = job.x.stride(0), job.weight.stride(0), job.out.stride(0)
    args.threads = torch.get_num_threads()
    native.half_step(args)


def topk(job: TopkJob) -> None:
    """:func:`kd_kernels.reference.topk`, compiled; on ``torch.get_num_threads()`` threads."""
    native = module()
    args = native.Topk()
    args.n, args.vocab = job.n, job.vocab
    args.side = _side(job.side)
    args.temperatures, args.temperature_count = job.temperatures.data_ptr(), job.temperatures.numel()
    args.k, args.ids, args.values = job.ids.shape[1], job.ids.data_ptr(), job.values.data_ptr()
    args.statistics = job.statistics.data_ptr()
    args.target_count, args.targets = job.targets.shape[1], job.targets.data_ptr()
    args.target_values, args.target_ranks = job.target_values.data_ptr(), job.target_ranks.data_ptr()
    args.sample_count, args.uniforms = job.uniforms.shape[1], job.uniforms.data_ptr()
    args.samples = job.samples.data_ptr()
    args.threads = torch.get_num_threads()
    native.topk(args)


def angle(job: AngleJob) -> None:
    """:func:`kd_kernels.reference.angle`, compiled; on ``torch.get_num_threads()`` threads."""
    native = module()
    args = native.Angle()
    args.n, args.ld, args.beta = job.n, job.student.stride(0), job.beta
    args.student, args.student_inverse = job.student.data_ptr(), job.student_inverse.data_ptr()
    args.teacher, args.teacher_inverse = job.teacher.data_ptr(), job.teacher_inverse.data_ptr()
    args.sums = job.sums.data_ptr()
    args.student_grad, args.teacher_grad = _address(job.student_grad), _address(job.teacher_grad)
    args.threads = torch.get_num_threads()
    native.angle(args)


def distance(job: DistanceJob, phases: int) -> None:
    """:func:`kd_kernels.reference.distance`, compiled; on ``torch.get_num_threads()`` threads."""
    native = module()
    args = native.Distance()
    args.n, args.ld = job.n, job.student.stride(0)
    for name in ("numbers", "student", "teacher", "statistics", "terms", "student_grad", "teacher_grad"):
        setattr(args, name, _address(getattr(job, name)))
    args.threads = torch.get_num_threads()
    native.distance(args, phases)


def pairwise_l1(job: PairwiseL1Job, phases: int) -> None:
    """:func:`kd_kernels.reference.pairwise_l1`, compiled; on ``torch.get_num_threads()`` threads."""
    native = module()
    args = native.PairwiseL1()
    args.n, args.vocab = job.n, job.vocab
    args.student, args.teacher = _side(job.student), _side(job.teacher)
    pairs = job.cost if job.d_cost is None else job.d_cost
    args.groups, args.longest = pairs.shape[:2]
    args.starts = job.starts.data_ptr()
    args.student_statistics = job.student_statistics.data_ptr()
    args.teacher_statistics = job.teacher_statistics.data_ptr()
    args.cost, args.signs, args.d_cost = _address(job.cost), _address(job.signs), _address(job.d_cost)
    args.student_means, args.teacher_means = _address(job.student_means), _address(job.teacher_means)
    args.threads = torch.get_num_threads()
    native.pairwise_l1(args, phases)


# --- bfloat16 products with a float32 result ---------------------------------------------------------


def gemm_bf16(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """Our own kernel for processors with AVX512_BF16 but without AMX (csrc/gemm.h)."""
    module().gemm_bf16(
        m=a.shape[0],
        n=b.shape[1],
        k=a.shape[1],
        a=a.data_ptr(),
        a_row=a.stride(0),
        a_col=a.stride(1),
        b=b.data_ptr(),
        b_row=b.stride(0),
        b_col=b.stride(1),
        c=out.data_ptr(),
        ldc=out.stride(0),
        accumulate=accumulate,
        threads=torch.get_num_threads(),
    )


def has_gemm_bf16() -> bool:
    return why_not() is None and module().gemm_bf16_available()


@functools.cache
def processor_flags() -> frozenset[str]:
    """What Linux says the processor can do; empty elsewhere."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


@functools.cache
def _mkl(name: str):
    """A function of the MKL inside torch's own CPU library, or None: its mixed-precision products are
    exported there, though torch offers them to Python on CUDA only."""
    folder = Path(torch.__file__).parent / "lib"
    try:
        function = getattr(ctypes.CDLL(str(folder / "libtorch_cpu.so")), name)
    except (OSError, AttributeError):
        return None
    c_int, c_float, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    function.argtypes = [c_int] * 6 + [c_float, pointer, c_int, pointer, c_int, c_float, pointer, c_int]
    function.restype = None
    return function


_MKL_GEMM = {torch.bfloat16: "cblas_gemm_bf16bf16f32", torch.float16: "cblas_gemm_f16f16f32"}
_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112
_INT_MAX = 2**31 - 1


def has_mkl_gemm(dtype: torch.dtype) -> bool:
    return dtype in _MKL_GEMM and _mkl(_MKL_GEMM[dtype]) is not None


def mkl_gemm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """``out (+)= a @ b`` with 16-bit operands and a float32 ``out``, all with one unit stride."""

    def operand(x: Tensor) -> tuple[int, int]:  # (transposition, leading dimension)
        if x.stride(1) == 1:
            return _PLAIN, max(x.stride(0), x.shape[1], 1)
        return _TRANSPOSED, max(x.stride(1), x.shape[0], 1)

    (ta, lda), (tb, ldb) = operand(a), operand(b)
    (m, k), n = a.shape, b.shape[1]
    ldc = max(out.stride(0), n, 1)
    if max(m, n, k, lda, ldb, ldc) > _INT_MAX:
        raise ValueError("a dimension exceeds 2^31 - 1")
    _mkl(_MKL_GEMM[a.dtype])(
        _ROW_MAJOR, ta, tb, m, n, k, 1.0, a.data_ptr(), lda, b.data_ptr(), ldb,
        float(accumulate), out.data_ptr(), ldc,
    )  # fmt: skip
