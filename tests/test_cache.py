"""Teachers on disk: what is written is read back, and nothing else is."""

import itertools
import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from caches import FIELDS, SAMPLES, VOCAB, K, assert_same, create, records, teacher, write

import kd_kernels as kd
from kd_kernels.cache import manifest as manifests

pytest.importorskip("pyarrow", reason="a teacher cache is made of Arrow files")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("temperature", [1.0, 2.5, (1.0, 2.0), (3.0,)])
def test_bit_for_bit(tmp_path, dtype, temperature):
    written = records(9, temperature=temperature, dtype=getattr(torch, dtype))
    cache = write(tmp_path, written, temperature=temperature, dtype=dtype)
    assert list(cache) == list(written) and len(cache) == 9 and len(cache.shards) > 1
    assert cache.tokens == sum(len(record.lse) for record in written.values())
    for name in reversed(written):  # in any order
        assert_same(cache[name], written[name])
        assert cache.length(name) == len(written[name].lse)
    assert cache.unlisted() == []


@pytest.mark.parametrize("k, samples", [(K, 0), (0, SAMPLES), (VOCAB, 300)])
def test_parts_alone(tmp_path, k, samples):
    """Only a top-K, only draws; the whole vocabulary, and more draws than a byte counts."""
    written = records(3, k=k, samples=samples)
    cache = write(tmp_path, written, k=k, samples=samples)
    for name, record in written.items():
        if not k:
            record = record._replace(ids=None, logits=None)
        assert_same(cache[name], record)
    if not k:
        with pytest.raises(ValueError, match="k = 0"):
            cache["sequence 0"].target()
    if not samples:
        with pytest.raises(ValueError, match="samples = 0"):
            cache["sequence 0"].sampled()


def test_float16(tmp_path):
    """Log-probabilities to 1 part in 2000 of their distance from the largest, wherever the logits lie."""
    written = records(4, temperature=(1.0, 2.0))
    cache = write(tmp_path, written, temperature=[1.0, 2.0], dtype="float16")
    for name, record in written.items():
        found = cache[name]
        assert found.logits.dtype == torch.float16 and found.logits.max() == 0
        for index, temperature in enumerate((1.0, 2.0)):
            ours, exact = found.target(index=index), record.target(index=index)
            assert ours.temperature == exact.temperature == temperature
            assert torch.equal(ours.ids, exact.ids)
            gap = (exact.logprobs[:, :1] - exact.logprobs).abs()
            assert ((ours.logprobs - exact.logprobs).abs() <= gap / 2000 + 4e-6).all()
            assert torch.equal(ours.log_tail_mass, exact.log_tail_mass)
        ours, exact = found.sampled(), record.sampled()
        assert ours.temperature == exact.temperature == 1.0
        assert torch.equal(ours.ids, exact.ids) and torch.equal(ours.logprobs, exact.logprobs)
        with pytest.raises(
            ValueError, match="one of the 2 temperatures that were saved, counted from 0; got 2"
        ):
            found.target(index=2)


@pytest.mark.parametrize("missing", ["tail", "teacher_renorm", "renorm_both"])
def test_the_loss_is_that_of_the_teacher(tmp_path, missing):
    record = teacher(7, 0, temperature=2.0)
    found = write(tmp_path, {"a": record}, temperature=2.0)["a"]
    student = torch.randn(7, VOCAB)
    loss = kd.distill(student, found.target(missing), kd.ForwardKL(), temperature=2.0)
    assert loss == kd.distill(student, record.target(missing), kd.ForwardKL(), temperature=2.0)
    drawn = kd.distill(student, found.sampled(), kd.ForwardKL(), temperature=2.0)
    assert drawn == kd.distill(student, record.sampled(), kd.ForwardKL(), temperature=2.0)


