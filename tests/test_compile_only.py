"""The Triton kernels compile for GPUs that are not here, without spilling; what they take is on record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from kd_kernels import triton_runtime as runtime
from kd_kernels.objectives import CATALOGUE

TABLE = json.loads(Path(__file__).with_name("triton_resources.json").read_text())
TARGETS = [name for name in TABLE if name != "triton"]
# A kernel may take this many more registers than the table says before the test asks for a look at it.
SLACK = 8


def compiled(target: str, *objectives: str) -> dict:
    """What tests/triton_resources.py reports, from a process in which Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("triton_resources.py")), target]
    for objective in objectives:
        command += ["--objective", objective]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("objective", CATALOGUE)
def test_compiles_without_spills(target, objective):
    found = compiled(target, objective)
    assert len(found) == 16  # dtypes x sizes x (a training step, everything at once)
    for kernel, report in found.items():
        assert report["spills"] == 0, (kernel, report)
        if TABLE["triton"] == triton.__version__:
            for key in report.keys() & {"registers", "vgpr_count"}:
                assert report[key] <= TABLE[target][kernel][key] + SLACK, (kernel, key, report)


def test_the_table_is_whole():
    assert all(len(TABLE[target]) == 16 * len(CATALOGUE) for target in TARGETS)
    assert {"sm_80", "sm_90", "sm_100", "gfx942"} == set(TARGETS)
    assert all(report["spills"] == 0 for target in TARGETS for report in TABLE[target].values())


@pytest.mark.parametrize("wide", [False, True])
def test_configurations_depend_on_the_class_of_a_vocabulary_only(wide):
    chosen = {v: runtime.configuration(v, wide) for v in (1, 1000, 4096, 4097, 32000, 128256, 2**20)}
    assert len(set(chosen.values())) == 2
    assert chosen[32000] == chosen[128256] == chosen[2**20]
