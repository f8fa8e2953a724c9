"""kd.align_tokens and its helpers, and with them the ULD losses of published code."""

from types import SimpleNamespace

import pytest
import torch
from cases import error

import kd_kernels as kd

TEXT = "the cat sat on a mat"
STUDENT = [4, 4, 2, 2, 3, 2, 3]  # bytes of each token
TEACHER = [2, 2, 8, 1, 4, 3]


def offsets(lengths):
    ends = torch.tensor(lengths).cumsum(0)
    return [(int(end) - length, int(end)) for end, length in zip(ends, lengths)]


def test_groups():
    assert sum(STUDENT) == sum(TEACHER) == len(TEXT)
    groups = [tuple(map(list, group)) for group in kd.byte_groups(STUDENT, TEACHER)]
    assert groups == [([0], [0, 1]), ([1, 2, 3], [2]), ([4, 5], [3, 4]), ([6], [5])]
    assert kd.byte_groups(offsets(STUDENT), offsets(TEACHER)) == kd.byte_groups(STUDENT, TEACHER)
    assert kd.byte_groups(STUDENT, []) == kd.byte_groups([], []) == []
    # What is left is one group; a side that has nothing left has none.
    assert [tuple(map(list, g)) for g in kd.byte_groups([2, 3, 1], [2, 2])] == [([0], [0]), ([1, 2], [1])]
    assert [tuple(map(list, g)) for g in kd.byte_groups([2, 3], [2])] == [([0], [0])]


@pytest.mark.parametrize("seed", range(20))
def test_groups_cover_the_text_once_and_cannot_be_finer(seed):
    generator = torch.Generator().manual_seed(seed)

    def cut():
        places = torch.randperm(29, generator=generator)[: 3 + seed % 9].sort().values + 1
        ends = [0, *places.tolist(), 30]
        return [b - a for a, b in zip(ends, ends[1:])]

    own, other = cut(), cut()
    groups = kd.byte_groups(own, other)
    assert [i for group, _ in groups for i in group] == list(range(len(own)))
    assert [i for _, group in groups for i in group] == list(range(len(other)))
    common = {end for _, end in offsets(own)} & {end for _, end in offsets(other)}
    assert len(groups) == len(common)


def test_rows_and_masses():
    alignment = kd.align_tokens(
        [[10, 11, 12, 13, 14, 15, 16]], [torch.arange(6)], [kd.byte_groups(STUDENT, TEACHER)]
    )
    assert alignment.student.rows.tolist() == [10, 11, 14, 16] and alignment.teacher.rows.tolist() == [
        0,
        2,
        3,
        5,
    ]
    assert alignment.student.given.tolist() == [12, 13, 15] and alignment.student.given_pair.tolist() == [
        1,
        1,
        2,
    ]
    assert alignment.teacher.given.tolist() == [1, 4] and alignment.teacher.given_pair.tolist() == [0, 2]
    chain = kd.align_tokens([range(10, 17)], [range(6)], [kd.byte_groups(STUDENT, TEACHER)], merge="bayesian")
    assert chain.student.rows.tolist() == [10, 13, 15, 16] and chain.student.given.tolist() == [11, 12, 14]
    logprobs = -torch.arange(17.0)
    assert alignment.student.log_mass_of(logprobs).tolist() == pytest.approx([0, -25, -15, 0])
    assert alignment.student.log_mass_of(logprobs * 9)[1] == pytest.approx(
        2 * torch.tensor(1e-8).log().item()
    )


