"""What one ``kd.distill`` call costs when there is nothing to compute (pytest-benchmark).

Run by ``make bench`` readers who wonder about the checks, the dispatcher and the autograd node:
``pytest benchmarks/test_overhead.py``. Nothing is asserted about time; shared machines are too noisy.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from providers import ours, plain_torch
from workloads import DTYPES, Objective, Shape, make_inputs

pytest.importorskip("pytest_benchmark")
TINY = Shape(4, 32, 8, 8)
FORWARD_KL = Objective("forward_kl")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    # Waking a second thread costs more than the arithmetic of these sizes.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("step", [ours, plain_torch], ids=["kd", "torch"])
def test_forward_and_backward(benchmark: Any, step: Any, dtype: str) -> None:
    if step is ours:
        pytest.importorskip("kd_kernels")
    inputs = make_inputs(TINY, DTYPES[dtype])

    def once() -> torch.Tensor:
        inputs.clear_gradients()
        return step(inputs, FORWARD_KL)

    assert torch.isfinite(benchmark(once))
