# ruff: noqa: E501  (the table of refusals: one case a line)
"""compat.torchtune, .automodel and .modelopt against the formulas those libraries publish.

None of the three is installed for the tests. Each oracle below is the library's own arithmetic, written
plainly; its source is named beside it.
"""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import Batch
from compat_check import assert_same, leaves

from kd_kernels.compat import automodel, modelopt, torchtune

DTYPES = [torch.float32, torch.bfloat16]


def logits(lead=(3, 8), **options):
    batch = Batch(lead=lead, **options)
    return batch, [batch.tensors["student logits"], batch.tensors["teacher logits"]]


def wide(x):
    """At least float32: what ``dtype=torch.float32`` does in the originals, letting float64 through."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- torchtune: torchtune/modules/loss/kd_losses.py (0.5, 0.6) -------------------------------------------


def torchtune_forward(student, teacher):
    return -(F.softmax(wide(teacher.detach()), -1) * F.log_softmax(wide(student), -1)).sum(-1)


def torchtune_reverse(student, teacher):
    log_q = F.log_softmax(wide(student), -1)
    return -(log_q.exp() * (F.log_softmax(wide(teacher.detach()), -1) - log_q)).sum(-1)


def torchtune_symmetric(ratio):
    return lambda s, t: ratio * torchtune_forward(s, t) + (1 - ratio) * torchtune_reverse(s, t)


TORCHTUNE = {
    "forward": (torchtune.ForwardKLLoss, torchtune.ForwardKLWithChunkedOutputLoss, {}, torchtune_forward),
    "reverse": (torchtune.ReverseKLLoss, torchtune.ReverseKLWithChunkedOutputLoss, {}, torchtune_reverse),
    **{
        f"symmetric {ratio}": (
            torchtune.SymmetricKLLoss,
            torchtune.SymmetricKLWithChunkedOutputLoss,
            {"sym_kd_ratio": ratio},
            torchtune_symmetric(ratio),
        )
        for ratio in (0.0, 0.3, 1.0)
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", TORCHTUNE)
def test_torchtune_flat(kind, normalize, dtype):
    batch, tensors = logits(lead=(15,))
    flat, _, options, formula = TORCHTUNE[kind]
    labels = torch.where(batch.labels == -100, 7, batch.labels)
    labels[::3] = -1
    loss = flat(ignore_index=-1, **options)

    def theirs(student, teacher):
        total = formula(student, teacher)[labels != -1].sum()
        return total / (labels != -1).sum() if normalize else total

    assert_same(lambda s, t: loss(s, t, labels, normalize=normalize), theirs, tensors, dtype)
    assert_same(lambda s, t: loss(s, t, labels.view(3, 5), normalize), theirs, tensors, dtype)


@pytest.mark.parametrize("kind", TORCHTUNE)
@pytest.mark.parametrize("split", [torch.tensor_split, torch.chunk], ids=["tensor_split", "chunk"])
def test_torchtune_chunks(kind, split):
    batch, tensors = logits(lead=(3, 8))
    _, chunked, options, formula = TORCHTUNE[kind]
    loss = chunked(3, **options)
    assert loss.apply_compile_strategy(backend="inductor") is loss

    def ours(student, teacher):
        return loss(list(split(student, 3, 1)), list(split(teacher, 3, 1)), batch.labels)

    def theirs(student, teacher):
        return formula(student, teacher)[batch.labels != -100].sum() / (batch.labels != -100).sum()

    assert_same(ours, theirs, tensors, torch.float32)


def test_torchtune_without_a_token():
    _, tensors = logits(lead=(4,))
    student, teacher = leaves(tensors, torch.float32)
    for flat, chunked, options, _ in TORCHTUNE.values():
        labels = torch.full((4,), -100)
        for loss in (
            flat(**options)(student, teacher, labels),
            chunked(1, **options)([student[None]], [teacher[None]], labels[None]),
        ):
            assert loss == 0
            assert torch.autograd.grad(loss, student)[0].abs().sum() == 0


def test_torchtune_infinite_logits_differ_as_documented():
    """torchtune drops the terms of infinite student logits from the sum; here they are probability 0."""
    _, tensors = logits(lead=(4,))
    student, teacher = leaves(tensors, torch.float32)
    labels = torch.arange(4)
    student.data[1, 5] = -torch.inf
    assert torchtune.ForwardKLLoss()(student, teacher, labels) == torch.inf
    teacher.data[1, 5] = -torch.inf  # banned for both: nothing lost
    loss = torchtune.ForwardKLLoss()(student, teacher, labels)
    keep = [i for i in range(203) if i != 5]
    assert torch.isclose(loss[None], torch.stack([
        torchtune_forward(student[:1], teacher[:1])[0],
        torchtune_forward(student[1:2, keep], teacher[1:2, keep])[0],
        *torchtune_forward(student[2:], teacher[2:]),
    ]).mean()[None]).all()  # fmt: skip


# --- NeMo Automodel: nemo_automodel/components/loss/kd_loss.py (0.7) -------------------------------------


def automodel_formula(labels, ignore_index, temperature, num_batch_labels):
    def loss(student, teacher):
        student, teacher = (
            wide(x).reshape(-1, x.shape[-1])[labels.view(-1) != ignore_index] * (1 / temperature)
            for x in (student, teacher.detach())
        )
        log_p, log_q = F.log_softmax(teacher, -1), F.log_softmax(student, -1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2
        return kl.mean() if num_batch_labels is None else kl.sum() / num_batch_labels

    return loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("num_batch_labels", [None, 41])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_automodel(ignore_index, num_batch_labels, temperature, dtype):
    batch, tensors = logits()
    labels = torch.where(batch.labels == -100, ignore_index, batch.labels)
    assert (labels == ignore_index).any()
    loss = automodel.KDLoss(ignore_index, temperature, True)
    assert_same(
        lambda s, t: loss(s, t, labels, num_batch_labels),
        automodel_formula(labels, ignore_index, temperature, num_batch_labels),
        tensors,
        dtype,
    )
    flat = [x.flatten(0, 1) for x in tensors]
    assert_same(
        lambda s, t: automodel.KDLoss(ignore_index, temperature, chunk_size=2)(
            s, t, labels, num_batch_labels
        ),
        automodel_formula(labels, ignore_index, temperature, num_batch_labels),
        flat,
        dtype,
    )


def test_automodel_without_a_token():
    batch, tensors = logits()
    student, teacher = leaves(tensors, torch.float32)
    student.data[0, 0] = torch.nan
    loss = automodel.KDLoss()(student, teacher, torch.full_like(batch.labels, -100))
    assert loss == 0 and torch.autograd.grad(loss, student)[0].abs().sum() == 0


# --- ModelOpt: modelopt/torch/distill/{losses.py, plugins/*.py} (0.47) ----------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tuples", [False, True])
def test_modelopt_megatron(tuples, reverse, temperature, dtype):
    _, tensors = logits(lead=(8, 3))  # [s, b, V]
    config = SimpleNamespace(tensor_model_parallel_size=1)
    loss = modelopt.LogitsKLLoss(config, temperature, reverse)
    weight = torch.rand(3, 8)

    def ours(student, teacher):
        if tuples:
            student, teacher = (student, None), (teacher, None)
        per_token, tp_reduce, is_sequence_parallel = loss(student, teacher)
        assert per_token.shape == (3, 8) and tp_reduce is True and is_sequence_parallel is False
        return (per_token * weight).sum()

    def theirs(student, teacher):
        p = F.log_softmax(wide(student) / temperature, -1)
        q = F.log_softmax(wide(teacher.detach()) / temperature, -1)
        if reverse:
            p, q = q, p
        per_token = F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
        return (per_token.transpose(0, 1) * weight).sum()

    assert_same(ours, theirs, tensors, dtype)


def modelopt_hf(temperature, reduction):
    def loss(student, teacher):
        log_q = F.log_softmax(student / temperature, -1)
        p = F.softmax(teacher / temperature, -1)
        terms = F.kl_div(log_q, p.detach(), reduction="none") * temperature**2
        return {
            "mean": lambda: terms.mean(),
            "batchmean": lambda: terms.sum() / terms.shape[0],
            "sum": lambda: terms.sum(),
            "none": lambda: terms.sum(-1),
        }[reduction]()

    return loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("lead", [(3, 8), (24,)], ids=str)
def test_modelopt_logits_distillation(lead, reduction, temperature, dtype):
    _, tensors = logits(lead)
    loss = modelopt.LogitsDistillationLoss(temperature, reduction)
    assert_same(loss, modelopt_hf(temperature, reduction), tensors, dtype)


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modelopt_trainer(dtype, with_labels):
    """``KDTrainer._standard_kd_loss``."""
    batch, tensors = logits()
    labels = batch.labels if with_labels else None

    def theirs(student, teacher):
        per_token = modelopt_hf(2.0, "none")(wide(student[..., :-1, :]), wide(teacher[..., :-1, :]))
        if labels is None:
            return per_token.mean()
        mask = labels[..., 1:] != -100
        return (per_token * mask).sum() / mask.sum().clamp(min=1)

    assert_same(lambda s, t: modelopt.standard_kd_loss(s, t, labels, 2.0), theirs, tensors, dtype)


def test_modelopt_trainer_takes_heads():
    batch = Batch()
    heads = [batch.source(side, "head", torch.float32) for side in ("student", "teacher")]
    dense = [x.hidden @ x.weight.T for x in heads]
    for labels in (None, batch.labels):
        a, b = (modelopt.standard_kd_loss(*x, labels, 2.0) for x in (heads, dense))
        assert torch.isclose(a, b, rtol=1e-5)


# --- refusals --------------------------------------------------------------------------------------------


class DTensor(torch.Tensor):
    """Stands for torch's, which needs a process group."""


