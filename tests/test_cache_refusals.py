"""Every sentence with which a cache is refused, from a file that deserves it: each names the file, and the
field that is wrong. All checksums are right where the sentence is not about them."""

import json
import os
import struct

import pytest
import torch
from caches import SAMPLES, VOCAB, K, create, teacher, write
from hostile import JOURNAL, SHARD, batch_of, nodes, overwrite, patch, relist, reseal, rewrite, with_column

import kd_kernels as kd
from kd_kernels.cache.manifest import Manifest, seal
from kd_kernels.cache.writer import MOST_SHARD_BYTES

pa = pytest.importorskip("pyarrow", reason="a teacher cache is made of Arrow files")

L = 5
MANIFEST = "manifest.json"


def refused(path, file, message):
    with pytest.raises(kd.CacheError, match=message) as caught:
        cache = kd.TeacherCache.open(path)
        for name in cache:
            cache[name]
    assert str(caught.value).startswith(f"{path / file}: "), caught.value


@pytest.fixture
def path(tmp_path):
    """A cache of one sequence of five tokens."""
    write(tmp_path, {"a": teacher(L, 0)})
    return tmp_path


def raw(file, change):
    return lambda path: (path / file).write_bytes(change((path / file).read_bytes()))


def sealed(file, **changes):
    return lambda path: reseal(path / file, **changes)


# --- JSON -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file, what", [(MANIFEST, "the manifest"), (JOURNAL, "line 1")])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: b'{"content": \n', "{what} is not JSON"),
        (lambda data: b"\xff\xfe\n", "{what} is not JSON"),
        (lambda data: b"[" * 100_000 + b"\n", "{what} is not JSON"),
        (lambda data: b'{"content":' + b"9" * 100_000 + b"}\n", "{what} is not JSON"),
        (lambda data: b"[]\n", "{what} is not an object of content and sha256"),
        (lambda data: b'{"content": {}}\n', "{what} is not an object of content and sha256"),
        (lambda data: b'{"content": [], "sha256": ""}\n', "{what} is not an object of content and sha256"),
        (
            lambda data: data.replace(b'"sha256"', b'"sha512"'),
            "{what} is not an object of content and sha256",
        ),
        (lambda data: data.replace(b"6", b"7", 1), "the checksum of {what} does not match its content"),
        (lambda data: data.replace(b":", b": ", 1), "the checksum of {what} does not match its content"),
    ],
)
def test_sealed_lines(path, file, what, change, message):
    raw(file, change)(path)
    refused(path, file, message.format(what=what))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "something else"}, "format is not 'kd-teacher-cache'"),
        ({"version": 2}, "version is 2, and this kd_kernels reads 1"),
        ({"k": None}, r"the manifest has the fields \["),
        ({"more": 1}, r"the manifest has the fields \["),
        ({"model": 3}, "model must be a string, got 3"),
        ({"vocab_size": 1 << 31}, r"vocab_size must be an integer in \[1, 2147483647\], got 2147483648"),
        ({"vocab_size": True}, "vocab_size must be an integer"),
        ({"k": VOCAB + 1}, r"k must be an integer in \[0, 97\], got 98"),
        ({"k": 6.0}, "k must be an integer"),
        ({"samples": 1 << 40}, r"samples must be an integer in \[0, 1048576\]"),
        ({"dtype": "object"}, "dtype must be one of float16, float32, float64, got 'object'"),
        ({"dtype": ["float32"]}, r"dtype must be one of float16, float32, float64, got \['float32'\]"),
        ({"temperature": 0}, "temperature must be a number > 0"),
        ({"temperature": "1"}, "temperature must be a number > 0"),
        ({"temperature": []}, "temperature must be a number > 0"),
        ({"temperature": [1.0, [2.0]]}, "temperature must be a number > 0"),
        ({"temperature": {"0": 1.0}}, "temperature must be a number > 0"),
        ({"temperature": 10**400}, "temperature must be a number > 0"),
        ({"k": 0, "samples": 0}, "k and samples are both 0"),
    ],
)
def test_manifest_fields(path, changes, message):
    sealed(MANIFEST, **changes)(path)
    refused(path, MANIFEST, message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "../../etc/passwd"}, f"name is '../../etc/passwd' where '{SHARD}' has to be"),
        ({"name": "/etc/passwd"}, f"name is '/etc/passwd' where '{SHARD}' has to be"),
        ({"name": "shard-00001-000000.arrow"}, f"where '{SHARD}' has to be"),
        ({"name": 5}, f"name is 5 where '{SHARD}' has to be"),
        ({"crc32": None}, r"line 1 has the fields \["),
        ({"more": 1}, r"line 1 has the fields \["),
        ({"ids": "a"}, "ids is not a list of strings"),
        ({"ids": []}, "ids is not a list of strings"),
        ({"ids": [3]}, "ids is not a list of strings"),
        ({"ids": ["a", "a"], "lengths": [L, L]}, "ids: sequence 'a' is twice in the cache"),
        ({"lengths": 5}, "lengths is not a list of 1 lengths"),
        ({"lengths": [L, L]}, "lengths is not a list of 1 lengths"),
        ({"lengths": [-3]}, "lengths is not a list of 1 lengths"),
        ({"lengths": [5.0]}, "lengths is not a list of 1 lengths"),
        ({"lengths": [True]}, "lengths is not a list of 1 lengths"),
        ({"lengths": [1 << 40]}, "lengths add up to 1099511627776 tokens, which do not fit"),
        ({"bytes": 10}, "lengths add up to 5 tokens, which do not fit into the shard's bytes, 10"),
        ({"bytes": 0, "lengths": [0]}, "which do not fit into the shard's bytes, 0"),
        ({"bytes": "10"}, "which do not fit into the shard's bytes, '10'"),
        ({"crc32": "x"}, "crc32 is not a checksum"),
        ({"crc32": -1}, "crc32 is not a checksum"),
    ],
)
def test_journal_fields(path, changes, message):
    sealed(JOURNAL, **changes)(path)
    refused(path, JOURNAL, message)


