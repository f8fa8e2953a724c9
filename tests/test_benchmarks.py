"""The benchmarks run, and the README's table is what the committed result files give."""

import subprocess
import sys
from pathlib import Path

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