def test_broken_and_short_rows(tmp_path):
    """NaN, +inf, fewer than k finite, and no tokens at all, as they were."""
    logits = torch.randn(4, VOCAB)
    logits[0, 3], logits[1, 5], logits[2, 2:], logits[3] = float("nan"), float("inf"), -float("inf"), 0.0
    record = kd.linear_topk(logits, K, samples=SAMPLES, seed=0)
    empty = kd.linear_topk(logits[:0], K, samples=SAMPLES, seed=0)
    cache = write(tmp_path, {"a": record, "none": empty})
    assert_same(cache["a"], record)
    assert_same(cache["none"], empty)
    assert (record.ids[2] == -1).any()
    half = write(tmp_path / "half", {"a": record, "none": empty}, dtype="float16")["a"]
    assert torch.equal(half.target().logprobs[3], record.target().logprobs[3])
    assert torch.equal(half.ids, record.ids) and len(half.logits) == 4


def test_batches(tmp_path):
    logits = torch.randn(3, 6, VOCAB)
    saved = kd.linear_topk(logits, K, samples=SAMPLES, seed=3)
    with create(tmp_path) as writer:
        writer.append_batch([10, 11, 12], saved, [6, 2, 4])
        with pytest.raises(ValueError, match="as many sequences"):
            writer.append_batch([1], saved, [6, 2, 4])
        with pytest.raises(ValueError, match=r"lengths\[1\] must be in \[0, 6\], got 7"):
            writer.append_batch([20, 21, 22], saved, [6, 7, 4])
    cache = kd.TeacherCache.open(tmp_path)
    assert cache.length(11) == 2 and 12 in cache and "12" in cache and 13 not in cache
    for name in FIELDS:
        assert torch.equal(getattr(cache[12], name), getattr(saved, name)[2, :4]), name


def test_datasets_opens_a_shard(tmp_path):
    datasets = pytest.importorskip("datasets", reason="is about shards as datasets sees them")
    written = records(4)
    cache = write(tmp_path, written, shard_bytes=500)
    opened = datasets.Dataset.from_file(str(tmp_path / cache.shards[0].name))
    row, record = opened[0], written[opened[0]["sequence_id"]]
    assert row["length"] == len(record.lse)
    assert torch.equal(torch.tensor(row["ids"]), record.ids.long())
    assert torch.equal(torch.tensor(row["logits"]), record.logits)
    assert [pair["id"] for pair in row["samples"][0]] == [i for i in record.sample_ids[0].tolist() if i >= 0]
    shards = [datasets.Dataset.from_file(str(tmp_path / shard.name)) for shard in cache.shards]
    assert datasets.concatenate_datasets(shards)["sequence_id"][:] == list(cache) and len(shards) > 1


def test_no_pickle_and_no_pyarrow_before_it_is_used(tmp_path):
    code = "import sys, kd_kernels; assert 'pyarrow' not in sys.modules and 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": sys.path[0]})
    write(tmp_path, records(2))
    for file in tmp_path.iterdir():
        assert file.suffix in (".json", ".jsonl", ".arrow")
        if file.suffix != ".arrow":
            for line in file.read_text().splitlines():
                json.loads(line)


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install pyarrow"):
        create(tmp_path)


# --- writing ------------------------------------------------------------------------------------------


def test_resumes(tmp_path):
    written = records(10)
    names = list(written)
    with create(tmp_path) as writer:
        for name in names[:4]:
            writer.append(name, written[name])
        writer.flush()
        assert writer.committed == set(names[:4])
        with pytest.raises(ValueError, match="'sequence 2' is in the cache already"):
            writer.append("sequence 2", written["sequence 2"])
    with create(tmp_path) as writer:
        assert [name for name in names if name in writer] == names[:4]
        for name in names:
            if name not in writer:
                writer.append(name, written[name])
    cache = kd.TeacherCache.open(tmp_path)
    for name in names:
        assert_same(cache[name], written[name])
    with pytest.raises(ValueError, match="closed"):
        writer.append("late", written["sequence 0"])


def test_an_exception_loses_nothing(tmp_path):
    written = records(2)
    with pytest.raises(RuntimeError, match="the teacher failed"):
        with create(tmp_path, shard_bytes=1 << 20) as writer:
            writer.append("a", written["sequence 0"])
            raise RuntimeError("the teacher failed")
    assert_same(kd.TeacherCache.open(tmp_path)["a"], written["sequence 0"])