def test_what_is_no_cache(tmp_path):
    file = tmp_path / "file"
    file.write_text("{}")
    with pytest.raises(kd.CacheError, match=f"{file} is not a teacher cache: it has no manifest.json"):
        kd.TeacherCache.open(file)
    with pytest.raises(kd.CacheError, match=f"{file}: a cache is a directory, and there is a file"):
        create(file)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_files_that_are_none(path, make):
    """A pipe would be waited for."""
    make(path / "shards-00001.jsonl")
    refused(path, "shards-00001.jsonl", "the journal is not a file")
    (path / MANIFEST).unlink()
    make(path / MANIFEST)
    with pytest.raises(kd.CacheError, match="not a teacher cache: it has no manifest.json"):
        kd.TeacherCache.open(path)


# --- shards ---------------------------------------------------------------------------------------------


def arrays(path):
    batch = batch_of(path)
    return {name: batch.column(name) for name in batch.schema.names}


def column(name, change):
    """A shard whose column ``name`` is made from the right one."""
    return lambda path: with_column(path, name, change(arrays(path)[name]))


def other_schema(path):
    batch = batch_of(path)
    index = batch.schema.get_field_index("lse")
    wide = batch.column("lse").cast(pa.list_(pa.float64()))
    rewrite(path, [batch.set_column(index, pa.field("lse", wide.type), wide)])


def one_more_column(path):
    batch = batch_of(path)
    rewrite(path, [batch.append_column("more", batch.column("length"))])


def samples_of(per_token):
    """A column of draws, as Python values: ``per_token`` makes each token's pairs."""

    def change(right):
        pairs = [[per_token(token, right[0][token].as_py()) for token in range(L)]]
        return pa.array(pairs, right.type)

    return column("samples", change)


def cut_back(path, name):
    overwrite(path, lambda batch: batch.column(name).buffers()[1], struct.pack("<ii", 0, L))


def longer(name):
    """Values of one more token than the offsets say: they are cut back after the file was written."""

    def apply(path):
        right = arrays(path)[name]
        values = pa.concat_arrays([right.values, right.values.slice(0, 1)])
        with_column(path, name, pa.ListArray.from_arrays(pa.array([0, L + 1], pa.int32()), values))
        cut_back(path, name)

    return apply


def longer_draws(path):
    """One more pair than the offsets say."""
    tokens = arrays(path)["samples"].values
    pairs, ends = tokens.values, tokens.offsets.to_pylist()
    more = pa.concat_arrays([pairs, pairs.slice(0, 1)])
    wrong = [*ends[:-1], ends[-1] + 1]
    inner = pa.ListArray.from_arrays(pa.array(wrong, pa.int32()), more)
    with_column(path, "samples", pa.ListArray.from_arrays(pa.array([0, L], pa.int32()), inner))
    patch(path, struct.pack(f"<{L + 1}i", *wrong), struct.pack(f"<{L + 1}i", *ends))


def longer_rows(path):
    """Fixed-size lists of more values than the lists hold."""
    right = arrays(path)["logits"]
    values = pa.concat_arrays([right.values, right.values.slice(0, 1)])
    with_column(path, "logits", pa.ListArray.from_arrays(pa.array([0, L + 1], pa.int32()), values))
    patch(path, nodes(L + 1, (L + 1) * K), nodes(L, (L + 1) * K))
    cut_back(path, "logits")


