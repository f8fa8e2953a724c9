"""What a cache is, in two kinds of JSON files: one manifest, and one journal of shards per writing process.

``manifest.json`` says what every row means. ``shards-<rank>.jsonl`` has one line for each shard that is
complete on disk: its file, size, checksum, and the sequences in it. Every object carries a checksum of
itself, so that a changed digit is an error and not another teacher.
"""

from __future__ import annotations

import hashlib
import json
import numbers
import os
import re
import sys
import uuid
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Optional, Union

from kd_kernels.cache.errors import CacheError

FORMAT, VERSION = "kd-teacher-cache", 1
MANIFEST = "manifest.json"
DTYPES = ("float16", "float32", "float64")
MOST_SAMPLES = 1 << 20
_JOURNAL = re.compile(r"shards-(\d{5})\.jsonl")
_SHARD = re.compile(r"shard-(\d{5})-(\d{6})\.arrow")


@dataclass(frozen=True)
class Manifest:
    """What the rows of a cache mean; equal for all its writers.

    Raises:
        CacheError: a field that is no such thing; the message names it.
    """

    model: str
    vocab_size: int
    k: int
    temperature: Union[float, tuple[float, ...]]
    samples: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.temperature, list):
            object.__setattr__(self, "temperature", tuple(self.temperature))
        _need(isinstance(self.model, str), "model", self.model, "a string")
        _integer("vocab_size", self.vocab_size, 1, (1 << 31) - 1)
        _integer("k", self.k, 0, self.vocab_size)
        _integer("samples", self.samples, 0, MOST_SAMPLES)
        _need(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        good = bool(self.temperatures) and all(
            isinstance(t, numbers.Real) and not isinstance(t, bool) and 0 < t <= sys.float_info.max
            for t in self.temperatures
        )
        _need(good, "temperature", self.temperature, "a number > 0, or several")
        many = isinstance(self.temperature, tuple)
        as_floats = tuple(map(float, self.temperatures))
        object.__setattr__(self, "temperature", as_floats if many else as_floats[0])
        if not (self.k or self.samples):
            raise CacheError("k and samples are both 0: there is nothing to save")

    @property
    def temperatures(self) -> tuple[float, ...]:
        return self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)

    @property
    def digest(self) -> str:
        return digest(canonical(self.to_json()))

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def token_bytes(self) -> int:
        """Least that a token takes in a shard: what its length can be checked against."""
        statistic = 8 if self.dtype == "float64" else 4
        entry = 4 + {"float16": 2, "float32": 4, "float64": 8}[self.dtype]
        return self.k * entry + 2 * statistic * len(self.temperatures)


@dataclass(frozen=True)
class Shard:
    """One line of a journal: a shard that is complete on disk."""

    name: str
    bytes: int
    crc32: int
    ids: tuple[str, ...]
    lengths: tuple[int, ...]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def seal(value: dict[str, Any]) -> bytes:
    """``value`` with its own checksum, as one line of JSON."""
    body = canonical(value)
    return b'{"content":%s,"sha256":"%s"}' % (body, digest(body).encode())


def unseal(file: Path, what: str, line: bytes) -> dict[str, Any]:
    """What :func:`seal` wrote.

    Raises:
        CacheError: anything else.
    """
    try:
        sealed = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{file}: {what} is not JSON ({type(error).__name__})") from None
    content = sealed.get("content") if isinstance(sealed, dict) else None
    if not isinstance(content, dict) or set(sealed) != {"content", "sha256"}:
        raise CacheError(f"{file}: {what} is not an object of content and sha256")
    # Compared as written: two spellings of one object are one of them damaged.
    if seal(content) != line.strip():
        raise CacheError(f"{file}: the checksum of {what} does not match its content: the file is damaged")
    return content


