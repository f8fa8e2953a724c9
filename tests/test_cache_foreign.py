"""What others' teachers emit: each fixture is made of one table of distributions, in that format."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kd_kernels as kd
from kd_kernels.cache.foreign import from_axolotl, from_distillkit, from_sglang, from_vllm

LENGTH, VOCAB, K = 5, 50, 4


@pytest.fixture
def table():
    """Distributions after each token, ``[LENGTH, VOCAB]``; the last is not known to others."""
    return torch.log_softmax(torch.randn(LENGTH, VOCAB) * 3, -1)


def check(record, table, tail=True, rows=LENGTH - 1):
    top = table.topk(K)
    target = record.target()
    assert len(record) == LENGTH
    assert torch.equal(record.ids[:rows].long(), top.indices[:rows])
    torch.testing.assert_close(target.logprobs[:rows], top.values[:rows])
    assert (record.ids[rows:] == -1).all()
    if tail:
        exact = (1 - top.values[:rows].double().exp().sum(-1)).log().float()
        torch.testing.assert_close(record.log_tail_mass[:rows], exact, rtol=1e-4, atol=1e-4)
    return target


def vllm(table, tokens, json):
    entries = [None]
    for row, token in zip(table[:-1], tokens[1:]):
        order = row.argsort(descending=True).tolist()
        chosen = dict.fromkeys([token, *order[:K]])  # the realised token comes first
        entry = {i: {"logprob": row[i].item(), "rank": order.index(i) + 1} for i in chosen}
        entries.append(
            {str(i): v for i, v in entry.items()}
            if json
            else {i: SimpleNamespace(**v) for i, v in entry.items()}
        )
    return entries


def test_the_realised_token_is_left_out_whatever_its_rank():
    """It ties with the last of the k, or has its rank counted from 0, or none has a rank."""
    for ranks in ((2, 1, 2), (2, 1, 1), (None, None, None)):
        values = zip((9, 1, 2), (-1.5, -0.5, -1.5), ranks)
        entry = {token: {"logprob": logprob, "rank": rank} for token, logprob, rank in values}
        record = from_vllm([None, entry], 2)
        assert record.ids.tolist() == [[1, 2], [-1, -1]]
    entry[9]["rank"], entry[1]["rank"], entry[2]["rank"] = None, 1, 2
    assert from_vllm([None, entry], 3).ids[0].tolist() == [1, 2, -1]


@pytest.mark.parametrize("objective", [kd.ReverseKL(), kd.ForwardKL(), kd.JensenShannon()])
def test_a_sure_teacher_leaves_something(table, objective):
    """Its first log-probability is 0 in float32, or above by rounding."""
    student = torch.randn(2, VOCAB, requires_grad=True)
    for sure in (0.0, 1e-4):
        record = from_sglang([None, [[sure, 7], [-25.0, 3]]], K)
        loss = kd.distill(student, record.target(), objective, mask=torch.tensor([True, False]))
        (grad,) = torch.autograd.grad(loss, student)
        assert loss.isfinite() and grad.isfinite().all() and grad[0].any()


@pytest.mark.parametrize("json", [True, False])
def test_vllm(table, json, tmp_path):
    tokens = table.argsort(-1)[:, 0].tolist()  # realised tokens of rank VOCAB
    record = from_vllm(vllm(table, tokens, json), K)
    check(record, table)
    with kd.TeacherCache.create(tmp_path, model="m", vocab_size=VOCAB, k=K) as writer:
        writer.append("a", record)
    assert torch.equal(kd.TeacherCache.open(tmp_path)["a"].logits, record.logits)
    student = torch.randn(LENGTH, VOCAB)
    labels = torch.tensor([*tokens[1:], -100])
    dense = kd.distill(student, table, kd.ForwardKL(), labels=labels)
    assert 0 < kd.distill(student, record.target(), kd.ForwardKL(), labels=labels) <= dense


def test_sglang(table):
    top = table.topk(K)
    entries = [
        [[p, i, None] for p, i in zip(values, ids)]
        for values, ids in zip(top.values.tolist(), top.indices.tolist())
    ]
    check(from_sglang([None, *entries[:-1]], K), table)
    assert from_sglang([None, *entries[:-1]], K, temperature=2.0).target().temperature == 2.0
    check(from_sglang([None, *entries[:-1]], K, temperature=2.0), table)


def test_axolotl(table):
    top = table.topk(K)
    renormed = torch.log_softmax(top.values, -1)
    ids, logprobs = top.indices.tolist(), renormed.tolist()
    ids[-1], logprobs[-1] = [0] * K, [-math.inf] * K
    mask = [[1] * K] * (LENGTH - 1) + [[0] * K]
    record = from_axolotl(
        {"target_token_ids": ids, "target_logprobs": logprobs, "target_mask": mask}, K, temperature=2.0
    )
    torch.testing.assert_close(record.target("renorm_both").logprobs[:-1], renormed[:-1])
    assert torch.equal(record.ids[:-1].long(), top.indices[:-1]) and (record.ids[-1] == -1).all()
    assert (record.log_tail_mass[:-1] < -12).all()


def test_axolotl_rows_of_pandas():
    """Which have keys, but are no Mapping."""
    columns = {"target_token_ids": [[1], [0]], "target_logprobs": [[-1.0], [0.0]], "target_mask": [[1], [0]]}
    held = {**columns, "labels": [-100, 3]}

    class Series:
        keys, get = held.keys, held.get
        __getitem__ = staticmethod(held.__getitem__)
        __contains__ = staticmethod(held.__contains__)
        __iter__ = staticmethod(lambda: iter(held))

    assert from_axolotl(Series(), 1).ids.tolist() == [[1], [-1]]


def pack(numbers, bits):
    """The other way from the reader's: through text."""
    rows = []
    for row in numbers.tolist():
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows.append([int(text[i : i + 8], 2) for i in range(0, len(text), 8)])
    return torch.tensor(rows, dtype=torch.uint8)


