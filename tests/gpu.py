"""Marks of tests that want a GPU."""

import pytest
import torch

from kd_kernels import native_cuda

wants_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none"),
]
wants_cuda_kernels = pytest.mark.skipif(
    torch.cuda.is_available() and bool(native_cuda.why_not(torch.device("cuda"))),
    reason="the CUDA kernels cannot serve here: python -m kd_kernels info says why",
)
