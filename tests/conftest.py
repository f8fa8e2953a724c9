import os

import pytest
import torch

# Read when the Triton kernels are imported. Without a GPU they are interpreted, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kd_kernels import native  # noqa: E402
from kd_kernels.drivers.workspace import release_workspace  # noqa: E402

# One thread in each of the parallel test processes: two busy pools on two cores only wait for each other.
# Tests about threads set their own number.
torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", getattr(metafunc.module, "BACKENDS", ["cpu", "reference", "triton"]))


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
def _patch_each_module_once():
    """Triton's interpreter patches its whole language again at every call of a device function, which takes
    most of its time. While a kernel runs, once for each module is enough."""
    # now, as some tests change the variable
    from kd_kernels.triton_kernels import (  # noqa: F401
        angle,
        gather,
        pairwise_l1,
        row_divergence,
        sinkhorn,
        topk,
    )
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:  # another Triton: only slower
        yield
        return
    patched: set[int] = set()

    def once(function):
        module = id(function.__globals__)
        if module in patched:
            return None
        outermost = not patched
        patched.add(module)
        scope = patch(function)
        if outermost and scope is not None:
            restore = scope.restore

            def end() -> None:
                patched.clear()
                restore()

            scope.restore = end
        return scope

    interpreter._patch_lang = once
    yield
    interpreter._patch_lang = patch
