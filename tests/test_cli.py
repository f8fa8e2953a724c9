"""``python -m kd_kernels``: each command as a user runs it, its predictions, its errors and exit codes."""

import functools
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cases import FLOOR

from kd_kernels import backends, cli
from kd_kernels.cli import memory, plan, selftest
from kd_kernels.cli.workload import Case, Inputs, kd_step
from kd_kernels.drivers import chunked_head, chunks
from kd_kernels.drivers.sides import HeadSide

ROOT = Path(__file__).resolve().parent.parent
# As a user has it: no interpreted Triton, which the other tests ask for.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
TINY = ["--tokens", "48", "--vocab", "384", "--student", "32", "--teacher", "48"]


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "kd_kernels", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        **options,
    )


def run(*arguments, cwd):
    process = command(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    return json.loads(out) if "--json" in arguments else out


@pytest.fixture
def main(monkeypatch):
    """The command line in this process, with its hands off this process's signals."""
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return cli.main


def test_info(tmp_path):
    found = run("info", "--json", cwd=tmp_path)
    assert found["torch"] == torch.__version__ and found["threads"] == 1
    assert found["devices"][0]["device"] == "cpu"
    offers = found["devices"][0]["backends"]["row_divergence"]
    assert offers["cpu"] == offers["reference"] == []
    assert offers["cuda"], "an unavailable backend has reasons"
    assert set(found["float32_logits"]) == {"bfloat16", "float16"}


# --- selftest -----------------------------------------------------------------------------------------


def test_selftest(tmp_path):
    found = run("selftest", "--device", "cpu", "--json", cwd=tmp_path)
    assert found["passed"] and found["seconds"] < 60
    checks = found["checks"]
    for key, wanted in (
        ("backend", {"cpu", "reference"}),
        ("objective", set(selftest.CATALOGUE)),
        ("dtype", set(selftest.DTYPES)),
        ("sources", set(selftest.SOURCES)),
        ("reduction", {"mean", "none"}),
    ):
        assert {check[key] for check in checks if check["op"] == "row_divergence"} == wanted
    assert {check["op"] for check in checks} == set(selftest.CHECKS)
    assert len(checks) == 2 * sum(count for _, count in selftest.CHECKS.values())
    assert all(0 < check["error"] <= 1 for check in checks)


def test_every_op_has_a_selftest():
    assert set(selftest.CHECKS) == set(backends.TABLE)
    assert selftest.FLOOR == FLOOR, "the floors of the tests are those of the self-test"


@pytest.mark.parametrize("broken", ["statistics", "raises"])
def test_selftest_fails_where_a_kernel_is_wrong(broken, main, monkeypatch, capsys):
    right, objections = backends.TABLE["row_divergence"]["cpu"]

    def kernel(job, phases):
        if broken == "raises":
            raise RuntimeError("out of order")
        right(job, phases)
        job.terms *= 1.0001

    monkeypatch.setitem(backends.TABLE["row_divergence"], "cpu", (kernel, objections))
    monkeypatch.setattr(selftest, "DTYPES", {"fp32": torch.float32})
    monkeypatch.setattr(selftest, "CATALOGUE", {"skew_kl": selftest.CATALOGUE["skew_kl"]})
    assert main(["selftest", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "10 of them failed" in out  # two of them from the sparse teacher, which uses it
    assert ("loss is" if broken == "statistics" else "RuntimeError: out of order") in out


# --- bench --------------------------------------------------------------------------------------------


def test_bench(tmp_path):
    found = run("bench", *TINY, "--rounds", "2", "--objective", "skew_kl", "--json", cwd=tmp_path)
    assert found["agrees"] and set(found["errors"]) == {"loss", "d_hidden", "d_weight"}
    assert list(found["ways"]) == ["floor", "torch", "kd"]
    for name, row in found["ways"].items():
        seconds = row["seconds"]
        assert len(seconds["samples"]) == 2
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
        assert row["times_floor"]["median"] > 0
        assert name == "floor" or row["memory"]["peak_bytes"] >= 0


def test_bench_text(main, capsys):
    arguments = ["--rounds", "1", "--dtype", "bf16", "--frozen-head", "--no-memory"]
    assert main(["bench", *TINY, *arguments]) == 0
    out = capsys.readouterr().out
    for word in ("bare products", "plain torch", "kd.distill", "head frozen", "bf16"):
        assert word in out
    assert "d weight" not in out and "torch.compile" not in out


@pytest.mark.slow
def test_bench_compiled(tmp_path):
    found = run("bench", *TINY, "--rounds", "1", "--compile", "--json", cwd=tmp_path)
    assert found["ways"]["torch.compile"]["memory"]["peak_bytes"] > 0


def test_bench_plot(tmp_path):
    process = command("bench", *TINY, "--rounds", "1", "--no-memory", "--plot", "out.png", cwd=tmp_path)
    out, err = process.communicate(timeout=240)
    if find_spec("matplotlib") is None:
        assert process.returncode == 2 and "--plot needs matplotlib" in err and not out
    else:
        assert process.returncode == 0, err
        assert (tmp_path / "out.png").stat().st_size > 1000


def test_bench_refuses_to_time_what_is_wrong(main, monkeypatch, capsys):
    monkeypatch.setattr(cli.bench, "kd_step", lambda case, inputs: 1.01 * kd_step(case, inputs))
    assert main(["bench", *TINY]) == 1
    out = capsys.readouterr().out
    assert "NOT EQUAL" in out and "median" not in out


def test_bench_weighs_itself_against_the_machine(main, monkeypatch, capsys):
    """The bound is what inputs, products and the larger step need together, to the byte."""
    shape = case(tokens=48, vocab=384, student=32, teacher=48, workspace_bytes=None)
    inputs = 4 * (48 + 384) * (32 + 48)
    products = 4 * (2 * 48 * 384 + (48 + 384) * 32)
    found = plan.predict(shape)
    needed = inputs + products + max(found[way]["peak_bytes"] for way in ("plain", "kd"))
    monkeypatch.setattr(cli.bench, "measure", lambda *args: {"agrees": True})
    monkeypatch.setattr(cli.bench, "memory_of", lambda device: needed)
    assert main(["bench", *TINY, "--json"]) == 0
    monkeypatch.setattr(cli.bench, "memory_of", lambda device: needed - 1)
    with pytest.raises(SystemExit) as exit:
        main(["bench", *TINY, "--json"])
    assert exit.value.code == 2 and "need 0.0 GiB, and cpu has 0.0" in capsys.readouterr().err


# --- plan ---------------------------------------------------------------------------------------------


def case(**changes) -> Case:
    """Some 64 MiB of logits a model, cut into several chunks."""
    shape = dict(tokens=1000, vocab=16_000, student=256, teacher=160, dtype="fp32", objective="forward_kl")
    return Case(**{**shape, "device": "cpu", "workspace_bytes": 24 << 20, **changes})


def test_plan(tmp_path, main, capsys):
    shape = ["--tokens", "8192", "--vocab", "151936", "--student", "2048", "--teacher", "4096"]
    found = run("plan", *shape, "--dtype", "bf16", "--json", cwd=tmp_path)
    products = 2 * 8192 * 151936
    assert found["plain"]["flops"] == found["kd"]["flops"] == products * (3 * 2048 + 4096)
    assert found["plain"]["logits_bytes"] == 8192 * 151936 * 2
    ours = found["kd"]
    assert ours["workspace_bytes"] <= chunks.CPU_WORKSPACE
    assert (ours["chunks"] - 1) * ours["chunk_rows"] < 8192 <= ours["chunks"] * ours["chunk_rows"]
    assert ours["peak_bytes"] < found["plain"]["peak_bytes"] / 3
    assert main(["plan", *shape, "--dtype", "bf16", "--frozen-head", "--json"]) == 0
    frozen = json.loads(capsys.readouterr().out)
    assert frozen["plain"]["flops"] == frozen["kd"]["flops"] == products * (2 * 2048 + 4096)
    saved = 151936 * 2048 * (4 + 2)  # the accumulator and the gradient of the head
    assert 0 <= ours["peak_bytes"] - frozen["kd"]["peak_bytes"] - saved <= 16 << 20
    assert main(["plan", *shape]) == 0
    text = capsys.readouterr().out
    assert "chunks of" in text and "TFLOP" in text


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize("workspace", [None, 3 << 20, 5_000_001], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_plan_cuts_as_the_walk_does(dtype, workspace, frozen, monkeypatch):
    shape = case(tokens=203, vocab=1024, student=16, dtype=dtype, workspace_bytes=workspace)
    shape = Case(**{**vars(shape), "frozen_head": frozen})
    predicted = plan.predict(shape)["kd"]
    borrowed, chunks = [], []
    borrow, project = chunked_head.borrow, HeadSide.project
    monkeypatch.setattr(
        chunked_head, "borrow", lambda size, device: (borrowed.append(size), borrow(size, device))[1]
    )
    monkeypatch.setattr(
        HeadSide,
        "project",
        lambda self, start, stop, *rest: (
            chunks.append(stop - start),
            project(self, start, stop, *rest),
        )[1],
    )
    kd_step(shape, Inputs.of(shape))
    # Once: a second buffer would stand beside what still refers to the first.
    assert borrowed == [predicted["workspace_bytes"]]
    assert max(chunks) == predicted["chunk_rows"] and len(chunks) == 2 * predicted["chunks"]


@pytest.mark.parametrize(
    ("way", "changes"),
    [
        ("kd", {}),
        ("kd", {"dtype": "bf16"}),
        ("kd", {"backend": "reference", "tokens": 200, "workspace_bytes": 8 << 20}),
        ("torch", {"dtype": "bf16"}),
        ("torch", {"objective": "jensen_shannon"}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values())) or "default",
)
def test_plan_predicts_the_peak(way, changes, monkeypatch):
    """Within 4% and 4 MiB of what a fresh process measures; one more matrix of logits would be 61 MiB."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shape = case(**changes)
    predicted = plan.predict(shape)["kd" if way == "kd" else "plain"]["peak_bytes"]
    measured = memory.in_subprocess(way, shape)
    assert abs(predicted - measured["peak_bytes"]) <= 0.04 * measured["peak_bytes"] + (4 << 20), (
        f"predicted {predicted / 2**20:.1f} MiB, measured {measured['peak_bytes'] / 2**20:.1f}"
    )


# --- errors -------------------------------------------------------------------------------------------

PLAN = ["plan", *TINY]
ERRORS = {
    "no command": ([], "required: command"),
    "unknown command": (["tune"], "invalid choice: 'tune'"),
    "missing arguments": (["plan", "--tokens", "8"], "required: --vocab, --student, --teacher"),
    "zero tokens": ([*PLAN, "--tokens", "0"], "--tokens: must be a positive integer, got '0'"),
    "not a number": ([*PLAN, "--vocab", "32k"], "--vocab: must be a positive integer, got '32k'"),
    "dtype": ([*PLAN, "--dtype", "int8"], "invalid choice: 'int8'"),
    "objective": ([*PLAN, "--objective", "kl"], "invalid choice: 'kl'"),
    "device": ([*PLAN, "--device", "tpu"], "--device: must be cpu, cuda or cuda:<index>, got 'tpu'"),
    "workspace": ([*PLAN, "--workspace-bytes", "8"], "workspace_bytes=8 holds less than one row"),
    "bench workspace": (["bench", *TINY, "--workspace-bytes", "8"], "workspace_bytes=8 holds less than"),
    "backend name": ([*PLAN, "--backend", "cudnn"], "--backend must be one of cpu, triton, cuda, reference"),
    "backend absent": (["bench", *TINY, "--backend", "cuda"], "--backend cuda: row_divergence on cpu"),
    "device absent": (["bench", *TINY, "--device", "cuda:99"], "torch sees"),
    "selftest device": (["selftest", "--device", "cuda:99"], "torch sees"),
    "bench memory": (["bench", "--tokens", "1000000000000"], "give fewer --tokens or a smaller --vocab"),
    "bench beyond": (["bench", "--tokens", "9" * 12, "--vocab", "9" * 12], "beyond any address space"),
    "plan beyond": (
        [*PLAN, "--tokens", "9" * 12, "--vocab", "9" * 12, "--workspace-bytes", "9" * 12],
        "beyond any address space",
    ),
    "plot folder": (["bench", *TINY, "--plot", "/nowhere/x.png"], "--plot"),
    "plot suffix": (["bench", *TINY, "--plot", "x.nonsense"], "--plot"),
    "absurd": (
        ["plan", "--tokens", "9" * 20, "--vocab", "8", "--student", "8", "--teacher", "8"],
        "--tokens",
    ),
}


@pytest.mark.parametrize("wrong", ERRORS)
def test_wrong_usage(wrong, main, capsys):
    arguments, words = ERRORS[wrong]
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and words in captured.err and "usage:" in captured.err
    assert not captured.out


def test_plan_for_a_device_that_is_not_here(main, capsys):
    assert main([*PLAN, "--device", "cuda", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["case"]["dtype"] == "bf16" and found["backend"] == "triton"


def test_broken_pipe_is_quiet(tmp_path):
    process = command("info", cwd=tmp_path)
    process.stdout.close()  # the reader is gone before anything is written
    process.stdout = None
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGPIPE and err == ""


def test_interrupt_is_quiet_and_progress_shows(tmp_path):
    shape = ["--tokens", "256", "--vocab", "8000", "--student", "64", "--teacher", "64"]
    # A shell that starts the tests in the background has them ignore interrupts, which is inherited.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = command("bench", *shape, "--rounds", "100000", cwd=tmp_path, preexec_fn=heed)
    first = process.stderr.readline()  # from two seconds on
    assert first.startswith("bench: ") and "of 300005, " in first, first
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
