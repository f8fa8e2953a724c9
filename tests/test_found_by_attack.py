"""Faults that fresh eyes found in the losses between points and their neighbours, one test each."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kd_kernels as kd

LABEL = torch.tensor([156, 3, 199])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: kd.distill(x, y, kd.SinkhornBatch()),
        lambda x, y: kd.feature_transport(x, y, epsilon=0.3),
        lambda x, y: kd.feature_transport(x, y, epsilon=0.3, gradient="unrolled"),
        lambda x, y: kd.relational_angle(x, y),
        lambda x, y: kd.distill(x, y, kd.SortedWasserstein()),
    ],
)
def test_checkpointing(loss, reentrant):
    x, y = torch.randn(6, 11, requires_grad=True), torch.randn(6, 11)
    (want,) = torch.autograd.grad(loss(x, y), x)
    checkpoint(loss, x, y, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, want)


def test_a_character_of_several_tokens():
    """Byte-level tokenizers give each of them the offsets of the character."""
    groups = kd.byte_groups([(0, 1), (0, 1), (1, 2)], [(0, 1), (1, 2)])
    assert [tuple(map(list, group)) for group in groups] == [([0, 1], [0]), ([2], [1])]
    both = [(0, 1), (0, 1), (1, 1), (1, 3)]
    groups = kd.byte_groups(both, both)
    assert [tuple(map(list, g)) for g in groups] == [([0, 1], [0, 1]), ([2], [2]), ([3], [3])]


def test_classes_within_the_range_have_finite_gradients():
    """Confident students and teachers, the cost's range just inside the bound."""
    torch.manual_seed(0)
    for classes in (2, 20):
        cost = torch.rand(classes, classes)
        cost = cost / (cost.max() - cost.min()) * (0.05 * 39.9)
        z = (200 * torch.randn(64, classes)).requires_grad_()
        kd.class_transport(z, 200 * torch.randn(64, classes), cost).backward()
        assert z.grad.isfinite().all()
    with pytest.raises(ValueError, match="more than 40 times"):
        kd.class_transport(z, z, cost * 1.01)
    kd.class_transport(z.double(), z.double(), cost.double() * 1.4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_small_label_types_do_not_wrap(dtype):
    cost, student, teacher = torch.rand(200, 200), torch.randn(3, 200), torch.randn(3, 200)
    want = kd.class_transport(student, teacher, cost, LABEL, reduction="none")
    assert torch.equal(kd.class_transport(student, teacher, cost, LABEL.to(dtype), reduction="none"), want)


@pytest.mark.parametrize("silent", ["mask", "soft_weight"])
def test_a_mass_that_does_not_count_may_be_anything(silent):
    z, t = torch.randn(6, 11, requires_grad=True), torch.randn(6, 11)
    mass = torch.zeros(6)
    options = {"mask": torch.tensor([1, 0, 1, 1, 1, 1]).bool()} if silent == "mask" else {"soft_weight": 0.0}
    if silent == "mask":
        mass[1] = torch.nan
    else:
        t[1] = torch.nan
    mass.requires_grad_()
    loss = kd.distill(z, t, kd.SortedWasserstein(student_log_mass=mass), **options)
    loss.backward()
    assert loss.isfinite() and mass.grad.isfinite().all() and z.grad.isfinite().all()


def test_double_backward_through_a_mass_raises():
    z, mass = torch.randn(6, 11, requires_grad=True), torch.zeros(6, requires_grad=True)
    loss = kd.distill(z, torch.randn(6, 11), kd.SortedWasserstein(student_log_mass=mass))
    (slope,) = torch.autograd.grad(loss, mass, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        slope.square().sum().backward()


@pytest.mark.parametrize("cost", kd.transport.COSTS)
def test_inference_tensors(cost):
    x = torch.randn(2, 6, 4, requires_grad=True)
    with torch.inference_mode():
        y, mask = torch.randn(2, 6, 4), torch.rand(2, 6) < 0.7
    kd.sequence_transport(x, y, cost=cost, epsilon=0.3, student_mask=mask, teacher_mask=mask).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("cost", kd.transport.COSTS)
def test_an_infinite_state_spoils_its_sequence_only(cost):
    x, y = torch.randn(3, 6, 4), torch.randn(3, 5, 4)
    want = kd.sequence_transport(x, y, cost=cost, epsilon=0.3, reduction="none")
    x[1, 2, 3] = torch.inf
    got = kd.sequence_transport(x, y, cost=cost, epsilon=0.3, reduction="none")
    assert got[1].isnan() and torch.equal(got[::2], want[::2])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_cosines_of_states_of_any_size(size):
    x, y = torch.randn(6, 4), torch.randn(5, 4)
    want = kd.feature_transport(x, y, epsilon=0.3)
    assert torch.allclose(kd.feature_transport(size * x, y / size, epsilon=0.3), want, rtol=1e-5)


def test_one_side_without_entries_is_a_problem_of_nothing():
    cost = torch.rand(2, 4, 200, requires_grad=True)
    lengths = torch.tensor([[0, 100], [4, 100]], dtype=torch.int8)
    found = kd.sinkhorn(cost, epsilon=0.1, lengths=lengths)
    found.transport_cost.sum().backward()
    assert found.transport_cost[0] == 0 and found.transport_cost[1] > 0
    assert not cost.grad[0].any() and cost.grad[1].any()
    assert kd.sinkhorn(torch.rand(2, 0, 3), epsilon=0.1).transport_cost.tolist() == [0, 0]


@pytest.mark.parametrize("rows", [torch.tensor([True, False]), [-100, 3], [0.5, 1.0], [[0, 1]]])
def test_what_are_no_rows_is_refused(rows):
    with pytest.raises(ValueError, match="student_rows must hold row numbers"):
        kd.align_tokens([rows], [[0, 1]])


def test_rows_beyond_the_tokens_are_named():
    pairs = kd.align_tokens([[0, 7]], [[0, 1]])
    with pytest.raises(ValueError, match="row 7 of an alignment, but there are 4 tokens"):
        pairs.student.take(torch.randn(2, 2, 5))