def misaligned(path):
    """Two more bytes in the first message, so that all that follows is off by two."""
    data = (path / SHARD).read_bytes()
    mark, size = struct.unpack_from("<Ii", data)
    assert mark == 0xFFFFFFFF
    head = struct.pack("<Ii", mark, size + 2) + data[8 : 8 + size] + b"\0\0"
    (path / SHARD).write_bytes(head + data[8 + size :])
    relist(path)


def another_caches_shard(path):
    write(path / "other", {"a": teacher(L, 0)}, model="another")
    (path / SHARD).write_bytes((path / "other" / SHARD).read_bytes())
    relist(path)


def not_arrow(data):
    def apply(path):
        (path / SHARD).write_bytes(data((path / SHARD).read_bytes()))
        relist(path)

    return apply


def flipped(data):
    return data[:-1] + bytes([data[-1] ^ 1])


CASES = {
    "not there": (
        lambda path: (path / SHARD).unlink(),
        "the shard is listed in its journal, but is not there",
    ),
    "a folder": (
        lambda path: ((path / SHARD).unlink(), (path / SHARD).mkdir()),
        "the shard is listed in its journal, but is not there",
    ),
    "cut": (raw(SHARD, lambda data: data[:-8]), "the file has .* bytes, its journal says"),
    "longer": (raw(SHARD, lambda data: data + b"\0"), "the file has .* bytes, its journal says"),
    "a bit": (raw(SHARD, flipped), "crc32 is not the one in its journal"),
    "another model": (another_caches_shard, "the metadata kd_teacher_cache is not that of the manifest"),
    "another type": (other_schema, "the column lse is not that of the manifest"),
    "one more column": (one_more_column, "the list of columns is not that of the manifest"),
    "no Arrow": (not_arrow(lambda data: b"\0" * len(data)), "not an Arrow stream"),
    "text": (not_arrow(lambda data: b"a" * len(data)), "not an Arrow stream"),
    "cut and listed": (not_arrow(lambda data: data[: len(data) // 2]), "not an Arrow stream"),
    "an empty stream": (
        lambda path: rewrite(path, [], schema=batch_of(path).schema),
        "the shard has 0 record batches, not one",
    ),
    "two batches": (
        lambda path: rewrite(path, [batch_of(path)] * 2),
        "the shard has 2 record batches, not one",
    ),
    "no text": (
        lambda path: overwrite(path, lambda batch: batch.column("sequence_id").buffers()[2], b"\xff"),
        "the record batch is not valid: ",
    ),
    "a missing sequence": (
        column("length", lambda right: pa.array([None], right.type)),
        "length has missing values",
    ),
    "a missing token": (
        column("lse", lambda right: pa.array([[1.0] * (L - 1) + [None]], right.type)),
        "lse has missing values",
    ),
    "a missing count": (
        samples_of(lambda token, pairs: [{"id": 1, "count": None}]),
        "samples has missing values",
    ),
    "another sequence": (
        column("sequence_id", lambda right: pa.array(["b"])),
        "sequence_id does not hold the sequences that its journal lists",
    ),
    "another length": (
        column("length", lambda right: pa.array([L - 1], right.type)),
        "length does not hold the lengths that its journal lists",
    ),
    "an id too large": (
        column("ids", lambda right: pa.array([[[VOCAB] * K] * L], right.type)),
        f"ids holds {VOCAB}, outside the vocabulary of {VOCAB}",
    ),
    "a negative id": (
        column("ids", lambda right: pa.array([[[-2] * K] * L], right.type)),
        "ids holds -2, outside the vocabulary",
    ),
    "a draw too large": (
        samples_of(lambda token, pairs: [{"id": VOCAB, "count": 1}]),
        f"sample_ids holds {VOCAB}, outside the vocabulary",
    ),
    "an unused draw": (
        samples_of(lambda token, pairs: [{"id": -1, "count": 1}]),
        "sample_ids holds -1, outside the vocabulary",
    ),
    "a count of 0": (
        samples_of(lambda token, pairs: [{"id": 1, "count": 0}]),
        "samples holds counts that 12 draws",
    ),
    "a count too large": (
        samples_of(lambda token, pairs: [{"id": 1, "count": SAMPLES + 1}]),
        "samples holds counts that 12 draws cannot have",
    ),
    "too many draws": (
        samples_of(lambda token, pairs: [{"id": i, "count": 1} for i in range(SAMPLES + 1)]),
        "samples holds counts that 12 draws cannot have",
    ),
    "fewer tokens": (
        column("lse", lambda right: pa.array([[1.0] * (L - 1)], right.type)),
        "lse is not as long as its sequences",
    ),
    "fewer tokens drawn": (
        column("samples", lambda right: pa.array([right[0].as_py()[1:]], right.type)),
        "samples is not as long as its sequences",
    ),
    "more values": (longer("lse"), f"lse holds {L + 1} tokens of {L}"),
    "more draws": (longer_draws, "samples does not hold as many draws as its offsets say"),
    "more in a row": (longer_rows, f"logits holds {(L + 1) * K} values, not {L * K}"),
    "compressed": (
        lambda path: rewrite(path, [batch_of(path)], compression="zstd"),
        "does not lie in the file, uncompressed",
    ),
    "misaligned": (misaligned, "ids is not aligned"),
}


@pytest.mark.parametrize("case", CASES)
def test_shards(path, case):
    damage, message = CASES[case]
    damage(path)
    refused(path, SHARD, message)


# --- writing --------------------------------------------------------------------------------------------


def test_what_create_refuses(tmp_path):
    for options, message in (
        ({"k": 0, "samples": 0}, "k and samples are both 0"),
        ({"rank": -1}, r"rank must be an integer in \[0, 100000\), got -1"),
        ({"rank": 100_000}, r"rank must be an integer in \[0, 100000\), got 100000"),
        ({"rank": "0"}, r"rank must be an integer in \[0, 100000\), got '0'"),
        ({"shard_bytes": 0}, r"shard_bytes must be in \[1, 1073741824\], got 0"),
        ({"shard_bytes": MOST_SHARD_BYTES + 1}, "shard_bytes must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            create(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_what_append_refuses(tmp_path, monkeypatch):
    with create(tmp_path) as writer:
        with pytest.raises(ValueError, match=r"sequence_id must be text that UTF-8 can hold, got '\\ud800'"):
            writer.append("\ud800", teacher(3, 0))
        with pytest.raises(TypeError, match="sequence_id must be a string or an int, got bool"):
            writer.append(True, teacher(3, 0))
        with pytest.raises(TypeError, match="topk must be what kd.linear_topk .* gives, got Tensor"):
            writer.append("a", torch.randn(3, VOCAB))
        right, wide = teacher(3, 0), teacher(3, 0, dtype=torch.float64)
        for wrong, message in (
            (right._replace(ids=right.ids + 0.5), "ids must be integers, got torch.float32"),
            (right._replace(logits=right.ids), "logits must be floating, got torch.int32"),
            (right._replace(sample_counts=right.sample_counts > 0), "sample_counts must be integers"),
            (wide, 'logits is float64, the cache keeps float32; create it with dtype="float64"'),
            (right._replace(lse=wide.lse), "lse is float64, the cache keeps float32"),
        ):
            with pytest.raises(ValueError, match=f"sequence 'a': {message}"):
                writer.append("a", wrong)
        batch = kd.linear_topk(torch.randn(1, 3, VOCAB), K, samples=SAMPLES)
        with pytest.raises(ValueError, match=r"lengths\[0\] must be in \[0, 3\], got 1.5"):
            writer.append_batch(["a"], batch, [1.5])
        assert "a" not in writer
        monkeypatch.setattr("kd_kernels.cache.writer.MOST_SHARD_BYTES", 100)
        with pytest.raises(ValueError, match="sequence 'a' takes [0-9]+ bytes; the most is 100"):
            writer.append("a", teacher(3, 0))


def test_a_damaged_cache_is_not_gone_on_with(path):
    """A writer reads what is there as a reader does."""
    journal = (path / JOURNAL).read_bytes()
    raw(JOURNAL, lambda data: data.replace(b"6", b"7", 1))(path)
    with pytest.raises(kd.CacheError, match=f"{JOURNAL}: the checksum of line 1") as caught:
        create(path)
    (path / JOURNAL).write_bytes(journal)
    with create(path) as writer:  # though the error, and what it was raised from, is still held
        assert "a" in writer and caught.value is not None


def test_every_field_is_written_as_it_is_read(path):
    """The table above is of what is written now."""
    assert set(json.loads((path / JOURNAL).read_bytes())["content"]) == {
        "name",
        "bytes",
        "crc32",
        "ids",
        "lengths",
    }
    manifest = Manifest("toy", VOCAB, K, 1.0, SAMPLES)
    assert (path / MANIFEST).read_bytes() == seal(manifest.to_json()) + b"\n"
    assert torch.equal(kd.TeacherCache.open(path)["a"].ids, teacher(L, 0).ids)
