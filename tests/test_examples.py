"""The loop examples: each equal to its trainer's own dense path, lighter, and able to say otherwise."""

import difflib
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch

import kd_kernels as kd

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# example -> what it needs beside torch
LOOPS = {
    "plain_loop": ["transformers"],
    "hf_trainer": ["transformers", "accelerate"],
    "trl_gkd": ["trl", "datasets"],
    "lora_frozen_head": ["transformers", "peft"],
    "teacher_process": ["transformers"],
    "mixed_precision": ["transformers"],
}


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def module(name):
        for package in LOOPS[name]:
            pytest.importorskip(package, reason=f"examples/{name}.py is about {package}")
        return importlib.import_module(name)

    return module


def with_options(monkeypatch, change):
    """Let the examples call ``kd.distill`` with options changed."""
    right = kd.distill

    def distill(*sources, **options):
        change(options)
        return right(*sources, **options)

    monkeypatch.setattr(kd, "distill", distill)


@pytest.mark.parametrize("name", LOOPS)
def test_equal_and_lighter(name, load, capsys):
    code = load(name).main(["--tiny"])
    out = capsys.readouterr().out
    assert code == 0, out
    dense, ours = map(float, re.search(r"peak above inputs, MiB +([\d.]+) +([\d.]+)", out).groups())
    assert ours < 0.8 * dense, out
    assert len(re.findall(r"^loss of step", out, re.M)) >= 1


@pytest.mark.parametrize("name", ["plain_loop"])
def test_a_wrong_loss_shows(name, load, monkeypatch, capsys):
    module = load(name)
    with_options(monkeypatch, lambda options: options.update(temperature=2.002))
    assert module.main(["--tiny"]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hf_trainer", "mixed_precision"])
def test_a_wrong_denominator_shows(name, load, monkeypatch, capsys):
    module = load(name)
    with_options(monkeypatch, lambda options: options.pop("num_items"))
    assert module.main(["--tiny"]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out


def test_the_trainers_mixed_precision_reaches_the_loss(load, monkeypatch, capsys):
    module = load("hf_trainer")
    seen = []
    with_options(monkeypatch, lambda options: seen.append(torch.is_autocast_enabled("cpu")))
    code = module.main(["--tiny", "--bf16"])
    assert code == 0, capsys.readouterr().out
    assert seen and all(seen)


def test_ten_lines_changed(load):
    """The two loops of the plain example differ in ten added lines, all of them the loss."""
    module = load("plain_loop")
    bodies = []
    for function in (module.train_dense, module.train):
        source = textwrap.dedent(inspect.getsource(function))
        bodies.append(source[source.index("optimizer =") :].splitlines())
    diff = list(difflib.unified_diff(*bodies, lineterm="", n=0))[2:]
    added = [line for line in diff if line.startswith("+")]
    assert 0 < len(added) <= 10, "\n".join(diff)
    assert sum(line.startswith("@@") for line in diff) <= 2, "\n".join(diff)


def test_a_lost_teacher_is_reported(load):
    module = load("teacher_process")
    data = module.batches(module.TINY, 2, 0)
    with module.TeacherProcess(module.TINY, 0) as served:
        wrong = [{**data[0], "input_ids": data[0]["input_ids"] + module.TINY.vocab}]
        with pytest.raises(RuntimeError, match="the teacher's process failed: .*Error"):
            list(served.hidden_states(wrong))
        served.process.join(10)
        with pytest.raises(RuntimeError, match="the teacher.s process ended"):
            list(served.hidden_states(data))
    assert not served.process.is_alive()


def test_student_learns_from_a_cache_alone(monkeypatch, capsys, tmp_path):
    """And a second run finds every sequence there."""
    pytest.importorskip("pyarrow", reason="examples/cached_teacher.py is about teacher caches")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("cached_teacher")
    text = EXAMPLES / "tiny_lm.py"
    assert module.main([str(text), "--out", str(tmp_path), "--tiny"]) == 0, capsys.readouterr().out
    assert kd.TeacherCache.open(tmp_path).tokens == text.stat().st_size
    assert module.main([str(text), "--out", str(tmp_path), "--tiny"]) == 0
    assert "cached 0 sequences" in capsys.readouterr().out
