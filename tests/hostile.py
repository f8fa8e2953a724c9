"""What somebody does to a cache who knows its checksums."""

import json
import struct
import zlib

from kd_kernels.cache.manifest import seal

SHARD, JOURNAL = "shard-00000-000000.arrow", "shards-00000.jsonl"


def relist(path, number=0):
    """Give the shard the size and checksum that it has now."""
    journal = path / JOURNAL
    lines = [json.loads(line)["content"] for line in journal.read_bytes().splitlines()]
    data = (path / lines[number]["name"]).read_bytes()
    lines[number].update(bytes=len(data), crc32=zlib.crc32(data))
    journal.write_bytes(b"".join(seal(line) + b"\n" for line in lines))


def reseal(file, **changes):
    """A manifest, or a journal of one line, with other content and the checksum of that; None removes."""
    content = {**json.loads(file.read_bytes())["content"], **changes}
    file.write_bytes(seal({name: x for name, x in content.items() if x is not None}) + b"\n")


def batch_of(path):
    import pyarrow as pa

    return pa.ipc.open_stream((path / SHARD).read_bytes()).read_next_batch()


def rewrite(path, batches, schema=None, **options):
    """The first shard made of ``batches``, listed as if it had been written so."""
    import pyarrow as pa

    with pa.ipc.new_stream(
        str(path / SHARD), schema or batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)
    ) as stream:
        for batch in batches:
            stream.write_batch(batch)
    relist(path)


def with_column(path, name, array, schema=None):
    """The first shard with another column ``name``."""
    import pyarrow as pa

    batch = batch_of(path)
    columns = [array if field.name == name else batch.column(field.name) for field in batch.schema]
    rewrite(path, [pa.record_batch(columns, schema=schema or batch.schema)])


def overwrite(path, buffer_of, wrong):
    """Other bytes at the beginning of one of the first shard's buffers."""
    import pyarrow as pa

    data = bytearray((path / SHARD).read_bytes())
    whole = pa.py_buffer(bytes(data))
    at = buffer_of(pa.ipc.open_stream(whole).read_next_batch()).address - whole.address
    data[at : at + len(wrong)] = wrong
    (path / SHARD).write_bytes(data)
    relist(path)


def patch(path, right, wrong):
    """The first shard with the bytes ``right``, which it has once, overwritten."""
    data = (path / SHARD).read_bytes()
    assert data.count(right) == 1 and len(right) == len(wrong), data.count(right)
    (path / SHARD).write_bytes(data.replace(right, wrong))
    relist(path)


def nodes(*lengths):
    """How Arrow's metadata states consecutive arrays of these lengths, none of which has missing values."""
    return b"".join(struct.pack("<qq", length, 0) for length in lengths)
