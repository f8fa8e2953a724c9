"""The gibbs and half_step kernels, of transport with one cost for all, on every backend, against float64."""

import pytest
import torch
from cases import error

from kd_kernels import problems as P
from kd_kernels import triton_transport
from kd_kernels.backends import TABLE

SIDES = pytest.mark.parametrize("transposed", [False, True])


def step(backend, kernel, x, weight, transposed, divide, extra=None):
    out = torch.full_like(weight, torch.nan)
    TABLE["half_step"][backend][0](P.HalfStepJob(kernel, x, weight, out, transposed, divide, extra))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("n, m", [(1, 1), (7, 130), (300, 9)])
def test_gibbs(n, m, turned, dtype, backend):
    def matrix(values):
        wide = torch.full((m, n + 3) if turned else (n, m + 3), -99.0, dtype=dtype)
        inner = wide[:, :n].t() if turned else wide[:, :m]
        return inner.copy_(values)

    cost = 3 * torch.rand(n, m, dtype=torch.float64).to(dtype) + 1
    if n > 1:
        cost[1, 2], cost[3] = torch.inf, torch.inf
    kernel, weighted = matrix(0), matrix(0)
    shift, reach = (torch.full((n,), torch.nan, dtype=dtype) for _ in range(2))
    TABLE["gibbs"][backend][0](P.GibbsJob(matrix(cost), 0.3, shift, reach, kernel, weighted))
    wide = cost.double()
    least = torch.where(wide.amin(1) < torch.inf, wide.amin(1), 0.0)
    exact = ((least[:, None] - wide) / 0.3).exp()
    bar = 1e-13 if dtype == torch.float64 else 2e-6
    assert torch.equal(shift, least.to(dtype))
    assert error(reach, (wide.masked_fill(wide == torch.inf, -torch.inf).amax(1) - least).clamp(min=0)) < bar
    assert error(kernel, exact) < bar
    assert error(weighted, torch.where(exact == 0, 0.0, exact * wide)) < bar


def drawn(count, n, m, transposed, dtype=torch.float64):
    """A kernel in wider rows, x, weight, and what is added; no two sizes of factors alike."""
    inner, outer = (n, m) if transposed else (m, n)
    kernel = (torch.rand(n, m + 5, dtype=torch.float64) + 0.1)[:, :m]
    x, weight = (s * (torch.rand(count, k, dtype=torch.float64) + 0.1) for s, k in ((2, inner), (3, outer)))
    extra = 0.3 * inner * torch.rand(outer, dtype=torch.float64)
    kernel, x, weight, extra = (t.to(dtype) for t in (kernel, x, weight, extra))
    return kernel, x, weight, extra


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@SIDES
@pytest.mark.parametrize("count, n, m", [(1, 1, 1), (3, 33, 70), (17, 5, 129), (65, 8, 9)])
def test_against_float64(count, n, m, transposed, dtype, backend):
    kernel, x, weight, extra = drawn(count, n, m, transposed, dtype)
    wide = kernel.double() if transposed else kernel.double().t()
    sums = x.double() @ wide
    bar = 1e-13 if dtype == torch.float64 else 1e-6
    for divide, added, wanted in (
        (False, None, weight.double() * sums),
        (True, None, weight.double() / sums),
        (True, extra, weight.double() / (sums + extra.double())),
    ):
        assert error(step(backend, kernel, x, weight, transposed, divide, added), wanted) < bar


@SIDES
def test_nothing_by_nothing(transposed, backend):
    kernel, x, weight, _ = drawn(3, 5, 5, transposed)
    x[1] = weight[0, 2] = 0.0
    x[2, 3] = torch.nan
    found = step(backend, kernel, x, weight, transposed, True)
    assert (found[0] == 0).tolist() == [False, False, True, False, False]
    assert (found[1] == 0).all() and found[2].isnan().all()


def test_results_do_not_depend_on_threads(backend):
    if backend != "cpu":
        pytest.skip("only the compiled part promises it")
    for transposed in (False, True):
        inputs = drawn(19, 70, 90, transposed, torch.float32)[:3]
        before = torch.get_num_threads()
        try:
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(step(backend, *inputs, transposed, True))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(found[0], x) for x in found[1:])


@SIDES
def test_a_triton_without_products_of_float64(transposed, monkeypatch):
    monkeypatch.setattr(triton_transport, "version", lambda: (3, 4))
    monkeypatch.setattr(triton_transport, "kernels", lambda: pytest.fail("went to the kernel"))
    kernel, x, weight, _ = drawn(3, 5, 7, transposed)
    wanted = step("reference", kernel, x, weight, transposed, True)
    assert torch.equal(step("triton", kernel, x, weight, transposed, True), wanted)
