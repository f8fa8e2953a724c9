"""Caches killed while written, and files that anything has happened to."""

import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from caches import assert_same, create, records, teacher, write
from hostile import relist

import kd_kernels as kd

pytest.importorskip("pyarrow", reason="a teacher cache is made of Arrow files")

COUNT = 8


@pytest.fixture
def quick_path(tmp_path):
    """A folder in memory, where there is one: cutting a file short takes a disk's journal a millisecond."""
    if not os.path.isdir("/dev/shm"):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def written():
    return records(COUNT)


def fork(work):
    """The process id of a fork that does ``work`` and ends without anything of ours being closed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def survives(work):
    """``work`` in a process of its own, where a crash is a failed test and not the end of them all."""
    _, status = os.waitpid(fork(work), 0)
    assert status == 0, (
        f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "see the traceback above"
    )


def write_the_rest(path, written, report=None, **options):
    """What a writer does that is started again and again. ``report``: where to say what is committed."""
    with create(path, **{"shard_bytes": 1000, **options}) as writer:
        for name, record in written.items():
            if name not in writer:
                writer.append(name, record)
                if report is not None:
                    writer.flush()
                    os.write(report, f"{name}\n".encode())


def committed(path, written):
    """What a reader finds, each sequence compared."""
    if not (path / "manifest.json").exists():
        return []
    cache = kd.TeacherCache.open(path)
    for name in cache:
        assert_same(cache[name], written[name])
    return list(cache)


def half_done(path):
    """What writers that were killed between the first and the last step of committing something left."""
    if not (path / "manifest.json").exists():
        return set()
    torn = {
        (file.name, file.stat().st_size)
        for file in path.glob("*.jsonl")
        if file.stat().st_size and not file.read_bytes().endswith(b"\n")
    }
    return torn | {(name, (path / name).stat().st_ino) for name in kd.TeacherCache.open(path).unlisted()}


@pytest.mark.parametrize("writers", [1, 2])
def test_killed_fifty_times(tmp_path, writers):
    """At random moments, all writers at once: whatever one said was committed is there, and the next ones go
    on. A reader that comes while they write finds what is committed then."""
    rng = random.Random(writers)
    written = records(24)
    mine = [dict(list(written.items())[rank::writers]) for rank in range(writers)]
    write_the_rest(tmp_path / "imports", written)  # pyarrow loads much at first use, and forks have it then
    latest = 0.05
    kills, amid, finished, path, said, before = 0, 0, 0, tmp_path / "0", set(), set()
    while kills < 50:
        had = len(said)
        source, report = os.pipe()
        children = [
            fork(partial(write_the_rest, path, mine[rank], report, rank=rank)) for rank in range(writers)
        ]
        os.close(report)
        time.sleep(rng.uniform(0.001, latest))
        if kills % 2 and path.exists():
            committed(path, written)
        for child in children:
            os.kill(child, signal.SIGKILL)
        ends = [os.waitpid(child, 0)[1] for child in children]
        assert all(os.WIFSIGNALED(end) or end == 0 for end in ends)
        with os.fdopen(source) as pipe:
            said |= {line[:-1] for line in pipe if line.endswith("\n")}
        killed = any(os.WIFSIGNALED(end) for end in ends)
        kills += killed
        amid += bool(half_done(path) - before)
        before = half_done(path)
        found = committed(path, written)
        assert said <= set(found)
        if not killed or len(found) == had:  # as fast as this machine is today
            latest *= 1.2 if killed else 1 / 1.2
        said = set(found)
        if len(found) == len(written):
            finished += 1
            path, said, before = tmp_path / str(finished), set(), set()
    assert finished >= 2 and amid >= 5, f"{finished} caches were finished, {amid} kills met a write"
    for rank in range(writers):
        write_the_rest(path, mine[rank], rank=rank)
    assert sorted(committed(path, written)) == sorted(written)


STEPS = ("fsync", "replace", "ftruncate", "link")


def killed_at(path, written, step):
    """A writer that dies before its ``step``-th call to the file system; whether it came to that."""

    def work():
        calls = 0
        for name in STEPS:
            right = getattr(os, name)

            def counted(*arguments, right=right):
                nonlocal calls
                calls += 1
                if calls == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return right(*arguments)

            setattr(os, name, counted)
        write_the_rest(path, written)

    _, status = os.waitpid(fork(work), 0)
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


def test_killed_at_every_step(tmp_path, written):
    few = dict(list(written.items())[:5])
    step, counts = 1, []
    while killed_at(tmp_path / str(step), few, step):
        path = tmp_path / str(step)
        found = committed(path, few)
        assert found == list(few)[: len(found)]
        counts.append(len(found))
        write_the_rest(path, few)
        assert committed(path, few) == list(few)
        assert kd.TeacherCache.open(path).unlisted() == [f for f in os.listdir(path) if "manifest.json." in f]
        step += 1
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 5 and step > 15


def test_a_torn_last_line(tmp_path, written):
    """Cut anywhere: the shards before it are there, and the writer writes the last one again."""
    few = dict(list(written.items())[:5])
    whole = tmp_path / "whole"
    shards = [list(shard.ids) for shard in write(whole, few, shard_bytes=1000).shards]
    journal = (whole / "shards-00000.jsonl").read_bytes()
    begin = journal[:-1].rindex(b"\n") + 1
    for cut in {begin, begin + 1, begin + 40, len(journal) - 1}:
        path = tmp_path / str(cut)
        shutil.copytree(whole, path)
        (path / "shards-00000.jsonl").write_bytes(journal[:cut])
        assert committed(path, few) == sum(shards[:-1], [])
        write_the_rest(path, few)
        assert committed(path, few) == list(few)


def test_a_torn_line_longer_than_the_next(tmp_path, written):
    """Nothing of it stays behind what is written over it."""
    write(tmp_path, {"a": written["sequence 0"]})
    with open(tmp_path / "shards-00000.jsonl", "ab") as stream:
        stream.write(b'{"content":' + b"x" * 5000)
    with create(tmp_path) as writer:
        writer.append("b", written["sequence 1"])
    assert committed(tmp_path, {"a": written["sequence 0"], "b": written["sequence 1"]}) == ["a", "b"]
    assert (tmp_path / "shards-00000.jsonl").read_bytes().endswith(b"}\n")
    with create(tmp_path) as writer:
        assert writer.committed == {"a", "b"}


def test_a_full_disk(tmp_path, written, monkeypatch):
    """The error comes through, and nothing half-written is listed."""
    with create(tmp_path) as writer:
        writer.append("a", written["sequence 0"])
        writer.flush()

        def fails(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fails)
            writer.append("b", written["sequence 1"])
            with pytest.raises(OSError, match="No space left"):
                writer.flush()
            assert writer.committed == {"a"}
    assert list(kd.TeacherCache.open(tmp_path)) == ["a", "b"]  # leaving the writer tried again


# --- fuzzing ------------------------------------------------------------------------------------------


def mutated(data, rng):
    """``data`` with bits flipped, bytes overwritten, removed, inserted or exchanged, or cut short."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at] = rng.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + rng.randrange(1, 9)]
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 5 and len(data) >= 8:
            at -= at % 4
            number = rng.choice((0, -1, 1 << 30, (1 << 31) - 1, -(1 << 31), rng.randrange(256)))
            data[at : at + 4] = number.to_bytes(4, "little", signed=True)
        elif data:
            other = rng.randrange(len(data))
            data[at : at + 8], data[other : other + 8] = data[other : other + 8], data[at : at + 8]
    return bytes(data)