def test_by_position_up_to_the_shorter():
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1]], dtype=torch.bool)
    rows = kd.answer_rows(mask)
    assert [x.tolist() for x in rows] == [[1, 2, 3], [], [10, 11, 14]]
    alignment = kd.align_tokens(rows, [[0, 1], [2], [3, 4, 5]])
    assert alignment.student.rows.tolist() == [1, 2, 10, 11, 14] and alignment.teacher.rows.tolist() == [
        0,
        1,
        3,
        4,
        5,
    ]
    assert alignment.sample.tolist() == [0, 0, 2, 2, 2] and len(alignment.student.given) == 0
    # mean over 5 pairs with these weights: (mean of 2 + 0 + mean of 3) / 3
    assert (alignment.sample_weight() / 5).tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kd.align_tokens([[0]], [[0], [1]]),
            "one entry per sample: got student_rows 1, teacher_rows 2",
        ),
        (lambda: kd.align_tokens([[0]], [[0]], []), "groups 0"),
        (lambda: kd.align_tokens([[0]], [[0]], [[((0, 1), (0,))]]), "student's answer of 1 tokens"),
        (lambda: kd.align_tokens([[0]], [[0]], [[((0,), ())]]), "teacher's answer"),
        (lambda: kd.align_tokens([[0]], [[0]], merge="first"), "observed, bayesian"),
        (lambda: kd.answer_rows(torch.ones(3)), r"bool \[B, T\]"),
        (lambda: kd.byte_groups([(0, 1, 2)], [1]), "student must hold lengths"),
        (lambda: kd.byte_groups(torch.tensor(3), [3]), "student must hold lengths"),
        (lambda: kd.byte_groups([[(0, 1), (1, 2)]], [[(0, 2)]]), "one per token of one sample"),
        (lambda: kd.align_tokens([[-2]], [[0]]), "or -1 where none predicts the token"),
        (lambda: kd.byte_groups([3], [4, -1]), "teacher must hold lengths >= 0"),
        (lambda: kd.byte_groups([3], [(3, 0)]), "teacher must hold lengths >= 0"),
    ],
    ids=range(12),
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_take():
    """Sources of every kind, with gradients to the rows taken and nowhere else."""
    alignment = kd.align_tokens([[1, 4], [2]], [[0, 5], [3]])
    hidden = torch.randn(2, 3, 8, requires_grad=True)
    weight = torch.randn(20, 8)
    student = alignment.student.take(kd.Head(hidden, weight, scale=0.5, softcap=3.0))
    teacher = alignment.teacher.take(torch.randn(2, 3, 31))
    loss = kd.distill(student, teacher, kd.SortedWasserstein())
    loss.backward()
    assert student.softcap == 3.0 and student.scale == 0.5 and teacher.leading_shape == (3,)
    assert (hidden.grad.view(6, 8) != 0).any(1).tolist() == [False, True, True, False, True, False]
    whole = kd.linear_topk(torch.randn(2, 3, 31), 6)
    saved = alignment.teacher.take(whole.target())
    assert torch.equal(saved.ids, whole.ids.view(6, 6)[[0, 5, 3]].long())
    assert torch.equal(saved.log_tail_mass, whole.log_tail_mass.view(6)[[0, 5, 3]])
    mask = torch.arange(6).view(2, 3)
    assert alignment.student.take_labels(mask).tolist() == [1, 4, 2]


# --- published code -----------------------------------------------------------------------------------


def answers():
    """A batch of two whose answers begin at other places and are cut into other tokens on the two sides."""
    torch.manual_seed(3)
    sides = []
    for vocab, pieces in ((41, [STUDENT, [3, 3, 1]]), (29, [TEACHER, [1, 5, 1]])):
        ids = torch.randint(0, vocab, (2, 12))
        labels, spans = torch.full_like(ids, -100), torch.zeros(2, 12, 2, dtype=torch.long)
        for i, lengths in enumerate(pieces):
            start = 2 + i
            labels[i, start : start + len(lengths)] = ids[i, start : start + len(lengths)]
            spans[i, start : start + len(lengths)] = torch.tensor(offsets(lengths))
        hidden, weight = (
            torch.randn(2, 12, 16, dtype=torch.float64),
            torch.randn(vocab, 16, dtype=torch.float64) / 2,
        )
        sides.append(SimpleNamespace(ids=ids, labels=labels, spans=spans, hidden=hidden.requires_grad_(),
                                     weight=weight.requires_grad_(), pieces=pieces))  # fmt: skip
    return sides


def gold(own, other, vocabularies=(None, None), **config):
    """TRL's own loss; ``vocabularies`` have a tokenizer's ``get_vocab()``."""
    reason = "TRL with GOLD is not installed (pip install kd-kernels[dropin])"
    trainer = pytest.importorskip("trl.experimental.gold.gold_trainer", reason=reason, exc_type=ImportError)
    settings = {
        "uld_crossentropy_weight": 0.0, "uld_distillation_weight": 1.0, "uld_student_temperature": 1.3,
        "uld_teacher_temperature": 0.8, "uld_skip_student_eos": False, "uld_skip_teacher_eos": False,
        "use_extended_uld": True, "uld_token_merge_strategy": "observed", "uld_use_hybrid_loss": False,
        **config,
    }  # fmt: skip
    loss = trainer.ULDLoss(SimpleNamespace(**settings), *vocabularies)
    logits = [side.hidden @ side.weight.T for side in (own, other)]
    return loss(*logits, own.labels, other.labels, own.ids, other.ids, own.spans, other.spans)


