"""A cache joined to tokens: by id, over workers and ranks, from any place in an epoch."""

import pytest
import torch
from caches import FIELDS, VOCAB, K, records, write
from torch.utils.data import DataLoader

import kd_kernels as kd
from kd_kernels.cache.dataset import PadTogether, ResumableSampler, TeacherDataset

pytest.importorskip("pyarrow", reason="a teacher cache is made of Arrow files")

COUNT = 11


@pytest.fixture
def joined(tmp_path):
    written = records(COUNT)
    write(tmp_path, written)
    # in another order than the cache's
    tokens = [
        {"sequence_id": name, "input_ids": torch.arange(len(record.lse)) + 1}
        for name, record in reversed(written.items())
    ]
    return TeacherDataset(tokens, tmp_path), written


@pytest.mark.parametrize("workers, start", [(0, None), (2, "fork"), (1, "spawn")])
def test_joined_by_id(joined, workers, start):
    dataset, written = joined
    loader = DataLoader(
        dataset,
        batch_size=3,
        num_workers=workers,
        multiprocessing_context=start,
        collate_fn=PadTogether(pad_token_id=5),
    )
    seen = 0
    for batch in loader:
        for row, mask in enumerate(batch["attention_mask"]):
            record = written[f"sequence {COUNT - 1 - seen}"]
            length = int(mask.sum())
            assert length == len(record.lse)
            for name in FIELDS:
                assert torch.equal(getattr(batch["teacher"], name)[row, :length], getattr(record, name)), name
            assert (batch["teacher"].ids[row, length:] == -1).all()
            assert (batch["labels"][row, length:] == -100).all()
            assert (batch["input_ids"][row, length:] == 5).all()
            seen += 1
    assert seen == COUNT


def test_padding_does_not_count(joined):
    """A padded batch has the loss of its sequences one by one."""
    dataset, written = joined
    batch = PadTogether()([dataset[0], dataset[3]])
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths[0] != lengths[1]
    student = torch.randn(2, max(lengths), VOCAB)
    for pick in (lambda r: r.target(), lambda r: r.target("teacher_renorm"), lambda r: r.sampled()):
        mask = batch["attention_mask"].bool()
        together = kd.distill(student, pick(batch["teacher"]), kd.ForwardKL(), mask=mask, reduction="sum")
        apart = sum(
            kd.distill(student[row, :length], pick(dataset[i]["teacher"]), kd.ForwardKL(), reduction="sum")
            for row, (i, length) in enumerate(zip((0, 3), lengths))
        )
        torch.testing.assert_close(together, apart)
    assert batch["teacher"].ids.shape == (2, max(lengths), K)


def test_what_does_not_fit(joined):
    dataset, _ = joined
    dataset.tokens[0]["input_ids"] = torch.arange(99)
    with pytest.raises(kd.CacheError, match="length: sequence 'sequence 10' has 3 tokens .* and 99"):
        dataset[0]
    dataset.tokens[1]["sequence_id"] = "nowhere"
    with pytest.raises(kd.CacheError, match="the cache has no sequence 'nowhere'"):
        dataset[1]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_an_epoch(world):
    samplers = [ResumableSampler(COUNT, rank=r, world_size=world, seed=7) for r in range(world)]
    epochs = []
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_position(epoch)
        dealt = [list(sampler) for sampler in samplers]
        together = sum(dealt, [])
        assert len(set(together)) == len(together) == COUNT // world * world
        assert {len(mine) for mine in dealt} == {len(samplers[0])}
        epochs.append(dealt)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("then", [1, 2, 3])
def test_goes_on_in_the_middle(then):
    """Two ranks stop after four sequences; any number of ranks does the others, each once."""
    first = [ResumableSampler(COUNT, rank=r, world_size=2, seed=1) for r in range(2)]
    done = [i for sampler in first for i in list(sampler)[:2]]
    later = [ResumableSampler(COUNT, rank=r, world_size=then, seed=1) for r in range(then)]
    for sampler in later:
        sampler.set_position(0, consumed=4)
    rest = [i for sampler in later for i in sampler]
    assert not set(done) & set(rest)
    assert len(set(done + rest)) == len(done + rest) == 4 + (COUNT - 4) // then * then
    with pytest.raises(ValueError, match=r"consumed must be in \[0, 11\], got 12"):
        later[0].set_position(0, consumed=12)
