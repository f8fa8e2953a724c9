"""The benchmarks run, and the tables of README and RESULTS.md are what the committed result files give."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
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


def test_committed_tables_are_generated():
    run("benchmarks/table.py", "--check")


def test_a_table_that_differs_is_noticed(tmp_path, monkeypatch, capsys):
    import table

    for name, path in (("README", table.README), ("PAGE", table.PAGE)):
        with monkeypatch.context() as patch:
            changed = tmp_path / path.name
            changed.write_text(path.read_text().replace("| fp32 | ", "| fp64 | ", 1))
            patch.setattr(table, "ROOT", tmp_path / "benchmarks")
            patch.setattr(table, name, changed)
            assert table.main(["--check"]) == 1 and path.name in capsys.readouterr().err
            table.main([])
            assert changed.read_text() == path.read_text()


def test_gpu_check_says_that_there_is_no_gpu(tmp_path):
    """Without a device it proves nothing, says so and fails; its cases are there."""
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here: run benchmarks/gpu_check.py itself")
    command = [sys.executable, "benchmarks/gpu_check.py", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "no CUDA device" in done.stderr


def test_gpu_check_runs_every_test_that_is_marked_for_it(tmp_path, monkeypatch):
    import gpu_check

    asked = []
    monkeypatch.setattr(gpu_check, "within", lambda seconds, command, **_: asked.extend(command))
    gpu_check.tests(tmp_path / "log", 1.0)
    texts = {x: x.read_text() for x in (ROOT / "tests").glob("test_*.py") if x.name != Path(__file__).name}
    marked = [x for x, text in texts.items() if "mark.gpu" in text or "wants_gpu" in text]
    assert marked and {str(x) for x in marked} <= set(asked)


def test_gpu_measurements_run_and_are_shown(tmp_path):
    """What a GPU runs once in a while must not fail by a name: all of it, at toy sizes, on the CPU; then its
    rows as those of a GPU, each shape under a heading of its own and with its promises."""
    import gpu_check
    import table
    from record import Writer, read
    from workloads import GPU_HEAD, GPU_ROWS, QUICK

    rows_toy = {"shape": QUICK, "compiling": False}
    toys = {"rows": rows_toy, "head": {**rows_toy, "memory_for": ()}}
    seen = Counter()
    for one in gpu_check.MEASUREMENTS:
        seen[one.name] += 1
        if seen[one.name] > 1:
            continue
        rows = one.run(tmp_path, rounds=2, threads=1, reject=False, **toys.get(one.name, {"sizes": "quick"}))
        assert {row["status"] for row in rows} <= {"ok", "absent", "not offered"}, rows
        assert any(row["provider"] == "kd" and "seconds" in row for row in rows)
        assert len(gpu_check.text(one.name, rows).splitlines()) > len(rows)
    labels = [one.what for one in gpu_check.MEASUREMENTS]
    assert len(labels) == len(set(labels)) > len(GPU_HEAD) + len(GPU_ROWS)

    (head,) = tmp_path.glob("*/head.jsonl")
    gpu = {"slug": "cuda-a-gpu", "name": "A GPU", "gpu": "driver 1, 1980 MHz"}
    for shape, _ in (GPU_HEAD[0], GPU_HEAD[3]):
        for row in read(head):
            if row["provider"] in ("floor", "kd", "torch"):
                peak = {
                    "above_inputs": 3 << 30,
                    "above_gradients": 2 << 30,
                    "workspace": 1 << 30,
                    "device": "cuda",
                }
                changed = {"case": {**row["case"], **vars(shape)}, "case_id": shape.label, "machine": gpu}
                writer = Writer("head", tmp_path / "gpu")
                writer.path = tmp_path / "gpu" / gpu["slug"] / "head.jsonl"
                writer.kept = {(r["case_id"], r["provider"]): r for r in read(writer.path)}
                writer.keep({**row, **changed, **({"peak": peak} if row["provider"] == "kd" else {})})
    section = table.readme_section(tmp_path / "gpu")
    assert "A GPU, driver 1, 1980 MHz; " in section
    assert section.count("One step, forward and backward: 8192 tokens, V = 128256") == 1
    assert section.count("One step, forward and backward: 1024 tokens, V = 128256") == 1
    assert "FAIL floor <= 1.2<br>" in section and "FAIL floor <= 1.5<br>" in section
    assert section.count("FAIL memory <= 1056 MiB") == 2


def test_gpu_check_goes_on_where_a_section_fails(tmp_path, monkeypatch, capsys):
    """All that wants a GPU taken out: what is left out says why, and what was measured is shown."""
    import bench_head
    import gpu_check
    from workloads import QUICK

    def fails(*_, **__):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "build", lambda log: None)
    monkeypatch.setattr(gpu_check, "tests", lambda log, seconds: "exit 0: all")
    toy = {"shape": QUICK, "dtypes": ("fp32",), "only": ("forward_kl",), "provider_names": ("kd",)}
    toy |= {"memory_for": (), "compiling": False, "rounds": 2, "threads": 1, "reject": False}
    one = gpu_check.Measurement("head", "head", lambda out, **_: bench_head.run(out, **toy))
    monkeypatch.setattr(
        gpu_check, "MEASUREMENTS", (one, replace(one, what="lost", run=fails), replace(one, seconds=1e9))
    )
    for name, check in (
        ("gpu_profile", fails),
        ("gpu_cuda", lambda *_: {"failed": []}),
        ("gpu_counters", fails),
    ):
        monkeypatch.setattr(getattr(gpu_check, name), "check", check)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path)])
    assert gpu_check.main() == 0
    shown, summary = capsys.readouterr().out, json.loads((tmp_path / "summary.json").read_text())
    assert "forward KL" in shown and "48 x 384" in shown
    assert summary["left out"] == ["lost: RuntimeError: out of memory", "head: no time left"]
    assert summary["profile"] == {"failed": "RuntimeError: out of memory"}
    monkeypatch.setattr(gpu_check.gpu_cuda, "check", fails)
    assert gpu_check.main() == 1


NCU = """#!/bin/sh
echo '==PROF== Connected to process 1'
echo '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
for kernel in 1 2; do
  echo '"0","row_kernel","dram__bytes_read.sum","byte","1,313,341,440"'
  echo '"0","row_kernel","dram__bytes_write.sum","byte","262,668,288"'
done
"""


def test_counted_bytes_are_over_the_least(tmp_path, monkeypatch):
    """Of all kernels of a step, by what ncu prints; without ncu, or where it counts nothing, the reason."""
    import gpu_counters

    monkeypatch.setenv("PATH", str(tmp_path))
    assert "left out" in gpu_counters.check(tmp_path, lambda: 99.0)
    for text, status in ((NCU, 0), (NCU.split("for")[0], 0), (NCU + "exit 3", 3)):
        (tmp_path / "ncu").write_text(text)
        (tmp_path / "ncu").chmod(0o755)
        found = gpu_counters.check(tmp_path, lambda: 99.0)
        assert list(found) == ["cuda", "triton"]
        if text == NCU:
            assert found["cuda"] == {"dram__bytes_read.sum": 1.25, "dram__bytes_write.sum": 1.0}
        else:
            assert found["triton"] == f"not counted: exit {status}, see counters_triton.log"


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