def raw(values, dtype):
    return values.to(dtype).contiguous().view(torch.uint8).reshape(len(values), -1)


@pytest.mark.parametrize("rows", [LENGTH - 1, LENGTH])
@pytest.mark.parametrize("delta", [True, False])
def test_distillkit_exact(table, delta, rows):
    top = table[:rows].topk(K)
    values = top.values.diff(prepend=torch.zeros(rows, 1)) if delta else top.values
    config = {"d": VOCAB, "k": K, "exact_k": K, "residual_bins": [], "delta_encoding": delta}
    row = {
        "input_ids": list(range(LENGTH)),
        "compressed_logprobs": raw(values, torch.float32).tolist(),
        "bytepacked_indices": pack(top.indices, 6).tolist(),
    }
    check(from_distillkit(row, config), table, rows=rows)


def test_distillkit_slots_without_a_token_and_rows_of_pandas():
    empty = torch.tensor([-1.0, -math.inf]).view(torch.uint8)
    record = distillkit({"compressed_logprobs": [empty.tolist()]}, d=9)  # its id is 15
    assert record.ids.tolist() == [[1, -1], [-1, -1]]
    packed, values = (np.empty(1, dtype=object) for _ in range(2))
    packed[0], values[0] = np.array([0x1F], dtype=np.uint8), empty.numpy()
    record = distillkit({"bytepacked_indices": packed, "compressed_logprobs": values}, d=9)
    assert record.ids.tolist() == [[1, -1], [-1, -1]]