SHARDED = torch.randn(3, 9).as_subclass(DTensor)
Z, LABELS = torch.randn(3, 9), torch.tensor([1, 2, 8])
TWO_RANKS = SimpleNamespace(tensor_model_parallel_size=2)

REFUSED = {
    "torchtune ratio": (lambda: torchtune.SymmetricKLLoss(1.5), ValueError, r"sym_kd_ratio must be in \[0, 1\]"),
    "torchtune ratio, chunks": (lambda: torchtune.SymmetricKLWithChunkedOutputLoss(8, -0.1), ValueError, "sym_kd_ratio"),
    "torchtune chunk count": (lambda: torchtune.ForwardKLWithChunkedOutputLoss(2)([Z[None]], [Z[None]], LABELS[None]), ValueError, "num_output_chunks=2, but student_logits has 1"),
    "torchtune chunk length": (lambda: torchtune.ForwardKLWithChunkedOutputLoss(1)([Z[None]], [Z[None]], LABELS[None, :2]), ValueError, "3 positions and labels 2"),
    "torchtune chunks": (lambda: torchtune.ForwardKLLoss()([Z], [Z], LABELS), TypeError, "student_logits must be a tensor .*got list; chunks go"),
    "torchtune no chunks": (lambda: torchtune.ForwardKLWithChunkedOutputLoss(2)(Z, [Z], LABELS), TypeError, "student_logits must be a list of chunks"),
    "torchtune vocabularies": (lambda: torchtune.ReverseKLLoss()(Z, torch.randn(3, 11), LABELS), ValueError, "9 vocabulary entries and teacher 11"),
    "automodel tp_group": (lambda: automodel.KDLoss(tp_group=object()), ValueError, "tp_group must be None"),
    "automodel student DTensor": (lambda: automodel.KDLoss()(SHARDED, Z, LABELS), TypeError, "values is a DTensor"),
    "automodel teacher DTensor": (lambda: automodel.KDLoss()(Z, SHARDED, LABELS), TypeError, "values is a DTensor"),
    "automodel temperature": (lambda: automodel.KDLoss(temperature=0.0)(Z, Z, LABELS), ValueError, "temperature must be"),
    "modelopt tensor parallel": (lambda: modelopt.LogitsKLLoss(TWO_RANKS), ValueError, "tensor_model_parallel_size is 2"),
    "modelopt DTensor": (lambda: modelopt.LogitsKLLoss(None)(SHARDED[None], Z[None]), TypeError, "values is a DTensor"),
    "modelopt teacher's tuple": (lambda: modelopt.LogitsKLLoss(None)(Z[None], (Z[None], None)), TypeError, "predictions is a Tensor and targets a tuple; give both"),
    "modelopt student's tuple": (lambda: modelopt.LogitsKLLoss(None)((Z[None], None), Z[None]), TypeError, "predictions is a tuple and targets a Tensor; give both"),
    "modelopt reduction": (lambda: modelopt.LogitsDistillationLoss(reduction="avg"), ValueError, "reduction must be mean, batchmean, sum or none"),
    "modelopt trainer DTensor": (lambda: modelopt.standard_kd_loss(SHARDED, Z), TypeError, "values is a DTensor"),
    "modelopt hf DTensor": (lambda: modelopt.LogitsDistillationLoss()(Z, SHARDED), TypeError, "values is a DTensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    function, exception, words = REFUSED[case]
    with pytest.raises(exception, match=words):
        function()


def test_no_library_is_imported():
    code = (
        "import sys, kd_kernels.compat.liger, kd_kernels.compat.trl, kd_kernels.compat.torchtune, "
        "kd_kernels.compat.automodel, kd_kernels.compat.modelopt; "
        "found = {'trl', 'liger_kernel', 'transformers', 'torchtune'} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
