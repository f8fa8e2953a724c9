"""The CUDA library as it is built and loaded, without a GPU.

What its kernels compute is proved by csrc/tests/test_cuda_row_divergence.cpp, where threads of the host run
their code, and by tests/test_gpu*.py where there is a GPU.
"""

import ctypes
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from cuda_resources import TABLE, compiled, cuobjdump, instructions

import kd_kernels as kd
from kd_kernels import backends, native, native_cuda
from kd_kernels.objectives import CATALOGUE

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = native_cuda.LIBRARY
built = pytest.mark.skipif(
    not LIBRARY.exists(), reason=f"{LIBRARY.name} was not built here: no nvcc, or KD_KERNELS_CUDA=off"
)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
RECORDED = json.loads(TABLE.read_text())
TARGETS = ("sm_80", "sm_90", "sm_100")
STORAGES = ("Float32", "Bfloat16", "Float16", "Mixed", "Wide")
SLACK = 8  # registers that a kernel may take beyond the table before the test asks for a look at it


def release() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return text.partition("release ")[2].partition(",")[0]


def check_against_the_table(found: dict) -> None:
    for target, kernels in found.items():
        assert kernels.keys() == RECORDED[target].keys()
        for label, report in kernels.items():
            assert report["spills"] == 0, (target, label, report)
            assert report["blocks"] >= 1, (target, label, report)
            if RECORDED["nvcc"] == release():
                assert report["registers"] <= RECORDED[target][label]["registers"] + SLACK, (target, label)


def test_the_table_is_whole():
    assert set(RECORDED) == {"nvcc", *TARGETS}
    for target in TARGETS:
        reread = {f"{o} {s} {d} reread" for o in _functors() for s in STORAGES for d in ("student", "both")}
        held = {name.replace("reread", "held") for name in reread if "Wide" not in name}
        assert set(RECORDED[target]) == reread | held
        assert all(report["spills"] == 0 and report["blocks"] >= 1 for report in RECORDED[target].values())


def _functors() -> list[str]:
    return [cls.__name__ for cls in CATALOGUE.values()]


@built
def test_what_the_compiler_made_is_on_record():
    found = compiled(LIBRARY)
    assert found and set(found) <= set(TARGETS)
    check_against_the_table(found)


@built
def test_loads_are_128_bit():
    """Rows that are read again: from global memory. Held ones: by copies, then from shared memory."""
    target = max(compiled(LIBRARY), key=lambda name: int(name[3:]))
    for storage in ("Float32", "Bfloat16"):
        reread = instructions(LIBRARY, target, f"JensenShannon {storage} student reread")
        # Three walks over the student's row and the teacher's, the next group read before this one is used.
        assert reread["LDG.E.128"] >= 10, reread
        assert not any(name.startswith(("LDL", "STL", "RED", "ATOM")) for name in reread), reread
        if target == "sm_80":
            continue
        held = instructions(LIBRARY, target, f"JensenShannon {storage} student held")
        asynchronous = sum(
            count for name, count in held.items() if name.startswith("LDGSTS") and "128" in name
        )
        assert asynchronous >= 2 and held["LDS.128"] >= 5, held
        assert not any(name.startswith(("LDL", "STL", "RED", "ATOM")) for name in held), held


@built
def test_exports_what_is_bound_and_links_no_runtime():
    listed = subprocess.run(["nm", "-D", "--defined-only", str(LIBRARY)], capture_output=True, text=True)
    assert {line.split()[-1] for line in listed.stdout.splitlines()} == set(native_cuda.FUNCTIONS)
    linked = subprocess.run(["ldd", str(LIBRARY)], capture_output=True, text=True).stdout
    assert not any(name in linked for name in ("cudart", "libcuda", "torch", "c10")), linked


def test_names_and_structures_are_those_of_the_cpu_kernels():
    assert native_cuda.OBJECTIVES == tuple(native.module().objectives) == tuple(CATALOGUE)


@built
def test_a_job_arrives_as_it_was_sent():
    """The structure's size is compared on loading; each of its fields holds what it should."""
    job = _job()
    sent = native_cuda.arguments(job)
    assert (sent.n, sent.vocab, sent.objective) == (2, 5, 2) and sent.entropies
    for name in ("parameter0", "parameter1", "labels", "soft_weight", "hard_weight", "statistics", "terms"):
        assert getattr(sent, name) == getattr(job, name).data_ptr()
    for side, rows in ((sent.student, job.student), (sent.teacher, job.teacher)):
        assert (side.scale, side.softcap) == (rows.scale, rows.softcap)
        assert side.logits == rows.logits.data_ptr() and side.offsets == rows.offsets.data_ptr()
        assert side.temperature == rows.temperature.data_ptr()
    assert (sent.student.dtype, sent.teacher.dtype, sent.student.grad_dtype) == (0, 1, 2)
    assert sent.student.grad == job.student.grad.data_ptr() and not sent.teacher.grad
    assert {f.name for f in fields(job)} == {name for name, _ in sent._fields_} - {"threads"}
    bare = native_cuda.arguments(replace(job, labels=None))
    assert not bare.labels


