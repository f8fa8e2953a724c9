"""Bad input: an error that names the argument and what would do, or the documented value."""

import pytest
import torch
from cases import OBJECTIVES, Batch, error

import kd_kernels as kd
from kd_kernels.reference import dense_distill

H, W, Z = torch.randn(3, 4), torch.randn(9, 4), torch.randn(3, 9)
LABELS = torch.tensor([1, 2, 8])
KL = kd.ForwardKL()


def call(student=None, teacher=None, objective=KL, **options):
    return kd.distill(
        kd.Head(H, W) if student is None else student, Z if teacher is None else teacher, objective, **options
    )


# (what is wrong, exception, words the message must hold)
CASES = {
    "objective class": (lambda: call(objective=kd.ForwardKL), TypeError, "objective must be an instance"),
    "objective name": (lambda: call(objective="kl"), TypeError, "objective"),
    "beta above 1": (lambda: kd.JensenShannon(1.5), ValueError, r"beta must be in \[0, 1\]"),
    "beta below 0": (lambda: kd.JensenShannon(-0.1), ValueError, "beta"),
    "beta NaN": (lambda: kd.JensenShannon(float("nan")), ValueError, "beta"),
    "alpha 1": (lambda: kd.SkewKL(1.0), ValueError, r"alpha must be in \[0, 1\)"),
    "alpha below 0": (lambda: kd.SkewReverseKL(-0.1), ValueError, "alpha"),
    "student type": (lambda: call(student=[1.0]), TypeError, "student must be kd.Head"),
    "hidden type": (lambda: kd.Head([1.0], W), TypeError, "hidden must be a tensor"),
    "quantised weight": (lambda: kd.Head(H, W.to(torch.int8)), TypeError, "dequantise"),
    "integer logits": (lambda: kd.Logits(LABELS), TypeError, "values has dtype"),
    "complex logits": (lambda: kd.Logits(Z.to(torch.complex64)), TypeError, "dtype"),
    "weight dims": (lambda: kd.Head(H, W[0]), ValueError, r"weight must be \[V, D\]"),
    "weight transposed": (lambda: kd.Head(H, W.t()), ValueError, "takes 9"),
    "hidden 0-d": (lambda: kd.Head(torch.tensor(1.0), W), ValueError, "0-d"),
    "empty weight": (lambda: kd.Head(H, W[:0]), ValueError, "no rows"),
    "bias shape": (lambda: kd.Head(H, W, torch.zeros(8)), ValueError, r"bias must be \[9\]"),
    "no features": (lambda: kd.Head(H[:, :0], W[:, :0]), ValueError, "no features"),
    "scale tensor": (lambda: kd.Head(H, W, scale=torch.tensor(1.0)), TypeError, "scale must be a number"),
    "soft_weight tensor": (lambda: call(soft_weight=torch.ones(3)), TypeError, "soft_weight must be a number"),
    "beta tensor": (lambda: kd.JensenShannon(torch.ones(3)), TypeError, "JensenShannon: beta must be a number"),
    "ignore_index": (lambda: call(labels=LABELS, ignore_index=None), TypeError, "ignore_index must be an int"),
    "num_items tensor 0": (lambda: call(num_items=torch.tensor(0)), ValueError, "num_items must be > 0"),
    "workspace type": (lambda: call(workspace_bytes=1e6), TypeError, "workspace_bytes must be an int"),
    "backend type": (lambda: call(backend=3), TypeError, "backend must be a name"),
    "uint8 next_token_labels": (lambda: kd.next_token_labels(LABELS.to(torch.uint8)), TypeError, "can hold -100"),
    "softcap 0": (lambda: kd.Head(H, W, softcap=0.0), ValueError, "softcap must be > 0"),
    "softcap < 0": (lambda: kd.Logits(Z, softcap=-1.0), ValueError, "softcap"),
    "empty vocabulary": (lambda: kd.Logits(torch.zeros(3, 0)), ValueError, "empty vocabulary"),
    "token counts": (lambda: call(teacher=torch.randn(4, 9)), ValueError, r"\(3,\) and \(4,\)"),
    "vocabularies": (lambda: call(teacher=torch.randn(3, 11)), ValueError, "9 vocabulary entries and teacher 11.*truncate"),
    "vocab option": (lambda: call(vocab="pad"), ValueError, 'vocab must be "error" or "truncate"'),
    "mixed head": (lambda: call(student=kd.Head(H, W.bfloat16())), TypeError, "cast one, or use torch.autocast"),
    "labels shape": (lambda: call(labels=LABELS[:2]), ValueError, "labels must have the leading shape"),
    "labels dtype": (lambda: call(labels=LABELS.float()), TypeError, "labels must be integers"),
    "labels type": (lambda: call(labels=[1, 2, 3]), TypeError, "labels must be a tensor"),
    "label too large": (lambda: call(labels=LABELS + 1, hard_weight=1.0), ValueError, r"labels must be in \[0, 9\)"),
    "label too large, unused": (lambda: call(labels=LABELS + 1), ValueError, "labels must be in"),
    "label negative": (lambda: call(labels=LABELS - 2, hard_weight=1.0), ValueError, "labels"),
    "hard without labels": (lambda: call(hard_weight=0.5), ValueError, "hard_weight=0.5 needs labels"),
    "mask dtype": (lambda: call(mask=torch.ones(3)), TypeError, "mask must be bool"),
    "mask shape": (lambda: call(mask=torch.ones(3, 1, dtype=torch.bool)), ValueError, "mask must have"),
    "temperature 0": (lambda: call(temperature=0.0), ValueError, "temperature must be finite and > 0, got 0.0"),
    "temperature < 0": (lambda: call(temperature=torch.tensor([1.0, -2.0, 1.0])), ValueError, "got -2"),
    "temperature NaN": (lambda: call(temperature=float("nan")), ValueError, "temperature"),
    "temperature inf": (lambda: call(temperature=float("inf")), ValueError, "temperature"),
    "temperature shape": (lambda: call(temperature=torch.ones(2)), ValueError, "temperature must have"),
    "hard_weight bool": (lambda: call(hard_weight=True, labels=LABELS), TypeError, "hard_weight must be a number, got bool"),
    "beta bool": (lambda: kd.JensenShannon(beta=True), TypeError, "beta must be a number, got bool"),
    "scale bool": (lambda: kd.Head(H, W, scale=True), TypeError, "scale must be a number, got True"),
    "scale text": (lambda: kd.Head(H, W, scale="2"), TypeError, "scale must be a number, got '2'"),
    "no scale": (lambda: kd.Head(H, W, scale=None), TypeError, "scale must be a number, got None"),
    "a batch of one": (lambda: call(teacher=torch.randn(1, 3, 9)), ValueError, r"\(3,\) and \(1, 3\); take the dimension of 1 off"),
    "other tokens": (lambda: call(teacher=torch.randn(4, 9)), ValueError, r"\(3,\) and \(4,\)$"),
    "another tokenizer": (lambda: call(teacher=torch.randn(3, 11)), ValueError, "of two, see kd.SortedWasserstein"),
    "a class": (lambda: kd.DistillationLoss(kd.ForwardKL), TypeError, r"an instance such as kd.ForwardKL\(\)"),
    "softcap bool": (lambda: kd.Logits(Z, softcap=True), TypeError, "softcap must be a number, got True"),
    "temperature bool": (lambda: call(temperature=True), TypeError, "temperature must be a number.*got bool"),
    "temperature type": (lambda: call(temperature="2"), TypeError, "temperature must be a number"),
    "teacher temperature": (lambda: call(teacher_temperature=-1.0), ValueError, "teacher_temperature must be"),
    "temperature grad": (lambda: call(temperature=torch.ones(3, requires_grad=True)), ValueError, "temperature requires grad"),
    "weight grad": (lambda: call(token_weight=torch.ones(3, requires_grad=True)), ValueError, "token_weight requires grad"),
    "objective grad": (lambda: call(objective=kd.WeightedKL(torch.ones(3, requires_grad=True), 1.0)), ValueError, "WeightedKL's forward requires grad"),
    "weight NaN": (lambda: call(token_weight=torch.tensor([1.0, float("nan"), 1.0])), ValueError, "token_weight.*NaN"),
    "soft_weight NaN": (lambda: call(soft_weight=float("nan")), ValueError, "soft_weight"),
    "hard_weight NaN": (lambda: call(hard_weight=float("nan"), labels=LABELS), ValueError, "hard_weight"),
    "weight shape": (lambda: call(token_weight=torch.ones(3, 3)), ValueError, "token_weight must have"),
    "objective weight NaN": (lambda: call(objective=kd.WeightedKL(float("nan"), 1.0)), ValueError, "WeightedKL's forward holds NaN"),
    "objective weight shape": (lambda: call(objective=kd.WeightedKL(torch.ones(2), 1.0)), ValueError, "WeightedKL's forward must have the leading shape"),
    "reduction": (lambda: call(reduction="avg"), ValueError, "reduction must be one of mean, sum"),
    "num_items with sum": (lambda: call(reduction="sum", num_items=3), ValueError, 'num_items goes with reduction="mean"'),
    "num_items 0": (lambda: call(num_items=0), ValueError, "num_items must be > 0"),
    "num_items meta": (lambda: call(num_items=torch.ones((), device="meta")), ValueError, "num_items is on the meta device"),
    "temperature meta": (lambda: call(temperature=torch.ones((), device="meta")), ValueError, "temperature is on the meta device"),
    "num_items text": (lambda: call(num_items="3"), TypeError, "num_items must be a number"),
    "num_items True": (lambda: call(num_items=True), TypeError, "num_items must be a number"),
    "num_items with gradient": (
        lambda: call(num_items=torch.tensor(3.0, requires_grad=True)),
        ValueError,
        "num_items requires grad",
    ),
    "workspace_bytes True": (lambda: call(workspace_bytes=True), TypeError, "workspace_bytes must be an int"),
    "workspace_bytes -1": (lambda: call(workspace_bytes=-1), ValueError, "workspace_bytes must be >= 0"),
    "num_items shape": (lambda: call(num_items=torch.ones(2)), ValueError, "num_items must be a number"),
    "backend name": (lambda: call(backend="cudnn"), ValueError, "backend must be one of cpu, triton, cuda, reference"),
    "backend absent": (lambda: call(backend="cuda"), kd.BackendUnavailable, "cuda: "),
    "logits_dtype": (lambda: call(logits_dtype=torch.float16), ValueError, "logits_dtype must be"),
    "logits_dtype text": (lambda: call(logits_dtype="bf16"), TypeError, "logits_dtype must be a torch.dtype such as"),
    "meta": (lambda: call(student=Z.to("meta"), teacher=Z.to("meta")), ValueError, "on the meta device"),
    "hidden as logits": (lambda: call(teacher=kd.Head(H, W), student=H), ValueError, "hidden states go in as kd.Head"),
    "labels sliced": (lambda: call(labels=LABELS[1:]), ValueError, "next_token_labels"),
    "label -1": (lambda: call(labels=LABELS - 2), ValueError, r"ignore_index \(-100 unless given\), got -"),
    "scale NaN": (lambda: kd.Head(H, W, scale=float("nan")), ValueError, "scale must be finite"),
    "workspace": (lambda: call(student=kd.Head(H, W), workspace_bytes=8), ValueError, "workspace_bytes=8 holds less than one row"),
    "module option": (lambda: kd.DistillationLoss(KL, temprature=2.0), TypeError, "temprature"),
    "bool next_token_labels": (lambda: kd.next_token_labels(LABELS > 0), TypeError, "can hold -100"),
    "list next_token_labels": (lambda: kd.next_token_labels([1, 2]), TypeError, "labels must be a tensor"),
    "int8 next_token_labels": (lambda: kd.next_token_labels(LABELS.to(torch.int8), 300), TypeError, "can hold 300"),
    "next_token_labels": (lambda: kd.next_token_labels(torch.tensor(1)), ValueError, "labels must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_error_names_the_argument(case):
    function, exception, words = CASES[case]
    with pytest.raises(exception, match=words):
        function()


def there(x):
    return x.to("meta")  # another device than the student's, on every machine


ONES, IDS = torch.ones(3), torch.tensor([[0, 1], [2, 3], [4, 5]])
SPARSE = torch.full((3, 2), -1.0)
# By what is on another device: the call, and the words of its error.
ELSEWHERE = {
    "teacher": (lambda: call(teacher=there(Z)), "teacher's values is on meta, the student's values on cpu"),
    "teacher's weight": (lambda: call(teacher=kd.Head(H, there(W))), "teacher's weight is on meta"),
    "student's weight": (lambda: call(student=kd.Head(H, there(W))), "student's weight is on meta"),
    "student's bias": (lambda: call(student=kd.Head(H, W, there(W[:, 0]))), "student's bias is on meta"),
    "sparse ids": (lambda: call(teacher=kd.SparseTarget(there(IDS), SPARSE)), "teacher's ids is on meta"),
    "sparse logprobs": (lambda: call(teacher=kd.SparseTarget(IDS, there(SPARSE))), "teacher's logprobs is on meta"),
    "sparse tail": (lambda: call(teacher=kd.SparseTarget(IDS, SPARSE, log_tail_mass=there(-ONES))), "teacher's log_tail_mass is on meta"),
    "labels": (lambda: call(labels=there(LABELS)), "labels is on meta, the student on cpu"),
    "mask": (lambda: call(mask=there(ONES > 0)), "mask is on meta"),
    "token_weight": (lambda: call(token_weight=there(ONES)), "token_weight is on meta"),
    "temperature": (lambda: call(temperature=there(ONES)), "^temperature is on meta"),
    "teacher_temperature": (lambda: call(teacher_temperature=there(ONES)), "teacher_temperature is on meta"),
    "groups": (lambda: call(objective=kd.SinkhornBatch(), groups=there(LABELS)), "groups is on meta"),
    "objective": (lambda: call(objective=kd.WeightedKL(1.0, there(ONES))), "WeightedKL's reverse is on meta"),
    "logprobs' ids": (lambda: kd.linear_logprobs(Z, there(IDS)), "ids is on meta, the tokens on cpu"),
    "logprobs' temperature": (lambda: kd.linear_logprobs(Z, IDS, temperature=there(ONES)), "temperature is on meta"),
    "topk's targets": (lambda: kd.linear_topk(Z, 2, targets=there(LABELS)), "targets is on meta"),
    "topk's weight": (lambda: kd.linear_topk(kd.Head(H, there(W)), 2), "source's weight is on meta"),
    "rank's ids": (lambda: kd.linear_rank(Z, there(IDS)), "ids is on meta"),
    "scored teacher": (lambda: kd.score(Z, there(Z)), "teacher's values is on meta"),
    "score's labels": (lambda: kd.score(Z, labels=there(LABELS)), "labels is on meta"),
    "score's mask": (lambda: kd.score(Z, mask=there(ONES > 0)), "mask is on meta"),
}  # fmt: skip


@pytest.mark.parametrize("what", ELSEWHERE)
def test_devices_are_checked(what):
    function, words = ELSEWHERE[what]
    with pytest.raises(ValueError, match=words):
        function()


@pytest.mark.parametrize("lead", [(0,), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("kinds", [("head", "head"), ("head", "logits"), ("logits", "logits")], ids="x".join)
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
def test_zero_tokens(lead, kinds, reduction, backend):
    batch = Batch(lead=lead)
    sources = [batch.source(side, kind, torch.float32) for side, kind in zip(("student", "teacher"), kinds)]
    loss, parts = kd.distill(
        *sources,
        KL,
        labels=batch.labels,
        hard_weight=0.5,
        reduction=reduction,
        backend=backend,
        return_parts=True,
    )
    assert loss.shape == (lead if reduction == "none" else ()) and loss.sum() == 0
    assert parts.valid_tokens == 0 and parts.soft.shape == lead
    loss.sum().backward()
    for x in sources[0].tensors():
        assert x is None or (x.grad.shape == x.shape and x.grad.abs().sum() == 0)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
@pytest.mark.parametrize("kinds", [("head", "head"), ("logits", "logits")], ids="x".join)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_everything_ignored(objective, kinds, reduction, backend):
    batch = Batch()
    sources = [batch.source(side, kind, torch.float32) for side, kind in zip(("student", "teacher"), kinds)]
    for source in sources:
        source.tensors()[0].data.fill_(torch.nan)
    labels = torch.full_like(batch.labels, -100)
    loss = kd.distill(*sources, objective, labels=labels, reduction=reduction, backend=backend)
    assert torch.equal(loss, torch.zeros_like(loss)) and loss.requires_grad
    loss.sum().backward()
    assert all(x is None or x.grad.abs().sum() == 0 for x in sources[0].tensors())


def test_truncated_labels_are_checked_against_what_remains():
    with pytest.raises(ValueError, match=r"labels must be in \[0, 7\)"):
        call(teacher=torch.randn(3, 7), vocab="truncate", labels=LABELS, hard_weight=1.0)
    call(teacher=torch.randn(3, 7), vocab="truncate", labels=LABELS)  # only marks which tokens count


def test_module_is_the_function():
    module = kd.DistillationLoss(kd.JensenShannon(0.3), temperature=2.0, labels=LABELS)
    other = torch.randn(3, 9)
    assert module(Z, other) != module(Z, Z)
    assert torch.equal(
        module(Z, other), kd.distill(Z, other, kd.JensenShannon(0.3), temperature=2.0, labels=LABELS)
    )
    assert torch.equal(
        module(Z, other, temperature=1.0), kd.distill(Z, other, kd.JensenShannon(0.3), labels=LABELS)
    )
    assert "JensenShannon(beta=0.3)" in repr(module) and "temperature=2.0" in repr(module)


def test_next_token_labels():
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert kd.next_token_labels(labels).tolist() == [[2, 3, -100], [5, 6, -100]]
    assert kd.next_token_labels(labels[:, :0]).shape == (2, 0)
    assert kd.next_token_labels(labels, ignore_index=-1)[0, -1] == -1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "column", "expanded"])
def test_labels_of_any_integer_dtype_and_stride(dtype, layout, backend):
    """The kernels receive an address: it must be that of contiguous int64."""
    logits = torch.randn(2, 8, 200)
    labels = torch.tensor([5, 0, 199, 3, 156, 1, 0, 7])
    given = {
        "contiguous": labels.to(dtype),
        "column": torch.stack([labels, labels * 0 + 9], 1).to(dtype)[:, 0],
        "expanded": labels[:1].to(dtype).expand(8),
    }[layout]
    ours = kd.distill(*logits, KL, labels=given, hard_weight=1.0, reduction="none", backend=backend)
    exact = dense_distill(
        *(kd.Logits(x.double()) for x in logits), KL, labels=given.long(), hard_weight=1.0, reduction="none"
    )
    assert error(ours, exact) < 1e-6


def test_inference_mode_labels_and_masks():
    logits = torch.randn(2, 6, 40)
    with torch.inference_mode():
        extra = {"mask": torch.ones(6, dtype=torch.bool), "labels": torch.arange(6)}
        weight = torch.ones(6, dtype=torch.float64)
    student = logits[0].clone().requires_grad_()
    kd.distill(student, logits[1], KL, **extra, hard_weight=0.5, token_weight=weight).backward()
    assert student.grad.abs().sum() > 0


def test_forward_mode_is_refused():
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.randn(3, 9), torch.randn(3, 9))
        with pytest.raises(TypeError, match="forward-mode"):
            kd.distill(dual, Z, KL)


def test_a_source_prints_its_form_not_its_numbers():
    assert repr(kd.Head(H, W, softcap=30.0)) == (
        "Head(hidden=[3, 4] float32 cpu, weight=[9, 4] float32 cpu, bias=None, scale=1.0, softcap=30.0)"
    )
    assert "values=[3, 9] float32 cpu" in repr(kd.Logits(Z))
    target = kd.SparseTarget(LABELS[:, None], torch.zeros(3, 1))
    assert "ids=[3, 1] int64 cpu" in repr(target) and "missing='tail'" in repr(target)
    assert repr(kd.WeightedKL(torch.ones(3), 1.0)) == "WeightedKL(forward=[3] float32 cpu, reverse=1.0)"
    found = kd.sinkhorn(torch.ones(3, 4), epsilon=0.1)
    assert "transport_cost=1, " in repr(found) and "f=[3] float32 cpu" in repr(found)
    # By identity: tensors of several numbers have no truth value.
    assert found != kd.sinkhorn(torch.ones(3, 4), epsilon=0.1)
