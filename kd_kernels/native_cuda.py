"""The door to the compiled CUDA kernels: loading, capability, and addresses instead of tensors.

Triton's were measured faster: they serve a call that names them (``backend="cuda"``) and no other.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from kd_kernels.rows import RowJob, Rows

STANDING = 'was slower than Triton on an H200: serves only calls that say backend="cuda"'
LIBRARY = Path(__file__).resolve().parent / "libkd_kernels_cuda.so"
_ABI_VERSION = 2  # that of csrc/cuda/library.cpp, which says when it goes up
_REBUILD = "with nvcc on the path, run `KD_KERNELS_CUDA=on pip install .` in the source tree"

# In the order of csrc/rows.h and csrc/row_divergence.h.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
OBJECTIVES = (
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skew_kl",
    "skew_reverse_kl",
    "total_variation",
    "weighted_kl",
)

_int64, _double, _pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class _Side(ctypes.Structure):  # csrc/rows.h
    _fields_ = [
        ("logits", _pointer),
        ("dtype", ctypes.c_int),
        ("offsets", _pointer),
        ("ld", _int64),
        ("scale", _double),
        ("softcap", _double),
        ("temperature", _pointer),
        ("grad", _pointer),
        ("grad_dtype", ctypes.c_int),
        ("grad_offsets", _pointer),
        ("grad_ld", _int64),
    ]


class _RowDivergence(ctypes.Structure):  # csrc/row_divergence.h
    _fields_ = [
        ("n", _int64),
        ("vocab", _int64),
        ("objective", ctypes.c_int),
        ("student", _Side),
        ("teacher", _Side),
        ("parameter0", _pointer),
        ("parameter1", _pointer),
        ("labels", _pointer),
        ("soft_weight", _pointer),
        ("hard_weight", _pointer),
        ("statistics", _pointer),
        ("terms", _pointer),
        ("entropies", ctypes.c_bool),
        ("threads", ctypes.c_int),
    ]


# What the library exports, all of it: name -> (result, arguments).
_TEXT = (ctypes.c_char_p, _int64)
FUNCTIONS: dict[str, tuple[type, tuple[type, ...]]] = {
    "kd_cuda_abi_version": (ctypes.c_int, ()),
    "kd_cuda_job_bytes": (_int64, ()),
    "kd_cuda_ready": (ctypes.c_int, (ctypes.c_int, *_TEXT)),
    "kd_cuda_row_divergence": (
        ctypes.c_int,
        (ctypes.POINTER(_RowDivergence), ctypes.c_uint, ctypes.c_int, ctypes.c_size_t, *_TEXT),
    ),
}


@functools.cache
def _load() -> tuple[Optional[ctypes.CDLL], Optional[str]]:
    if not LIBRARY.exists():
        return None, f"this installation was built without it ({LIBRARY.name} is absent); {_REBUILD}"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY.name} cannot be loaded ({error}); {_REBUILD}"
    if (version := library.kd_cuda_abi_version()) != _ABI_VERSION:
        return (
            None,
            f"{LIBRARY.name} has version {version} of the contract, this code {_ABI_VERSION}; {_REBUILD}",
        )
    if library.kd_cuda_job_bytes() != ctypes.sizeof(_RowDivergence):
        return None, f"{LIBRARY.name} and this Python code differ in what a job is; {_REBUILD}"
    return library, None


@functools.cache
def driver_words(index: int) -> Optional[str]:
    """Why the ``index``-th GPU cannot run the kernels, as the CUDA runtime says it; None where it can."""
    library = _library()
    text = ctypes.create_string_buffer(512)
    return None if library.kd_cuda_ready(index, text, len(text)) else text.value.decode()


def why_not(device: torch.device) -> list[str]:
    """Why the CUDA kernels cannot serve ``device``; empty where they can."""
    reasons = [] if device.type == "cuda" else [f"serves CUDA tensors, got {device}"]
    missing = _load()[1]
    if torch.version.hip is not None:
        reasons.append("serves NVIDIA GPUs, this torch is built for AMD's")
    elif missing is not None:
        reasons.append(missing)
    elif (words := driver_words(device.index or 0)) is not None:
        reasons.append(words)
    return reasons


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return library


def _address(tensor: Optional[Tensor]) -> Optional[int]:
    return None if tensor is None else tensor.data_ptr()


def _side(rows: Rows) -> _Side:
    side = _Side(
        logits=rows.logits.data_ptr(),
        dtype=_DTYPES[rows.logits.dtype],
        offsets=_address(rows.offsets),
        scale=rows.scale,
        softcap=rows.softcap,
        temperature=rows.temperature.data_ptr(),
    )
    if rows.grad is not None:
        side.grad, side.grad_dtype = rows.grad.data_ptr(), _DTYPES[rows.grad.dtype]
        side.grad_offsets = _address(rows.grad_offsets)
    return side


def arguments(job: RowJob) -> _RowDivergence:
    """The job as the library takes it: addresses and numbers."""
    return _RowDivergence(
        n=job.n,
        vocab=job.vocab,
        objective=OBJECTIVES.index(job.objective),
        student=_side(job.student),
        teacher=_side(job.teacher),
        parameter0=job.parameter0.data_ptr(),
        parameter1=job.parameter1.data_ptr(),
        labels=_address(job.labels),
        soft_weight=job.soft_weight.data_ptr(),
        hard_weight=job.hard_weight.data_ptr(),
        statistics=job.statistics.data_ptr(),
        terms=job.terms.data_ptr(),
        entropies=job.entropies,
    )


def row_divergence(job: RowJob, phases: int) -> None:
    """:func:`kd_kernels.reference.row_divergence` in CUDA, on the current stream; row-major only."""
    device = job.statistics.device
    stream = torch.cuda.current_stream(device).cuda_stream
    text = ctypes.create_string_buffer(512)
    with torch.cuda.device(device):
        done = _library().kd_cuda_row_divergence(
            ctypes.byref(arguments(job)), phases, torch.cuda.current_device(), stream, text, len(text)
        )
    if not done:
        raise RuntimeError(f"the CUDA row kernel was not launched: {text.value.decode()}")