def test_distillkit_polynomial_and_bins():
    """Values built from the parts that are stored, so that they are exact."""
    k, rows = 9, 3
    coefficients = torch.tensor([[-1.0, -0.25, -0.5], [-2.0, -0.5, 0.0], [-1.5, -0.125, -0.25]])
    places = torch.arange(7.0)
    low, high = torch.randint(0, 8, (rows, 4)), torch.randint(0, 2, (rows, 2))
    scales = torch.tensor([[0.125], [0.25], [0.0625]])
    rest = coefficients @ torch.stack([places**0, places, places.sqrt()])
    rest[:, :4] += (low - 4) * scales
    rest[:, 4:6] += (high * 2 - 1) * scales * 2
    exact = torch.tensor([[-0.5, -0.75]]).repeat(rows, 1)
    config = {
        "d": 1000,
        "k": k,
        "exact_k": 2,
        "exact_dtype": "float32",
        "polynomial_terms": [0, 1, "sqrt"],
        "term_dtype": "float32",
        "residual_bins": [
            {"scale_dtype": "float16", "element_bits": 3, "num_elements": 4},
            {"scale_dtype": "bfloat16", "element_bits": 1, "num_elements": 2},
        ],
        "delta_encoding": False,
    }
    data = torch.cat(
        [
            raw(exact, torch.float32),
            raw(coefficients, torch.float32),
            raw(scales, torch.float16),
            pack(low, 3),
            raw(scales * 2, torch.bfloat16),
            pack(high, 1),
        ],
        1,
    )
    ids = torch.stack([torch.randperm(1000)[:k] for _ in range(rows)])
    row = {
        "input_ids": [0] * 4,
        "compressed_logprobs": data.tolist(),
        "bytepacked_indices": pack(ids, 10).tolist(),
    }
    record = from_distillkit(row, config)
    assert torch.equal(record.ids[:rows].long(), ids)
    torch.testing.assert_close(record.logits[:rows], torch.cat([exact, rest], 1))
    row["compressed_logprobs"] = data[:, :-1].tolist()
    with pytest.raises(kd.CacheError, match="too few for its config"):
        from_distillkit(row, config)


def axolotl(**changes):
    """Two tokens, of which the second one's distribution is there."""
    row = {
        "target_token_ids": [[1, 2], [0, 0]],
        "target_logprobs": [[-1.0, -2.0], [-1e9, -1e9]],
        "target_mask": [[1, 1], [0, 0]],
    }
    return from_axolotl({**row, **changes}, 2)


def distillkit(changes=(), **config):
    """A row of the ids 1 and 15, at -1 and -2."""
    row = {
        "input_ids": [1, 2],
        "bytepacked_indices": [[0x1F]],
        "compressed_logprobs": [torch.tensor([-1.0, -2.0]).view(torch.uint8).tolist()],
    }
    right = {"d": 16, "k": 2, "exact_k": 2, "exact_dtype": "float32", "delta_encoding": False}
    return from_distillkit({**row, **dict(changes)}, {**right, **config})


