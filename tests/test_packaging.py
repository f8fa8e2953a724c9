"""What is shipped: the wheel's contents, and the command a user asks first."""

import os
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_info():
    run = subprocess.run(
        [sys.executable, "-m", "kd_kernels", "info"], capture_output=True, text=True, cwd="/"
    )
    assert run.returncode == 0, run.stderr
    for word in ("kd_kernels", "torch", "threads", "native", "row_divergence", "reference"):
        assert word in run.stdout
    assert "cuda       " in run.stdout, "an unavailable backend is listed with its reason"


def test_what_is_installed_after_torch_leaves_it_as_it_is():
    code = "import make_env, sys; print(*make_env.constraints_of_torch(sys.executable), sep='\\n')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "scripts")
    itself, *triton = run.stdout.splitlines()
    torch = distribution("torch")
    assert itself == f"torch=={torch.version}", run.stderr
    assert len(triton) == (0 if any(x.startswith("triton") for x in torch.requires) else 1)


def test_native_part_links_one_openmp_and_no_torch():
    from kd_kernels import native

    listed = subprocess.run(["ldd", native.module().__file__], capture_output=True, text=True).stdout
    assert "libgomp.so.1" in listed
    assert "libtorch" not in listed and "libc10" not in listed  # the addresses hold any letters up to f


def test_without_the_native_part(monkeypatch):
    """Unnamed: the reference serves, and says once that it is slow and why. Named: an error."""
    import torch

    import kd_kernels as kd
    from kd_kernels import backends, native

    monkeypatch.setattr(native, "_load", lambda: (None, "not here"))
    backends._warn_once.cache_clear()
    logits = torch.randn(2, 3, 5)
    with pytest.warns(RuntimeWarning, match="plain-torch reference, which is slow.*not here"):
        kd.distill(*logits, kd.ForwardKL())
    with pytest.raises(kd.BackendUnavailable, match="cpu: not here"):
        kd.distill(*logits, kd.ForwardKL(), backend="cpu")


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_instruction_sets_agree(isa):
    """The same call under a lowered instruction set, in a fresh process."""
    code = """
import sys, torch, kd_kernels as kd
from kd_kernels import native
from kd_kernels.reference import dense_distill
torch.manual_seed(0)
for objective in (kd.ForwardKL(), kd.JensenShannon(0.3), kd.SkewKL(0.1), kd.TotalVariation()):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        s, t = (torch.randn(2, 37, 517) * 3).to(dtype)
        options = {"labels": torch.arange(37), "hard_weight": 0.3}
        ours = kd.distill(s, t, objective, backend="cpu", **options)
        exact = dense_distill(kd.Logits(s.double()), kd.Logits(t.double()), objective, **options)
        assert abs(ours - exact) < 2e-6 * exact, (objective, dtype, ours, exact)
print(native.module().instruction_set())
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "KD_KERNELS_ISA": isa},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in (isa, "baseline")


@pytest.mark.slow
def test_wheel_from_an_isolated_build(tmp_path):
    """No torch at build time; the wheel holds the package, the compiled part and nothing at top level."""
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"kd_kernels"}
    assert any(name.startswith("kd_kernels/_native") for name in names)
    assert "kd_kernels/py.typed" in names
