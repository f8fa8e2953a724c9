"""The scale kernel, interpreted; what a CPU does instead is tested through the ops' gradients."""

import pytest
import torch
from cases import DTYPES

from kd_kernels import triton_runtime
from kd_kernels.drivers.scale import scaled


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("shape", [(0, 5), (1,), (3, 7), (5, 1000)], ids=str)
def test_the_kernel(dtype, shape):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for source in (torch.randn(shape, dtype=wide), torch.randn(shape, dtype=dtype)):
        kept = source.clone()
        factor = torch.tensor(-0.375, dtype=torch.float64)
        out = torch.empty(shape, dtype=dtype)
        triton_runtime.scale(source, factor, out)
        want = (source.double() * factor).to(dtype)
        # the interpreter cuts a bfloat16 off where a GPU rounds it
        bound = 0 if dtype in (torch.float64, torch.float32) else 2 * torch.finfo(dtype).eps
        assert torch.allclose(out.double(), want.double(), rtol=bound, atol=0)
        assert torch.equal(source, kept)


def test_on_a_cpu():
    """Several slabs; the stored gradient stays as it was."""
    source = torch.randn(3000, 3000)
    kept, factor = source.clone(), torch.tensor(3.0, dtype=torch.float64)
    assert torch.equal(scaled(source, factor, torch.bfloat16), (3.0 * kept).bfloat16())
    assert torch.equal(scaled(source, factor, torch.float32), 3.0 * kept)
    assert torch.equal(source, kept)
