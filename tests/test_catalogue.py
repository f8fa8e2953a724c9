"""Completeness: every divergence has all its parts; and every argument of the call matters."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from cases import OBJECTIVES, OPTIONS, SHAPING, Batch, error

import kd_kernels as kd
from kd_kernels import native
from kd_kernels.objectives import CATALOGUE
from kd_kernels.reference.row_divergence import ELEMENTS

ROOT = Path(__file__).resolve().parent.parent


def names_in(path: str, pattern: str) -> set[str]:
    file = ROOT / path
    return set(re.findall(pattern, file.read_text())) if file.exists() else set()


def test_every_divergence_has_all_its_parts():
    assert set(ELEMENTS) == set(CATALOGUE), "kd_kernels/reference/row_divergence.py"
    assert list(native.module().objectives) == list(CATALOGUE), "csrc/row_divergence.h, enum Objective"
    camel = {"".join(part.capitalize() for part in name.split("_")): name for name in CATALOGUE}
    functors = {name.replace("KL", "Kl") for name in names_in("csrc/objectives.h", r"struct (\w+)")}
    assert {camel[name] for name in camel if name in functors} == set(CATALOGUE), "csrc/objectives.h"
    path = "triton_kernels/objectives.py"
    assert set(CATALOGUE) <= names_in(path, r"def (\w+)\("), path
    assert set(CATALOGUE) <= names_in(path, r'OBJECTIVE == "(\w+)"'), f"{path}, evaluate"
    documented = (ROOT / "README.md").read_text()
    for cls in CATALOGUE.values():
        assert f"`{cls.__name__}" in documented, f"README.md does not list {cls.__name__}"
        assert cls.__doc__ and "Source:" in cls.__doc__
        assert cls.formula and cls.source
    assert {o.name for o in OBJECTIVES} == set(CATALOGUE), "tests/cases.py"


def test_public_names_are_documented():
    for name in kd.__all__:
        thing = getattr(kd, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, name
    options = set(inspect.signature(kd.distill).parameters)
    documented = set(re.findall(r"^    (\w+):", inspect.getdoc(kd.distill), re.M))
    assert options <= documented, options - documented


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_every_argument_matters(objective):
    """Leaving any one argument out moves the loss far beyond every tolerance of this suite."""
    batch = Batch()

    def loss(shape, options, drop=None):
        shape = {k: v for k, v in shape.items() if k != drop}
        sources = [batch.source(side, "head", torch.float64, **shape) for side in ("student", "teacher")]
        options = {k: v for k, v in options.items() if k != drop}
        if drop == "labels":
            options.pop("hard_weight", None)
        return kd.distill(*sources, objective, **options).sum()

    shape, options = SHAPING["all"], OPTIONS["everything"](batch)
    whole = loss(shape, options)
    for name in (*shape, *options):
        assert error(loss(shape, options, drop=name), whole) > 5e-3, name


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("part", ["bias", "scale", "softcap"])
def test_each_side_has_its_own_shaping(side, part):
    batch = Batch()

    def loss(**change):
        shapes = {name: dict(SHAPING["all"]) for name in ("student", "teacher")}
        shapes[side].update(change)
        sources = [batch.source(name, "head", torch.float64, **shapes[name]) for name in shapes]
        return kd.distill(*sources, kd.ForwardKL())

    change = {"bias": {"bias": False}, "scale": {"scale": 0.7}, "softcap": {"softcap": None}}[part]
    assert error(loss(**change), loss()) > 1e-2


def test_objective_parameters_matter():
    batch = Batch()
    sources = [batch.source(side, "head", torch.float64) for side in ("student", "teacher")]
    for a, b in (
        (kd.JensenShannon(0.3), kd.JensenShannon(0.5)),
        (kd.SkewKL(0.1), kd.SkewKL(0.2)),
        (kd.SkewReverseKL(0.1), kd.SkewReverseKL(0.2)),
        (kd.WeightedKL(1.0, 0.5), kd.WeightedKL(1.0, 0.7)),
        (kd.WeightedKL(1.0, 0.5), kd.WeightedKL(0.8, 0.5)),
    ):
        assert error(kd.distill(*sources, a), kd.distill(*sources, b)) > 1e-2
