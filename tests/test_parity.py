"""Loss and gradients against float64, at most twice the error of plain torch in the same dtype."""

import pytest
import torch
from cases import DTYPES, OBJECTIVES, OPTIONS, SHAPING, SOURCES, Batch, batch_for
from plain import compare
from watch import chunks

import kd_kernels as kd

IDS = {"ids": lambda x: x.name if isinstance(x, kd.Objective) else str(x).replace("torch.", "")}


def compare_in_chunks(batch, student, teacher, objective, backend, **options):
    """Of at least three chunks, the last one ragged, where a model has a head and the tokens are enough."""
    counted = torch.ones(batch.lead, dtype=torch.bool)
    if "labels" in options:
        counted &= options["labels"] != -100
    if "mask" in options:
        counted &= options["mask"]
    tokens = int(counted.sum())
    heads = [source for source in (student, teacher) if isinstance(source, kd.Head)]
    # Of 16 bits the logits take 4 bytes and their gradient 2, else one lies over the other.
    apart = 4 if "logits_dtype" not in options else 0
    sizes = [x.hidden.itemsize + (apart if x.hidden.itemsize == 2 else 0) for x in heads]
    size = max((c for c in range(2, tokens) if 2 * c < tokens and tokens % c), default=1)
    vocab = min(student.vocab_size, teacher.vocab_size)
    workspace = int((size + 0.5) * vocab * sum(sizes))  # rows are filled up to whole cache lines
    with chunks() as walks:
        compare(batch, student, teacher, objective, backend, workspace_bytes=workspace, **options)
    if sizes:
        assert walks and all(len(walk) >= 3 or tokens < 3 for walk in walks), walks
        assert all(walk[-1] < walk[0] or size == 1 for walk in walks), walks
    return walks


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("kinds", SOURCES, ids="x".join)
@pytest.mark.parametrize("dtype", DTYPES, **IDS)
def test_sources_and_dtypes(objective, kinds, dtype, backend):
    batch = batch_for(backend)
    student, teacher = (batch.source(side, kind, dtype) for side, kind in zip(("student", "teacher"), kinds))
    walks = compare_in_chunks(batch, student, teacher, objective, backend, **OPTIONS["cross-entropy"](batch))
    assert "head" not in kinds or all(len(walk) >= 3 and walk[-1] < walk[0] for walk in walks)


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kinds", SOURCES, ids="x".join)
def test_options(objective, option, kinds, backend):
    batch = batch_for(backend, seed=1)
    student, teacher = (
        batch.source(side, kind, torch.float32) for side, kind in zip(("student", "teacher"), kinds)
    )
    compare_in_chunks(batch, student, teacher, objective, backend, **OPTIONS[option](batch))


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("shaping", SHAPING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], **IDS)
def test_bias_scale_softcap(objective, shaping, dtype, backend):
    batch = batch_for(backend, seed=2)
    shape = SHAPING[shaping]
    for kinds in SOURCES:
        student, teacher = (
            batch.source(side, kind, dtype, **shape) for side, kind in zip(("student", "teacher"), kinds)
        )
        compare_in_chunks(batch, student, teacher, objective, backend, **OPTIONS["everything"](batch))


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], **IDS)
def test_logits_in_the_input_dtype(objective, dtype, backend):
    batch = batch_for(backend, seed=3)
    student, teacher = (batch.source(side, "head", dtype, bias=True) for side in ("student", "teacher"))
    compare_in_chunks(
        batch, student, teacher, objective, backend, logits_dtype=dtype, **OPTIONS["cross-entropy"](batch)
    )


@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("option", ["plain", "none"])
def test_truncated_vocabulary(objective, option, backend):
    small, large = batch_for(backend, vocab=150), batch_for(backend, vocab=203)
    for kinds in SOURCES:
        for first, second in ((small, large), (large, small)):
            student = first.source("student", kinds[0], torch.float64, bias=True)
            teacher = second.source("teacher", kinds[1], torch.float64, bias=True)
            options = OPTIONS[option](first)
            if "labels" in options:
                options["labels"] = small.labels
            compare_in_chunks(first, student, teacher, objective, backend, vocab="truncate", **options)


def test_token_weights_of_weighted_kl(backend):
    batch = batch_for(backend)
    objective = kd.WeightedKL(batch.weight, batch.temperature)
    for kinds in SOURCES:
        student, teacher = (
            batch.source(side, kind, torch.float64) for side, kind in zip(("student", "teacher"), kinds)
        )
        compare_in_chunks(batch, student, teacher, objective, backend, **OPTIONS["everything"](batch))


@pytest.mark.parametrize("beta", [0, 0.0, 1, 1.0, 0.01, 0.99])
def test_ends_of_jensen_shannon(beta, backend):
    batch = batch_for(backend)
    student, teacher = (batch.source(side, "head", torch.float64) for side in ("student", "teacher"))
    compare(batch, student, teacher, kd.JensenShannon(beta), backend)


@pytest.mark.parametrize("objective", [kd.SkewKL(0.0), kd.SkewReverseKL(0), kd.SkewKL(0.99)], ids=repr)
def test_ends_of_skew(objective, backend):
    batch = batch_for(backend)
    student, teacher = (batch.source(side, "head", torch.float64) for side in ("student", "teacher"))
    compare(batch, student, teacher, objective, backend)


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 64, 65, 1031])
def test_shapes(lead, vocab, backend):
    batch = Batch(lead=lead, vocab=vocab, spread=1.0) if lead else None
    if batch is None:
        batch = Batch(lead=(1,), vocab=vocab, spread=1.0)
        for name in ("student hidden", "teacher hidden"):
            batch.tensors[name] = batch.tensors[name][0]
        batch.upstream = batch.upstream[0]
    student, teacher = (batch.source(side, "head", torch.float64) for side in ("student", "teacher"))
    if vocab == 1:  # one entry: everything is 0, also the gradients
        loss = kd.distill(student, teacher, kd.JensenShannon(), backend=backend, reduction="sum")
        loss.backward()
        assert loss == 0 and student.weight.grad.abs().max() == 0
        return
    compare(batch, student, teacher, kd.JensenShannon(), backend, reduction="sum")


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES, **IDS)
@pytest.mark.parametrize("vocab", [32000, 50257, 128256, 151936, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **IDS)
def test_real_vocabularies(objective, vocab, dtype):
    batch = Batch(lead=(70,), vocab=vocab, student_width=32, teacher_width=48)
    student = batch.source("student", "head", dtype)
    teacher = batch.source("teacher", "head", dtype, grad=False)
    compare(batch, student, teacher, objective, "cpu", workspace_bytes=1 << 26, labels=batch.labels)
