"""The Triton kernels compile for GPUs that are not here, without spilling; what they take is on record."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import triton

from kd_kernels import triton_runtime as runtime
from kd_kernels.objectives import CATALOGUE

TABLE = json.loads(Path(__file__).with_name("triton_resources.json").read_text())
TARGETS = [name for name in TABLE if name != "triton"]
# A kernel may take this many more registers than the table says before the test asks for a look at it.
SLACK = 8
# Bytes a thread that another Triton, with another ptxas, may spill where this one's spills nothing.
OTHERS_SPILLS = 64
INNER_LOOPS = ("pairwise_l1 pair_sums", "pairwise_l1 pair_gradient")
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Entries of the table: dtypes x sizes x (a training step, everything at once), where K counts for several K.
ENTRIES = {
    **dict.fromkeys(CATALOGUE, 16),
    "gather": 40,
    "topk": 72,
    "angle": 4,
    "distance": 5,
    "pairwise_l1": 47,
    "half_step": 8,
    "sinkhorn": 24,
    "scale": 4,
}

pytestmark = pytest.mark.skipif(
    runtime.version() < (3, 3),
    reason="arguments are described to the compiler as Triton takes them since 3.3",
)

# Without TRITON_INTERPRET: a process in which Triton compiles.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
SCRIPT = [sys.executable, str(Path(__file__).with_name("triton_resources.py"))]


@pytest.fixture(scope="module")
def compiled():
    """What tests/triton_resources.py reports."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    with subprocess.Popen([*SCRIPT, "--serve"], **pipes) as process:

        def ask(target: str, kernel: str, quick: bool) -> dict:
            print(json.dumps([target, kernel, quick]), file=process.stdin, flush=True)
            found = json.loads(process.stdout.readline())
            assert "error" not in found, found["error"]
            return found

        yield ask
        process.stdin.close()


def check(target: str, found: dict) -> None:
    on_record = TABLE["triton"] == triton.__version__
    for label, report in found.items():
        assert report["spills"] <= (0 if on_record else OTHERS_SPILLS), (label, report)
        if on_record:
            for key in report.keys() & {"registers", "vgpr_count"}:
                assert report[key] <= TABLE[target][label][key] + SLACK, (label, key, report)
        # Through it numbers go from thread to thread. Inner loops that need none must need none under any
        # version: which layout is taken, where several would do, changes with them.
        if on_record or label.startswith(INNER_LOOPS) and "float32" in label:
            assert report["shared"] <= TABLE[target][label]["shared"], (label, report)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", ENTRIES)
def test_compiles_without_spills(target, kernel, compiled):
    """All of the configurations that a target or a kernel may refuse by itself (is_quick)."""
    found = compiled(target, kernel, True)
    assert 0 < len(found) <= ENTRIES[kernel]
    check(target, found)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", ENTRIES)
def test_all_others_compile_without_spills(target, kernel, compiled):
    check(target, compiled(target, kernel, False))


@pytest.mark.parametrize("registers", [runtime.REGISTERS, runtime.MANY_REGISTERS, runtime.MOST_REGISTERS])
def test_a_block_never_asks_for_more_registers_than_there_are(registers):
    """Or the compiler is content and the launch fails: seen with 16 warps of 160."""
    for num_warps in (1, 2, 4, 8, 16, 32):
        most = runtime.options(num_warps, hip=False, registers=registers)["maxnreg"]
        assert most <= registers and most * 32 * num_warps <= 65536


def test_what_is_compiled_at_once_has_every_kernel_dtype_and_size_for_every_target():
    listed = subprocess.run([*SCRIPT, "--list"], capture_output=True, text=True, env=ENVIRONMENT)
    assert listed.returncode == 0, listed.stderr[-2000:]
    quick = json.loads(listed.stdout)
    every = [label for labels in quick.values() for label in labels]
    assert set(every) == set().union(*(TABLE[target] for target in TARGETS))  # each somewhere
    for target, labels in quick.items():
        rows = [label.split() for label in labels if label.split()[0] in CATALOGUE]
        kinds = {tuple(row[1:]) for row in rows}
        assert {kind[:2] for kind in kinds} == set(product(DTYPES, ("small", "large")))
        for objective in CATALOGUE:
            own = [row[1:] for row in rows if row[0] == objective]
            assert {row[0] for row in own} == set(DTYPES) and {row[1] for row in own} == {"small", "large"}
        others = {label for label in TABLE[target] if label.split()[0] not in CATALOGUE}
        assert {x for x in others if x.endswith("everything")} <= set(labels)


def test_the_table_is_whole():
    assert all(len(TABLE[target]) == sum(ENTRIES.values()) for target in TARGETS)
    assert {"sm_80", "sm_90", "sm_100", "gfx942"} == set(TARGETS)
    assert all(report["spills"] == 0 for target in TARGETS for report in TABLE[target].values())


@pytest.mark.parametrize("wide", [False, True])
def test_configurations_depend_on_the_class_of_a_vocabulary_only(wide):
    chosen = {v: runtime.configuration(v, wide) for v in (1, 1000, 4096, 4097, 32000, 128256, 2**20)}
    assert len(set(chosen.values())) == 2
    assert chosen[32000] == chosen[128256] == chosen[2**20]
