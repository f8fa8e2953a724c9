"""What somebody does to a cache who knows its checksums."""

import json
import zlib

from kd_kernels.cache.manifest import seal


def relist(path, number=0):
    """Give the shard the size and checksum that it has now."""
    journal = path / "shards-00000.jsonl"
    lines = [json.loads(line)["content"] for line in journal.read_bytes().splitlines()]
    data = (path / lines[number]["name"]).read_bytes()
    lines[number].update(bytes=len(data), crc32=zlib.crc32(data))
    journal.write_bytes(b"".join(seal(line) + b"\n" for line in lines))
