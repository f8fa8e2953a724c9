import os
from collections import defaultdict
from contextlib import nullcontext
from itertools import combinations

import pytest
import torch

# Read when the Triton kernels are imported. Without a GPU they are interpreted, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import interpreter  # noqa: E402

from kd_kernels import native, triton_runtime  # noqa: E402
from kd_kernels.drivers.workspace import release_workspace  # noqa: E402

# One thread in each of the parallel test processes: two busy pools on two cores only wait for each other.
# Tests about threads set their own number.
torch.set_num_threads(1)

PROVED = 3, 5  # the oldest Triton that the kernels' tests ask for


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", getattr(metafunc.module, "BACKENDS", ["cpu", "reference", "triton"]))


@pytest.hookimpl(tryfirst=True)  # before "not slow" leaves any out
def pytest_collection_modifyitems(items):
    """Of an interpreted test, the cases that add no pair of parameters are slow; the other backends' and
    ``make test-all`` have every combination."""
    if triton_runtime.version() < PROVED:
        found = triton_runtime.version()
        reason = f"Triton {found} is older than {PROVED}: its interpreter aborts on some kernels"
        for item in filter(interpreted, items):
            item.add_marker(pytest.mark.skip(reason=reason))
    tests = defaultdict(list)
    for item in items:
        if interpreted(item) and not item.get_closest_marker("slow"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        values = [{name: id(x) for name, x in item.callspec.params.items()} for item in cases]
        for item in left_out_by_pairs(cases, values):
            item.add_marker(pytest.mark.slow)


def interpreted(item) -> bool:
    given = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(isinstance(x, str) and x == "triton" for x in given)


def left_out_by_pairs(cases: list, parameters: list[dict[str, int]]) -> list:
    """What a greedy choice leaves out that still holds every pair of values of any two parameters."""
    pairs = [set(combinations(sorted(each.items()), min(2, len(each)))) for each in parameters]
    missing, out = set().union(*pairs), dict(enumerate(cases))
    while missing:
        best = max(out, key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        del out[best]
    return list(out.values())


@pytest.fixture(autouse=True)
def _native_is_there(request):
    """The compiled part is what this suite proves: without it, fail rather than skip."""
    if not request.node.get_closest_marker("gpu"):
        assert native.why_not() is None, native.why_not()


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill every torch.empty with NaN, so that an element nobody writes shows."""
    release_workspace()
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter():
    # now, as some tests change the variable
    from kd_kernels.triton_kernels import (  # noqa: F401
        angle,
        distance,
        gather,
        half_step,
        pairwise_l1,
        row_divergence,
        sinkhorn,
        topk,
    )

    with interpreter.quick() if os.environ.get("TRITON_INTERPRET") == "1" else nullcontext():
        yield