def test_the_rows_below_are_right_but_for_one_thing():
    for record in (axolotl(), distillkit()):
        torch.testing.assert_close(record.logits[0], torch.tensor([-1.0, -2.0]))
    assert distillkit().ids.tolist() == [[1, 15], [-1, -1]]
    # One row of an odd number of bytes, with a float16 at byte 2.
    halves = torch.tensor([-1.0, 0.5], dtype=torch.float16).view(torch.uint8).tolist()
    bins = [{"scale_dtype": "float16", "element_bits": 8, "num_elements": 1}]
    record = distillkit(
        {"compressed_logprobs": [[*halves, 125]]}, exact_k=1, exact_dtype="float16", residual_bins=bins
    )
    torch.testing.assert_close(record.logits[0], torch.tensor([-1.0, -1.5]))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: from_vllm([{1: {"logprob": -1.0, "rank": 1}}], 2),
            r"\[0\] is of the first token",
        ),
        (lambda: from_vllm([None, [3]], 2), r"prompt_logprobs\[1\] is not a mapping"),
        (
            lambda: from_vllm([None, {-5: {"logprob": -1.0, "rank": 1}}], 2),
            r"\[1\] has ids or log-probabilities that are none",
        ),
        (
            lambda: from_sglang([None, [[1.5, 3, None]]], 2),
            r"\[1\] has ids or log-probabilities that are none",
        ),
        (
            lambda: from_sglang([None, [[-1.0, 3], [-2.0, 4], [-3.0, 5]]], 2),
            r"input_top_logprobs\[1\] has 3 tokens, and k is 2",
        ),
        (lambda: from_sglang([None, "ab"], 2), r"input_top_logprobs\[1\] is not a list"),
        (lambda: from_vllm(None, 2), "prompt_logprobs is NoneType, not a list"),
        (
            lambda: from_vllm([None, {1: {"logprob": -1.0, "rank": "1"}}], 2),
            r"prompt_logprobs\[1\] is not a mapping",
        ),
        (
            lambda: from_vllm([None, {1: {"logprob": math.nan, "rank": 1}}], 2),
            r"\[1\] has ids or log-probabilities that are none",
        ),
        (
            lambda: from_vllm([None, {i: {"logprob": -1.0, "rank": 1} for i in ("1", "01")}], 2),
            r"prompt_logprobs\[1\] has a token twice",
        ),
        (lambda: from_vllm([None], 0), "k must be an integer >= 1, got 0"),
        (
            lambda: from_vllm([None, {1: {"logprob": -1.0, "rank": 1}}], None),
            "k must be an integer >= 1, got None",
        ),
        (lambda: from_vllm([None], 2, temperature=-1.0), "temperature must be a number > 0, got -1.0"),
        (lambda: from_sglang([None], 2, temperature="1"), "temperature must be a number > 0, got '1'"),
        (lambda: axolotl(target_token_ids=None), "target_token_ids is NoneType, not a list"),
        (lambda: axolotl(target_token_ids=[None, [0, 0]]), r"target_token_ids\[0\] or what belongs to it"),
        (
            lambda: axolotl(target_token_ids=[["x", 1], [0, 0]]),
            r"target_token_ids\[0\] or what belongs to it",
        ),
        (lambda: axolotl(target_mask=[[1], [0, 0]]), r"target_mask\[0\] does not have the length"),
        (lambda: axolotl(target_mask=[]), "do not have as many rows"),
        (
            lambda: axolotl(target_mask=[[1, 1], [1, 0]]),
            r"target_mask\[1\] .* nothing comes after it: .* earlier axolotl",
        ),
        (
            lambda: axolotl(labels=[3, -100]),
            r"target_mask\[0\] counts a row of token 1, but labels\[1\] is -100",
        ),
        (lambda: axolotl(labels=[3, None]), "labels is not a list of integers"),
        (lambda: axolotl(labels=5), "labels is not a list of integers"),
        (lambda: axolotl(labels=[3]), "labels has 1 tokens and target_token_ids 2 rows"),
        (lambda: from_axolotl(None, 2), "row is NoneType, not a mapping of columns"),
        (lambda: distillkit(d=0), "not DistillKit's: ValueError d = 0"),
        (lambda: distillkit(exact_k=None), "config is not DistillKit's: TypeError"),
        (lambda: distillkit(exact_dtype="int8"), "dtype 'int8' is none of float16"),
        (lambda: distillkit(exact_k=1, polynomial_terms=["sine"]), "polynomial_terms has 'sine'"),
        (lambda: distillkit(residual_bins=[{}]), "config is not DistillKit's: KeyError 'element_bits'"),
        (lambda: distillkit({"bytepacked_indices": [[256]]}), "bytes are integers from 0 to 255"),
        (lambda: distillkit({"bytepacked_indices": [[1, 2]]}), "bytepacked_indices has 2 bytes a row"),
        (lambda: distillkit({"compressed_logprobs": []}), "compressed_logprobs has 0 rows for 2 input_ids"),
        (lambda: distillkit({"compressed_logprobs": [[0] * 9]}), "has 9 bytes a row, its config makes 8"),
        (
            lambda: distillkit({"compressed_logprobs": [[0, 0, 192, 127] * 2]}),
            "compressed_logprobs holds numbers that are no log-probabilities",
        ),
        (lambda: distillkit(d=9, k=2), "bytepacked_indices holds 15, outside the vocabulary of 9"),
        (lambda: from_axolotl({"target_mask": []}, 2), "target_token_ids is not there; it has target_mask"),
        (lambda: from_distillkit({"packed_indices": []}, {"d": 5, "k": 2}), "not DistillKit's: KeyError"),
    ],
)
def test_what_is_no_such_format(call, message):
    with pytest.raises(kd.CacheError, match=message):
        call()
