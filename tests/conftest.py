import pytest
import torch

from kd_kernels import native
from kd_kernels.drivers.workspace import release_workspace

# One thread in each of the parallel test processes: two busy pools on two cores only wait for each other.
# Tests about threads set their own number.
torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["cpu", "reference"])


@pytest.fixture(autouse=True)
def _native_is_there(request):
    """The compiled part is what this suite proves: without it, fail rather than skip."""
    assert native.why_not() is None, native.why_not()


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill every torch.empty with NaN, so that an element nobody writes shows."""
    release_workspace()
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