def _job():
    from kd_kernels.rows import RowJob, Rows

    def wide(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.float64)

    offsets = torch.arange(2) * 5
    student = Rows(torch.zeros(10), offsets, wide(2), 0.5, 3.0, torch.zeros(10).half(), offsets)
    teacher = Rows(torch.zeros(10).bfloat16(), offsets, wide(2), 0.7)
    labels = torch.zeros(2, dtype=torch.int64)
    numbers = [wide(2), wide(2)], [wide(2), wide(2), wide(2, 10), wide(2, 4)]
    return RowJob("jensen_shannon", 2, 5, student, teacher, *numbers[0], labels, *numbers[1], True)


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="a driver is here")
def test_without_a_driver_the_refusal_holds_its_words():
    words = native_cuda.driver_words(0)
    assert words and "cudaGetDeviceCount" in words and "CUDA" in words
    with pytest.raises(kd.BackendUnavailable, match="cudaGetDeviceCount.*driver"):
        kd.distill(torch.randn(2, 5), torch.randn(2, 5), kd.ForwardKL(), backend="cuda")
    text = ctypes.create_string_buffer(512)
    sent = native_cuda.arguments(_job())
    assert not native_cuda._library().kd_cuda_row_divergence(ctypes.byref(sent), 7, 0, 0, text, len(text))
    assert b"driver" in text.value


def test_where_it_was_not_built_the_refusal_says_how(monkeypatch, tmp_path):
    monkeypatch.setattr(native_cuda, "LIBRARY", tmp_path / "libkd_kernels_cuda.so")
    native_cuda._load.cache_clear()
    try:
        with pytest.raises(kd.BackendUnavailable, match="is absent.*nvcc"):
            kd.distill(torch.randn(2, 5), torch.randn(2, 5), kd.ForwardKL(), backend="cuda")
        (tmp_path / "libkd_kernels_cuda.so").write_bytes(b"no library")
        native_cuda._load.cache_clear()
        with pytest.raises(kd.BackendUnavailable, match="cannot be loaded"):
            kd.distill(torch.randn(2, 5), torch.randn(2, 5), kd.ForwardKL(), backend="cuda")
    finally:
        native_cuda._load.cache_clear()


def test_it_is_never_chosen_unasked(monkeypatch):
    """Not even where it could serve: no GPU has run it yet."""
    able = {name: (lambda job, phases: None, lambda device: []) for name in ("cuda", "reference")}
    monkeypatch.setitem(backends.TABLE, "row_divergence", able)
    device = torch.device("cuda")
    assert backends.pick("row_divergence", device, None)[0] == "reference"
    assert backends.pick("row_divergence", device, "cuda")[0] == "cuda"


def test_info_says_what_it_is(capsys):
    from kd_kernels.cli import info

    info.show(info.collect())
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("cuda "))
    assert "slower than Triton" in line


# cmake and ninja stand beside the interpreter, which need not be on the path.
SEARCH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def cmake(*arguments: str, path: str = SEARCH) -> subprocess.CompletedProcess:
    command = [shutil.which("cmake", path=path) or "cmake", *arguments]
    environment = {**os.environ, "PATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def configure(tmp_path: Path, *options: str, path: str = SEARCH) -> subprocess.CompletedProcess:
    where = ("-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja")
    return cmake(*where, "-DKD_KERNELS_PYTHON=OFF", *options, path=path)


def test_left_out_with_a_reason(tmp_path):
    off = configure(tmp_path / "off", "-DKD_KERNELS_CUDA=off")
    assert off.returncode == 0 and "CUDA kernels left out: KD_KERNELS_CUDA=off" in off.stdout
    odd = configure(tmp_path / "off", "-DKD_KERNELS_CUDA=maybe")
    assert odd.returncode != 0 and "must be auto, on or off, got 'maybe'" in odd.stderr
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in ("cmake", "ninja", "c++", "cc", "g++", "gcc", "as", "ld", "ar", "make", "uname"):
        if found := shutil.which(tool, path=SEARCH):
            (bare / tool).symlink_to(found)
    none = configure(tmp_path / "none", "-DKD_KERNELS_CUDA=on", "-DCMAKE_CUDA_COMPILER=", path=str(bare))
    assert none.returncode != 0 and "no working nvcc was found" in none.stderr


@needs_nvcc
def test_architectures_with_a_letter_bring_no_ptx(tmp_path):
    """sm_90a runs on nothing newer; PTX of the newest of the others goes with them."""
    done = configure(tmp_path, "-DKD_KERNELS_CUDA=on", "-DKD_KERNELS_CUDA_ARCHS=80;90a")
    assert done.returncode == 0, done.stderr
    asked = set(re.findall(r"arch=(\w+),code=\[?([\w,]+)", (tmp_path / "build.ninja").read_text()))
    assert asked == {("compute_80", "sm_80"), ("compute_90a", "sm_90a"), ("compute_80", "compute_80")}


@pytest.mark.slow
@needs_nvcc
def test_a_wheel_holds_the_library(tmp_path):
    """Of sm_90a alone, in a minute or two."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    environment = {**os.environ, "KD_KERNELS_CUDA": "on", "KD_KERNELS_CUDA_ARCHS": "90a", "PATH": SEARCH}
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        library = held.extract(f"kd_kernels/{LIBRARY.name}", tmp_path)
    assert set(compiled(Path(library))) == {"sm_90a"}


@pytest.mark.slow
@needs_nvcc
def test_the_default_set_compiles_without_a_warning(tmp_path):
    """sm_80, sm_90, sm_100 and PTX; a warning or a spilled register is an error. Takes minutes."""
    done = configure(tmp_path, "-DKD_KERNELS_CUDA=on", "-DKD_KERNELS_CUDA_STRICT=ON")
    assert done.returncode == 0, done.stderr
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = cmake("--build", str(tmp_path), "--target", "kd_kernels_cuda")
    assert done.returncode == 0, done.stdout[-3000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert took < 2 * 360, "six minutes on two cores are what a build may take"
    (library,) = tmp_path.rglob(LIBRARY.name)
    found = compiled(library)
    assert set(found) == set(TARGETS)
    check_against_the_table(found)
    assert "sm_100" in cuobjdump("-lptx", str(library))