@pytest.mark.parametrize(
    "field, value", [("model", "other"), ("vocab_size", 98), ("temperature", 2.0), ("k", 5), ("samples", 0)]
)
def test_another_cache_is_there(tmp_path, field, value):
    write(tmp_path, records(1))
    with pytest.raises(kd.CacheError, match=f"manifest.json: {field} is .* in the cache that is there"):
        create(tmp_path, **{field: value})


@pytest.mark.parametrize(
    "field, value",
    [
        ("model", 3),
        ("vocab_size", 0),
        ("k", VOCAB + 1),
        ("samples", -1),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("temperature", []),
        ("dtype", "int8"),
    ],
)
def test_no_such_cache(tmp_path, field, value):
    with pytest.raises(kd.CacheError, match=f"^{field} must be"):
        create(tmp_path, **{field: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r._replace(ids=r.ids + VOCAB), r"ids must be in \[-1, 97\)"),
        (lambda r: r._replace(ids=r.ids[:, :3]), r"ids must be \(5, 6\).*got \(5, 3\)"),
        (lambda r: r._replace(lse=r.lse[:3]), r"ids must be \(3, 6\)"),
        (lambda r: r._replace(sample_ids=None), r"sample_ids and sample_counts must be \(5, 12\); got None"),
        (lambda r: r._replace(sample_counts=r.sample_counts * 0), r"sample_counts must be in \[1, 12\]"),
        (lambda r: r._replace(temperature=2.0), "made at temperature 2.0, the cache is of 1.0"),
        (lambda r: r._replace(temperature=(1.0,)), r"made at temperature \(1.0,\)"),
    ],
)
def test_records_that_do_not_fit(tmp_path, change, message):
    with create(tmp_path) as writer:
        with pytest.raises(ValueError, match=message):
            writer.append("a", change(teacher(5, 0)))
        with pytest.raises(TypeError, match="sequence_id must be a string or an int, got float"):
            writer.append(1.5, teacher(5, 0))
        assert "a" not in writer


def _write_as(path, rank, names):
    torch.set_num_threads(1)
    with create(path, rank=rank, shard_bytes=600) as writer:
        for name in names:
            writer.append(name, teacher(3, int(name)))


def test_several_processes(tmp_path):
    """At once, from the making of the directory on."""
    fork = multiprocessing.get_context("fork")
    path = tmp_path / "new" / "cache"
    processes = [
        fork.Process(target=_write_as, args=(path, rank, [str(i) for i in range(rank, 12, 3)]))
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    cache = kd.TeacherCache.open(path)
    assert sorted(cache, key=int) == [str(i) for i in range(12)] and cache.unlisted() == []
    for i in range(12):
        assert_same(cache[i], teacher(3, i))


def test_processes_of_one_id(tmp_path, monkeypatch):
    """In containers: one begins its draft while the other's, just linked, is the manifest."""
    write_durably, link = manifests.write_durably, os.link
    ours, drafts, published = manifests.Manifest("toy", 97, 6, 1.0), [], []

    def write_late(file, data):
        drafts.append(file)
        if len(drafts) == 1:
            manifests.agree_on_manifest(tmp_path, ours)
        write_durably(file, data)

    def link_and_draft(draft, file):
        link(draft, file)
        drafts[0].write_bytes(b"")
        published.append(manifests.read_manifest(tmp_path))

    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(os, "link", link_and_draft)
    monkeypatch.setattr(manifests, "write_durably", write_late)
    manifests.agree_on_manifest(tmp_path, ours)
    assert published == [ours] and len(drafts) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


def test_memory_that_the_caller_fills_anew(tmp_path):
    """One set of buffers for all batches, before anything is flushed."""
    written = records(3)
    buffers = teacher(len(written["sequence 2"].lse), 0)
    with create(tmp_path, shard_bytes=1 << 20) as writer:
        for name, record in written.items():
            part = len(record.lse)
            for field in FIELDS:
                getattr(buffers, field)[:part].copy_(getattr(record, field))
            writer.append(name, buffers._replace(**{f: getattr(buffers, f)[:part] for f in FIELDS}))
            for field in FIELDS:
                getattr(buffers, field).fill_(1)
    cache = kd.TeacherCache.open(tmp_path)
    for name, record in written.items():
        assert_same(cache[name], record)


def _wait(connection) -> None:
    connection.recv()


def test_a_lock_ends_with_its_writer(tmp_path):
    """Not with a process that was forked meanwhile, as a loader's workers are; and with a writer dropped."""
    writer = create(tmp_path, rank=4)
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_wait, args=(theirs,))
    child.start()
    writer.close()
    try:
        dropped = create(tmp_path, rank=4)
        del dropped
        create(tmp_path, rank=4).close()
    finally:
        ours.send(None)
        child.join()


