"""Nothing of a shard is believed before it is checked: size and checksum, then form, then values."""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_kernels.cache import layout
from kd_kernels.cache.errors import CacheError, arrow
from kd_kernels.cache.manifest import Manifest, Shard


def check_size(file: Path, shard: Shard) -> None:
    """
    Raises:
        CacheError: the file is not there, or not as long as the journal says.
    """
    if not file.is_file():
        raise CacheError(f"{file}: the shard is listed in its journal, but is not there")
    size = file.stat().st_size
    if size != shard.bytes:
        raise CacheError(f"{file}: the file has {size} bytes, its journal says {shard.bytes}: it is damaged")


def load(file: Path, shard: Shard, manifest: Manifest) -> dict[str, Tensor]:
    """A shard's columns, ``[tokens, ...]``, as views of the mapped file; for draws also ``sample_ends``
    ``[tokens + 1]`` int32, where each token's pairs end.

    Raises:
        CacheError: anything that the writer would not have written; the message names file and field.
    """
    check_size(file, shard)
    mapped = map_file(file)
    if zlib.crc32(mapped) != shard.crc32:
        raise CacheError(f"{file}: crc32 is not the one in its journal: the file is damaged")
    rows = _one_batch(file, mapped, manifest)
    _check_form(file, rows, shard)
    found = _Views(file, mapped).columns(rows, sum(shard.lengths), manifest)
    _check_values(file, found, manifest)
    return found


def map_file(file: Path) -> mmap.mmap:
    # Private pages: torch gives views of writable memory only, and the file must never change.
    with open(file, "rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


def _one_batch(file: Path, mapped: mmap.mmap, manifest: Manifest) -> Any:
    pa = arrow()
    try:
        with pa.ipc.open_stream(pa.BufferReader(pa.py_buffer(mapped))) as stream:
            expected = layout.schema(manifest)
            if not stream.schema.equals(expected, check_metadata=True):
                name = _different(stream.schema, expected)
                raise CacheError(f"{file}: {name} is not that of the manifest: a shard of another cache")
            batches = list(stream)
    except (pa.ArrowException, OSError, ValueError, EOFError) as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(f"{file}: not an Arrow stream: {_first_line(error)}") from None
    if len(batches) != 1:
        raise CacheError(f"{file}: the shard has {len(batches)} record batches, not one")
    try:
        batches[0].validate(full=True)
    except (pa.ArrowException, ValueError) as error:
        raise CacheError(f"{file}: the record batch is not valid: {_first_line(error)}") from None
    return batches[0]


def _different(found: Any, expected: Any) -> str:
    for field in expected:
        index = found.get_field_index(field.name)
        if index < 0 or not found.field(index).equals(field):
            return f"the column {field.name}"
    return "the metadata kd_teacher_cache" if found.names == expected.names else "the list of columns"


def _check_form(file: Path, rows: Any, shard: Shard) -> None:
    for name, column in zip(rows.schema.names, rows.columns):
        layout.refuse_nulls(str(file), name, column)
    if tuple(rows.column("sequence_id").to_pylist()) != shard.ids:
        raise CacheError(f"{file}: sequence_id does not hold the sequences that its journal lists")
    if tuple(rows.column("length").to_pylist()) != shard.lengths:
        raise CacheError(f"{file}: length does not hold the lengths that its journal lists")


def _check_values(file: Path, found: dict[str, Tensor], manifest: Manifest) -> None:
    for name, least in (("ids", -1), ("sample_ids", 0)):
        ids = found.get(name)
        if ids is None or not ids.numel():
            continue
        low, high = int(ids.min()), int(ids.max())
        if low < least or high >= manifest.vocab_size:
            raise CacheError(
                f"{file}: {name} holds {low if low < least else high}, outside the vocabulary of "
                f"{manifest.vocab_size}"
            )
    if "sample_counts" in found:
        per_token = found["sample_ends"].diff()
        counts = found["sample_counts"]
        good = not per_token.numel() or int(per_token.max()) <= manifest.samples
        good = good and (not counts.numel() or 0 < int(counts.min()) <= int(counts.max()) <= manifest.samples)
        if not good:
            raise CacheError(f"{file}: samples holds counts that {manifest.samples} draws cannot have")


class _Views:
    """Arrow arrays as tensors over the mapped file."""

    def __init__(self, file: Path, mapped: mmap.mmap) -> None:
        self.file, self.mapped = file, mapped
        self.base = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()

    def columns(self, rows: Any, tokens: int, manifest: Manifest) -> dict[str, Tensor]:
        ends = torch.tensor([0, *rows.column("length").to_pylist()]).cumsum(0)
        found = {}
        for name, (dtype, width) in layout.columns(manifest).items():
            values = self._of_tokens(name, rows.column(name), ends)
            if width is not None:
                values = values.values
            flat = self._flat(name, values, dtype, tokens * (1 if width is None else width))
            found[name] = flat if width is None else flat.view(tokens, width)
        if manifest.samples:
            per_token = self._of_tokens("samples", rows.column("samples"), ends)
            found["sample_ends"] = self._offsets("samples", per_token, tokens)
            first, last = int(found["sample_ends"][0]), int(found["sample_ends"][-1])
            pairs = per_token.values
            if first != 0 or last != len(pairs):
                raise CacheError(f"{self.file}: samples does not hold as many draws as its offsets say")
            found["sample_ids"] = self._flat("samples", pairs.field(0), torch.int32, last)
            found["sample_counts"] = self._flat("samples", pairs.field(1), layout.count_dtype(manifest), last)
        return found

    def _of_tokens(self, name: str, column: Any, ends: Tensor) -> Any:
        """The values of a column of lists, which have to be cut where the sequences are."""
        if not torch.equal(self._offsets(name, column, len(column)).to(ends), ends):
            raise CacheError(f"{self.file}: {name} is not as long as its sequences")
        if len(column.values) != int(ends[-1]):
            raise CacheError(f"{self.file}: {name} holds {len(column.values)} tokens of {int(ends[-1])}")
        return column.values

    def _offsets(self, name: str, column: Any, count: int) -> Tensor:
        return self._at(name, column.buffers()[1], torch.int32, count + 1)

    def _flat(self, name: str, values: Any, dtype: torch.dtype, count: int) -> Tensor:
        if len(values) != count:
            raise CacheError(f"{self.file}: {name} holds {len(values)} values, not {count}")
        return self._at(name, values.buffers()[1], dtype, count) if count else torch.empty(0, dtype=dtype)

    def _at(self, name: str, buffer: Any, dtype: torch.dtype, count: int) -> Tensor:
        size = count * dtype.itemsize
        offset = -1 if buffer is None else buffer.address - self.base
        if buffer is None or buffer.size < size or not 0 <= offset <= len(self.mapped) - size:
            raise CacheError(f"{self.file}: {name} does not lie in the file, uncompressed")
        if offset % dtype.itemsize:
            raise CacheError(f"{self.file}: {name} is not aligned")
        return torch.frombuffer(self.mapped, dtype=dtype, count=count, offset=offset)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