def read_all(path, written):
    """How many sequences were read, each of them right; None where the cache was refused."""
    try:
        cache = kd.TeacherCache.open(path)
        found = {name: cache[name] for name in cache}
    except kd.CacheError as error:
        assert str(path) in str(error), error
        return None
    for name, record in found.items():
        assert_same(record, written[name])
    return len(found)


def test_ten_thousand_mutated_files(quick_path):
    """Each an error that names the file, or the right data."""
    survives(partial(read_mutated_files, quick_path))


def read_mutated_files(quick_path):
    rng = random.Random(1)
    # One token in a row, so that much of each file is structure.
    few = {f"s{i}": teacher(1 + i, i) for i in range(3)}
    write(quick_path, few, shard_bytes=200)
    files = sorted(quick_path.iterdir())
    right = {file: file.read_bytes() for file in files}
    refused = 0
    for _ in range(10_000):
        file = rng.choice(files)
        file.write_bytes(mutated(right[file], rng))
        count = read_all(quick_path, few)
        if count is None:
            refused += 1
        elif count < len(few):  # a journal cut at or in a line, as by a kill: what follows was not committed
            whole = file.read_bytes().rpartition(b"\n")
            assert file.suffix == ".jsonl" and right[file].startswith(whole[0] + whole[1])
            assert len(kd.TeacherCache.open(quick_path).unlisted()) == len(few) - count
        file.write_bytes(right[file])
    assert refused > 8_000, refused
    assert read_all(quick_path, few) == len(few)


def test_mutated_shards_with_right_checksums(quick_path):
    """What no checksum catches is refused by form, or read as values that are in range and of the form asked
    for: nothing is read outside the file."""
    survives(partial(read_mutated_shards, quick_path))


def read_mutated_shards(quick_path):
    rng = random.Random(2)
    few = {f"s{i}": teacher(2 + i, i) for i in range(2)}
    write(quick_path, few, shard_bytes=1 << 20)
    file = quick_path / "shard-00000-000000.arrow"
    right, journal = file.read_bytes(), (quick_path / "shards-00000.jsonl").read_bytes()
    outcomes = {"refused": 0, "read": 0}
    for _ in range(500):
        data = mutated(right, rng)
        file.write_bytes(data or b"\0")
        relist(quick_path)
        try:
            cache = kd.TeacherCache.open(quick_path)
            for name in cache:
                record = cache[name]
                assert len(record) == len(few[name].lse)
                for ids in (record.ids, record.sample_ids):
                    assert -1 <= ids.min() and ids.max() < cache.manifest.vocab_size
                assert record.sample_counts.sum(-1).max() <= 12 * 12
                assert record.ids.shape == few[name].ids.shape
            outcomes["read"] += 1
        except kd.CacheError as error:
            assert str(quick_path) in str(error)
            outcomes["refused"] += 1
        (quick_path / "shards-00000.jsonl").write_bytes(journal)
    assert min(outcomes.values()) > 20, outcomes


def test_ids_outside_the_vocabulary(tmp_path):
    """In a file whose every checksum is right."""
    record = teacher(4, 0)
    write(tmp_path, {"a": record})
    file = tmp_path / "shard-00000-000000.arrow"
    data = file.read_bytes()
    ids = bytes(record.ids.contiguous().view(torch.uint8).flatten().tolist())
    at = data.index(ids)
    for bad in (97, -2, 1 << 30):
        file.write_bytes(data[:at] + bad.to_bytes(4, "little", signed=True) + data[at + 4 :])
        relist(tmp_path)
        with pytest.raises(kd.CacheError, match=rf"arrow: ids holds {bad}, outside the vocabulary of 97"):
            kd.TeacherCache.open(tmp_path)["a"]
