"""A cache joined to tokens: by id, over workers and ranks, from any place in an epoch."""

import os

import numpy as np
import pytest
import torch
from caches import FIELDS, VOCAB, K, create, records, teacher, write
from torch.utils.data import DataLoader

import kd_kernels as kd
from kd_kernels.cache.dataset import PadTogether, ResumableSampler, TeacherDataset
from kd_kernels.cache.record import TeacherRecord

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


@pytest.mark.parametrize("workers, start", [(0, None), (2, "fork"), (2, "spawn")])
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


def test_an_item_s_own_mask_labels_and_integers():
    def item(tokens, **more):
        top = teacher(len(tokens), 0)
        record = TeacherRecord(top.ids, top.logits, top.lse, top.log_tail_mass, None, 1.0)
        return {"input_ids": tokens, "teacher": record, **more}

    batch = PadTogether(pad_token_id=7)(
        [
            item([]),
            item([1, 2], attention_mask=[1, 0], labels=None),
            item(np.array([1, 2, 65535], np.uint16), attention_mask=torch.tensor([0, 1, 1])),
            item([3, 4], labels=[-100, 9]),
        ]
    )
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "labels")} == {torch.int64}
    assert batch["input_ids"].tolist() == [[7, 7, 7], [1, 2, 7], [1, 2, 65535], [3, 4, 7]]
    assert batch["attention_mask"].tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100] * 3, [1, -100, -100], [-100, 2, 65535], [-100, 9, -100]]
    with pytest.raises(TypeError, match="input_ids must be integers, got torch.float32"):
        PadTogether()([item([1.0])])
    with pytest.raises(ValueError, match="labels must have the 2 tokens of its item"):
        PadTogether()([item([1, 2], labels=[1])])


def test_any_seed():
    assert sorted(ResumableSampler(5, rank=0, world_size=1, seed=2**45)) == list(range(5))


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


def test_goes_on_twice():
    """Stopped, gone on with by other ranks, stopped again: every sequence once, whatever the ranks."""
    seen, consumed = [], 0
    for world, each in ((2, 2), (3, 1), (1, 4)):
        samplers = [ResumableSampler(COUNT, rank=r, world_size=world, seed=5) for r in range(world)]
        for sampler in samplers:
            sampler.set_position(3, consumed)
            seen += list(sampler)[:each]
        consumed += world * each
    assert sorted(seen) == list(range(COUNT)) and consumed == COUNT
    for sampler in samplers:
        assert len(sampler) == 4
        sampler.set_position(3, consumed)
        assert list(sampler) == [] and len(sampler) == 0


def test_goes_on_with_the_batches_that_were_next(joined):
    """In the loader, workers ahead of the training loop included."""
    dataset, _ = joined

    def loader(consumed):
        sampler = ResumableSampler(COUNT, rank=0, world_size=1, seed=2)
        sampler.set_position(1, consumed)
        return DataLoader(dataset, 2, sampler=sampler, num_workers=2, collate_fn=PadTogether())

    whole = [batch["input_ids"] for batch in loader(0)]
    iterator = iter(loader(0))
    first = [next(iterator)["input_ids"] for _ in range(2)]
    del iterator
    rest = [batch["input_ids"] for batch in loader(4)]
    assert len(whole) == len(first + rest) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole, first + rest))


def _share_of_an_epoch(rank, dataset, store, results):
    """What one of two processes of torch.distributed is given; its rank is that of the process group."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    sampler = ResumableSampler(len(dataset), seed=4)
    loader = DataLoader(dataset, 2, sampler=sampler, num_workers=2, collate_fn=PadTogether())
    found = []
    for batch in loader:
        lengths = torch.tensor(batch["teacher"].lse.shape)
        torch.distributed.all_reduce(lengths)  # hangs where one rank has a batch more
        mask = batch["attention_mask"].bool()
        found += [
            (int(n), round(float(x.sum()), 3)) for n, x in zip(mask.sum(1), batch["teacher"].lse * mask)
        ]
    with create(store.parent / "by rank") as writer:
        writer.append(rank, teacher(3, rank))
    results.put((rank, found))
    torch.distributed.barrier()
    results.close()
    results.join_thread()
    os._exit(0)  # gloo's threads may abort the interpreter's own end on a busy machine


def test_two_processes_and_their_workers(joined, tmp_path):
    """Sequences of different lengths: as many batches for both and none for both. Each writes as its rank."""
    dataset, written = joined
    fork = torch.multiprocessing.get_context("fork")
    results = fork.Queue()
    arguments = (dataset, tmp_path / "store", results)
    processes = [fork.Process(target=_share_of_an_epoch, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    shares = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    shards = kd.TeacherCache.open(tmp_path / "by rank").shards
    assert [(s.name, s.ids) for s in shards] == [(f"shard-0000{r}-000000.arrow", (str(r),)) for r in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == COUNT // 2
    seen = shares[0] + shares[1]
    exact = {(len(r.lse), round(float(r.lse.sum()), 3)) for r in written.values()}
    assert len(exact) == COUNT and len(set(seen)) == len(seen) and set(seen) <= exact