def read_manifest(path: Path) -> Manifest:
    """
    Raises:
        CacheError: no cache, a damaged one, or one of another format version.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise CacheError(f"{path} is not a teacher cache: it has no {MANIFEST}")
    content = unseal(file, "the manifest", file.read_bytes())
    if content.pop("format", None) != FORMAT:
        raise CacheError(f"{file}: format is not {FORMAT!r}: this is something else's manifest")
    version = content.pop("version", None)
    if version != VERSION:
        raise CacheError(f"{file}: version is {version!r}, and this kd_kernels reads {VERSION}")
    if set(content) != {field.name for field in fields(Manifest)}:
        raise CacheError(f"{file}: the manifest has the fields {sorted(content)}")
    try:
        return Manifest(**content)
    except CacheError as error:
        raise CacheError(f"{file}: {error}") from None


def agree_on_manifest(path: Path, ours: Manifest) -> None:
    """Write the manifest where there is none; where there is one, ours has to be it. Safe for any number of
    processes at once.

    Raises:
        CacheError: the cache that is there is another.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise CacheError(f"{path}: a cache is a directory, and there is a file in its place") from None
    # Not by process id: containers that share a file system often have equal ones, and once linked a draft is
    # the manifest.
    file, draft = path / MANIFEST, path / f"{MANIFEST}.{uuid.uuid4().hex}.part"
    if not file.exists():
        write_durably(draft, seal(ours.to_json()) + b"\n")
        try:
            os.link(draft, file)  # fails where another process was first; a rename would not
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(draft, file)
        draft.unlink(missing_ok=True)
        sync_directory(path)
    theirs = read_manifest(path)
    for field in fields(Manifest):
        there, here = getattr(theirs, field.name), getattr(ours, field.name)
        if there != here:
            raise CacheError(
                f"{file}: {field.name} is {there!r} in the cache that is there, and {here!r} was asked for; "
                f"write to another path"
            )


def journal_file(path: Path, rank: int) -> Path:
    return path / f"shards-{rank:05d}.jsonl"


def shard_name(rank: int, number: int) -> str:
    return f"shard-{rank:05d}-{number:06d}.arrow"


def journals(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if _JOURNAL.fullmatch(file.name))


def unlisted(path: Path, shards: list[Shard]) -> list[str]:
    """Files that a killed writer left: no part of the cache."""
    listed = {shard.name for shard in shards}
    return sorted(
        file.name
        for file in path.iterdir()
        if file.name.endswith(".part") or (_SHARD.fullmatch(file.name) and file.name not in listed)
    )


def read_journal(file: Path, manifest: Manifest) -> tuple[list[Shard], int]:
    """(its shards, the length in bytes of their lines). A last line without its end was being written when
    the writer was killed: its shard is not committed.

    Raises:
        CacheError: any other line that is not as it was written.
    """
    if not file.is_file():
        raise CacheError(f"{file}: the journal is not a file")
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    rank = int(_JOURNAL.fullmatch(file.name)[1])
    shards = []
    for number, line in enumerate(data[:whole].splitlines(keepends=True)):
        content = unseal(file, f"line {number + 1}", line)
        shards.append(_shard(file, number, content, manifest, shard_name(rank, number)))
    return shards, whole


def append_durably(file: Path, at: int, line: bytes) -> None:
    """Write ``line`` at byte ``at``, over whatever a killed writer left there."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.ftruncate(descriptor, at)
        with os.fdopen(descriptor, "wb", closefd=False) as stream:
            stream.seek(at)
            stream.write(line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(file: Path, data: object) -> None:
    with open(file, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shard(file: Path, number: int, content: dict[str, Any], manifest: Manifest, name: str) -> Shard:
    where = f"{file}: line {number + 1}"
    if set(content) != {field.name for field in fields(Shard)}:
        raise CacheError(f"{where} has the fields {sorted(content)}")
    ids, lengths = content["ids"], content["lengths"]
    # The name is the one its place gives: a path from a file is never opened.
    if content["name"] != name:
        raise CacheError(f"{where}: name is {content['name']!r} where {name!r} has to be")
    if not (isinstance(ids, list) and ids and all(isinstance(i, str) for i in ids)):
        raise CacheError(f"{where}: ids is not a list of strings")
    if not (isinstance(lengths, list) and len(lengths) == len(ids) and all(_natural(x) for x in lengths)):
        raise CacheError(f"{where}: lengths is not a list of {len(ids)} lengths")
    if (
        not _natural(content["bytes"])
        or not content["bytes"]
        or sum(lengths) * manifest.token_bytes() > content["bytes"]
    ):
        raise CacheError(
            f"{where}: lengths add up to {sum(lengths)} tokens, which do not fit into the shard's "
            f"bytes, {content['bytes']!r}"
        )
    if not _natural(content["crc32"]):
        raise CacheError(f"{where}: crc32 is not a checksum")
    return Shard(name, content["bytes"], content["crc32"], tuple(ids), tuple(lengths))


def _natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _need(good: bool, name: str, value: object, what: str) -> None:
    if not good:
        raise CacheError(f"{name} must be {what}, got {value!r}")


def _integer(name: str, value: object, least: int, most: Optional[int]) -> None:
    _need(_natural(value) and least <= value <= most, name, value, f"an integer in [{least}, {most}]")
