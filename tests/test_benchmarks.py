"""The benchmarks run, and the README's table is what the committed result files give."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quick_run():
    out = run("benchmarks/run.py", "--quick", "--only", "jensen_shannon", "--dtype", "fp32", "--no-memory")
    assert "kd" in out and "floor" in out


def test_readme_table_is_generated():
    run("benchmarks/table.py", "--check")


def test_gpu_check_says_that_there_is_no_gpu(tmp_path):
    """Without a device it proves nothing, says so and fails; its cases are there."""
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here: run benchmarks/gpu_check.py itself")
    command = [sys.executable, "benchmarks/gpu_check.py", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "no CUDA device" in done.stderr
    import gpu_check

    cases = [what for what, _ in gpu_check.measurements(tmp_path, "cuda")]
    assert (
        len(cases)
        == len(set(cases))
        == sum(len(o) for _, o in gpu_check.HEAD_CASES) + len(gpu_check.ROW_CASES)
    )


def test_a_wrong_result_is_not_timed():
    """NaN in a later result is an error, too: Python's max passes over it."""
    from contest import contest, errors, graded

    exact = (torch.ones(2), torch.ones(3))
    steps = {
        "kd": lambda: (torch.ones(2), torch.ones(3)),
        "torch": lambda: (torch.ones(2), torch.full((3,), torch.nan)),
        "peer": lambda: (torch.full((2,), 1.1), torch.ones(3)),
    }
    rows = contest(
        {}, steps, lambda _, found: graded(errors(found, exact), 1e-3),
        yardstick="floor", floor=lambda: None, rounds=1, reject=False,
    )  # fmt: skip
    assert {row["provider"]: row["status"] for row in rows} == {
        "floor": "ok", "kd": "ok", "torch": "wrong", "peer": "wrong"
    }  # fmt: skip
    assert [row["provider"] for row in rows if "seconds" in row] == ["floor", "kd"]