def _drop(writer) -> None:
    """As a child's own end does."""
    writer._unlock()


def test_a_lock_is_not_a_child_s_to_end(tmp_path):
    with create(tmp_path, rank=4) as writer:
        child = multiprocessing.get_context("fork").Process(target=_drop, args=(writer,))
        child.start()
        child.join()
        assert child.exitcode == 0
        with pytest.raises(kd.CacheError, match="another writer"):
            create(tmp_path, rank=4)


def test_one_rank_has_one_writer(tmp_path):
    with create(tmp_path, rank=4):
        with pytest.raises(kd.CacheError, match="shards-00004.jsonl: another writer is open as this rank"):
            create(tmp_path, rank=4)
    create(tmp_path, rank=4).close()


def test_a_sequence_written_twice(tmp_path):
    """Two ranks that each did not know of the other."""
    with create(tmp_path, rank=0) as one, create(tmp_path, rank=1) as two:
        one.append("a", teacher(3, 0))
        two.append("a", teacher(3, 1))
    with pytest.raises(
        kd.CacheError, match="sequence 'a' is twice in the cache, in shard-00000-.* shard-00001"
    ):
        kd.TeacherCache.open(tmp_path)


# --- reading ------------------------------------------------------------------------------------------


def test_no_cache(tmp_path):
    with pytest.raises(kd.CacheError, match="not a teacher cache: it has no manifest.json"):
        kd.TeacherCache.open(tmp_path)
    cache = write(tmp_path, records(1))
    with pytest.raises(KeyError, match="no sequence 'nowhere' among the [0-9]+ of this cache"):
        cache["nowhere"]


def test_records_are_the_readers_own(tmp_path):
    written = teacher(4, 0)
    cache = write(tmp_path, {"a": written})
    for name in FIELDS:
        getattr(cache["a"], name).zero_()
    for tensor in (cache["a"].draws.ids, cache["a"].draws.counts, cache["a"].draws.ends):
        tensor.zero_()
    assert_same(cache["a"], written)


def test_nothing_in_it(tmp_path):
    """No sequences, and sequences without tokens."""
    create(tmp_path / "none").close()
    cache = kd.TeacherCache.open(tmp_path / "none")
    assert (len(cache), list(cache), cache.tokens, "a" in cache, cache.unlisted()) == (0, [], 0, False, [])
    for names in (["empty"], ["empty", "full", "empty too"]):
        written = {name: teacher(3 if name == "full" else 0, 0) for name in names}
        cache = write(tmp_path / str(len(names)), written, shard_bytes=1 << 20)
        for name in names:
            assert_same(cache[name], written[name])
            assert cache[name].target().ids.shape == (len(written[name].lse), K)


def test_names(tmp_path):
    """Any text, and integers of any library; 7 and "7" are one."""
    names = ["ü", "u\u0308", "日本", "😀", "a\0b", "\n", "", '"\\', "../x", "a\u2028b\x85c", -3, 7]
    cache = write(tmp_path, {name: teacher(2, seed) for seed, name in enumerate(names)})
    assert list(cache) == [*names[:-2], "-3", "7"]
    for seed, name in enumerate(names):
        assert_same(cache[name], teacher(2, seed))
    for seven in (7, "7", torch.tensor(7)):
        assert seven in cache and cache.length(seven) == 2
    assert all(other not in cache for other in (None, 7.0, "07", ["7"], True))