def rows_of(labels):
    """-1 for a token that no row predicts."""
    rows = kd.answer_rows(kd.next_token_labels(labels) != -100)
    return [torch.cat([torch.tensor([-1]), r]) if x[0] != -100 else r for r, x in zip(rows, labels)]


def aligned(own, other, merge, extended=True, late=0):
    """Both heads at the pairs, the pairs' log masses and weights. ``late``: GOLD's "observed" takes the row
    at each token, not the one that predicts it."""
    sides = own, other
    rows = [[r + late for r in rows_of(side.labels)] for side in sides]
    groups = [kd.byte_groups(a, b) for a, b in zip(own.pieces, other.pieces)] if extended else None
    alignment = kd.align_tokens(*rows, groups, merge=merge)
    heads = [kd.Head(side.hidden, side.weight) for side in sides]
    masses = []
    for end, head, side, t in zip((alignment.student, alignment.teacher), heads, sides, (1.3, 0.8)):
        labels = side.labels if late else kd.next_token_labels(side.labels)
        masses.append(end.log_mass(head, labels, temperature=t))
    taken = alignment.student.take(heads[0]), alignment.teacher.take(heads[1])
    return taken, masses, alignment.sample_weight()


def ours(own, other, merge, extended, late=0):
    heads, masses, weight = aligned(own, other, merge, extended, late)
    return kd.distill(
        *heads, kd.SortedWasserstein(None, *masses), temperature=1.3, teacher_temperature=0.8,
        token_weight=weight, teacher_grad=True,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("extended", [True, False], ids=["groups", "by position"])
@pytest.mark.parametrize("merge", ["observed", "bayesian"])
def test_the_loss_of_trl(merge, extended):
    """GOLD's ULD, value and gradients: of the log masses too, so the whole chain."""
    own, other = answers()
    theirs = gold(own, other, use_extended_uld=extended, uld_token_merge_strategy=merge)
    loss = ours(own, other, merge, extended, late=int(merge == "observed"))
    torch.testing.assert_close(loss, theirs)
    wanted = [own.hidden, own.weight, other.hidden, other.weight]
    for got, want in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(theirs, wanted)):
        assert error(got, want) < 1e-12 and want.any()
    if extended:
        assert error(loss, ours(own, other, merge, False, late=int(merge == "observed"))) > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("extended", [True, False], ids=["groups", "by position"])
@pytest.mark.parametrize("begin", ["student", "teacher", "both"])
def test_an_answer_that_begins_at_position_0(begin, extended):
    """Its first token has no row, on that side only; TRL leaves its group or pair out."""
    own, other = answers()
    for name, side in (("student", own), ("teacher", other)):
        if begin not in (name, "both"):
            continue
        size = len(side.pieces[1])
        start = int((side.labels[1] != -100).nonzero()[0])
        side.spans[1, :size] = side.spans[1, start : start + size].clone()
        side.labels[1] = -100
        side.labels[1, :size] = side.ids[1, :size]
    theirs = gold(own, other, use_extended_uld=extended, uld_token_merge_strategy="bayesian")
    loss = ours(own, other, "bayesian", extended)
    torch.testing.assert_close(loss, theirs)
    wanted = [own.hidden, own.weight, other.hidden, other.weight]
    for got, want in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(theirs, wanted)):
        assert error(got, want) < 1e-12 and want.any()


def test_by_position_as_in_dskd():
    """DSKD's ULD: the sum over positions where neither side is padding, over a denominator of the batch."""
    own, other = answers()
    both = [kd.next_token_labels(side.labels) != -100 for side in (own, other)]
    both = both[0] & both[1]
    q, p = ((side.hidden @ side.weight.T)[both].softmax(-1).sort(dim=-1, descending=True).values
            for side in (own, other))  # fmt: skip
    want = (torch.nn.functional.pad(p, (0, 41 - 29)) - q).abs().sum() / 13
    alignment = kd.align_tokens(*(kd.answer_rows(both) for _ in range(2)))
    sources = [side.take(kd.Head(x.hidden, x.weight))
               for side, x in ((alignment.student, own), (alignment.teacher, other))]  # fmt: skip
    loss = kd.distill(*sources, kd.SortedWasserstein(), num_items=13)
    torch.testing.assert_close(loss, want)
    gradients = [torch.autograd.grad(x, (own.hidden, own.weight)) for x in (loss, want)]
    assert all(error(x, y) < 1e-12 for x, y in zip(*gradients))


