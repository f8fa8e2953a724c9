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
# Entries of the table: dtypes x sizes x (a training step, everything at once); of two kernels for several K.
ENTRIES = {
    **dict.fromkeys(CATALOGUE, 16),
    "gather": 40,
    "topk": 40,
    "angle": 4,
    "pairwise_l1": 47,
    "sinkhorn": 24,
    "scale": 4,
}


def compiled(target: str, kernel: str) -> dict:
    """What tests/triton_resources.py reports, from a process in which Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = str(Path(__file__).with_name("triton_resources.py"))
    command = [sys.executable, script, target, "--kernel", kernel]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", ENTRIES)
def test_compiles_without_spills(target, kernel):
    found = compiled(target, kernel)
    assert len(found) == ENTRIES[kernel]
    for label, report in found.items():
        assert report["spills"] == 0, (label, report)
        if TABLE["triton"] == triton.__version__:
            for key in report.keys() & {"registers", "vgpr_count"}:
                assert report[key] <= TABLE[target][label][key] + SLACK, (label, key, report)


def test_the_table_is_whole():
    assert all(len(TABLE[target]) == sum(ENTRIES.values()) for target in TARGETS)
    assert {"sm_80", "sm_90", "sm_100", "gfx942"} == set(TARGETS)
    assert all(report["spills"] == 0 for target in TARGETS for report in TABLE[target].values())


@pytest.mark.parametrize("wide", [False, True])
def test_configurations_depend_on_the_class_of_a_vocabulary_only(wide):
    chosen = {v: runtime.configuration(v, wide) for v in (1, 1000, 4096, 4097, 32000, 128256, 2**20)}
    assert len(set(chosen.values())) == 2
    assert chosen[32000] == chosen[128256] == chosen[2**20]