def test_a_path_that_is_relative(tmp_path, monkeypatch):
    """Stays where it was when the process goes elsewhere."""
    monkeypatch.chdir(tmp_path)
    with create("cache") as writer:
        monkeypatch.chdir("/")
        writer.append("a", teacher(3, 0))
    monkeypatch.chdir(tmp_path)
    cache = kd.TeacherCache.open("cache")
    monkeypatch.chdir("/")
    assert_same(cache["a"], teacher(3, 0))


def test_opened_while_it_is_written(tmp_path):
    """What is committed by then is there, and stays there."""
    written, opened = records(6), []
    with create(tmp_path, shard_bytes=500) as writer:
        for name, record in written.items():
            writer.append(name, record)
            opened.append((kd.TeacherCache.open(tmp_path), writer.committed))
    assert 0 < len(opened[2][0]) < len(opened[5][0])
    for cache, committed in opened:
        assert set(cache) == committed
        for name in cache:
            assert_same(cache[name], written[name])


def test_reading_writes_nothing(tmp_path):
    """A folder that cannot be written is good enough."""
    write(tmp_path, records(2))
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    tmp_path.chmod(0o555)
    try:
        cache = kd.TeacherCache.open(tmp_path)
        cache["sequence 1"].logits.zero_()
        cache.verify(cache.shards[0])
    finally:
        tmp_path.chmod(0o755)
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


def test_records_move_whole(tmp_path, monkeypatch):
    """Draws as narrow as they lie on disk."""
    written = teacher(5, 0)
    record = write(tmp_path, {"a": written})["a"]
    assert_same(record.to("cpu", non_blocking=True), written)
    assert len(record.draws.ids) == (written.sample_ids >= 0).sum() < written.sample_ids.numel()
    assert torch.equal(record.draws.per_token, (written.sample_ids >= 0).sum(-1).to(torch.int32))

    def tensors(record):
        return [x for part in (record, record.draws) for x in vars(part).values() if torch.is_tensor(x)]

    assert [x.device.type for x in tensors(record.to("meta"))] == ["meta"] * 7
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    assert_same(record.pin_memory(), written)
    assert {id(x) for x in pinned} == {id(x) for x in tensors(record)}


def _first_shard(path):
    return path / "shard-00000-000000.arrow"


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


# --- at a terminal ------------------------------------------------------------------------------------


def test_progress(tmp_path, capsys, monkeypatch):
    """Of a long write and a long check; a short one says nothing."""
    from kd_kernels.cli import main

    write(tmp_path / "quick", records(3), total=3)
    assert capsys.readouterr().err == ""
    clock = itertools.count(step=11.0)
    monkeypatch.setattr("kd_kernels.progress.time.monotonic", lambda: next(clock))
    write(tmp_path / "slow", records(3), total=3, shard_bytes=200)
    assert "slow, sequences: 2 of 3, 22 s (1 shards)\n" in capsys.readouterr().err
    assert main(["cache", "verify", str(tmp_path / "slow")]) == 0
    assert "verify, shards: 3 of 3, 33 s (shard-00000-000002.arrow)\n" in capsys.readouterr().err


def test_command(tmp_path, capsys):
    from kd_kernels.cli import main

    cache = write(tmp_path, records(6))
    (tmp_path / "shard-00000-000099.arrow.part").write_bytes(b"half")
    assert main(["cache", "info", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["sequences"], found["tokens"], found["k"]) == (6, cache.tokens, K)
    assert found["unlisted"] == ["shard-00000-000099.arrow.part"]
    assert main(["cache", "verify", str(tmp_path)]) == 0
    assert f"all {len(cache.shards)} shards are as they were written" in capsys.readouterr().out
    _flip(_first_shard(tmp_path))
    _flip(tmp_path / cache.shards[-1].name)
    assert main(["cache", "info", str(tmp_path)]) == 0
    assert main(["cache", "verify", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("DAMAGED") == 2
    (tmp_path / "manifest.json").unlink()
    assert main(["cache", "info", str(tmp_path)]) == 1
    assert "no manifest.json" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["cache", "info", str(tmp_path / "nowhere")])
    assert "there is no such directory" in capsys.readouterr().err