def test_by_position_as_first_published():
    """Boizard et al.: per sample the mean over the shorter answer, mean over the batch, times 1.5."""
    own, other = answers()
    losses = []
    for i in range(2):
        p, q = (
            (side.hidden[i] @ side.weight.T)[kd.next_token_labels(side.labels)[i] != -100].softmax(-1)
            for side in (other, own)
        )
        n = min(len(p), len(q))
        p, q = (x[:n].sort(dim=-1, descending=True).values for x in (p, q))
        losses.append((torch.nn.functional.pad(p, (0, 41 - 29)) - q).abs().sum(-1).mean())
    want = 1.5 * torch.stack(losses).mean()
    rows = [kd.answer_rows(kd.next_token_labels(side.labels) != -100) for side in (own, other)]
    alignment = kd.align_tokens(*rows)
    heads = [kd.Head(side.hidden, side.weight) for side in (own, other)]
    loss = kd.distill(
        alignment.student.take(heads[0]), alignment.teacher.take(heads[1]), kd.SortedWasserstein(),
        token_weight=alignment.sample_weight(), soft_weight=1.5,
    )  # fmt: skip
    torch.testing.assert_close(loss, want)


def test_a_character_of_several_tokens():
    """Byte-level tokenizers give each of them the offsets of the character."""
    groups = kd.byte_groups([(0, 1), (0, 1), (1, 2)], [(0, 1), (1, 2)])
    assert [tuple(map(list, group)) for group in groups] == [([0, 1], [0]), ([2], [1])]
    both = [(0, 1), (0, 1), (1, 1), (1, 3)]
    groups = kd.byte_groups(both, both)
    assert [tuple(map(list, g)) for g in groups] == [([0, 1], [0, 1]), ([2], [2]), ([3], [3])]


def test_a_group_does_not_end_within_a_character():
    """Byte-level tokens of "na", i with two dots, "ve": one has a character's end and the next one."""
    student, teacher = [(0, 1), (1, 3), (2, 4), (4, 5)], [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    by_bytes = kd.byte_groups([1, 2, 2, 1], [1, 1, 2, 1, 1])
    assert kd.byte_groups(student, teacher) == by_bytes
    assert [tuple(map(list, group)) for group in by_bytes] == [([0], [0]), ([1, 2], [1, 2, 3]), ([3], [4])]


def test_log_mass_wants_labels_like_the_source():
    pairs = kd.align_tokens([[0, 1]], [[0, 1]], [[([0, 1], [0, 1])]])
    with pytest.raises(
        ValueError, match=r"labels must have the leading shape of the source, \(2, 3\); got \(2, 2\)"
    ):
        pairs.student.log_mass(torch.randn(2, 3, 5), torch.zeros(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("rows", [torch.tensor([True, False]), [-100, 3], [0.5, 1.0], [[0, 1]]])
def test_what_are_no_rows_is_refused(rows):
    with pytest.raises(ValueError, match="student_rows must hold row numbers"):
        kd.align_tokens([rows], [[0, 1]])


@pytest.mark.parametrize(
    "call",
    [
        lambda side: side.take(torch.randn(2, 2, 5)),
        lambda side: side.take_labels(torch.zeros(2, 2)),
        lambda side: side.log_mass_of(torch.zeros(2, 2)),
        lambda side: side.log_mass(torch.randn(2, 2, 5), torch.zeros(2, 2, dtype=torch.int64)),
    ],
    ids=["take", "take_labels", "log_mass_of", "log_mass"],
)
def test_rows_beyond_the_tokens_are_named(call):
    pairs = kd.align_tokens([[7, 7, 7]], [[0, 1]], [[([0, 1, 2], [0, 1])]])
    with pytest.raises(ValueError, match="row 7 of an alignment, but there are 4 tokens"):
        call(pairs.student)
