"""Writing: rows are gathered in memory, written as a whole shard, and only then listed."""

from __future__ import annotations

import os
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor

from kd_kernels.cache import layout
from kd_kernels.cache.errors import CacheError, arrow
from kd_kernels.cache.manifest import (
    Manifest,
    Shard,
    agree_on_manifest,
    append_durably,
    journal_file,
    journals,
    read_journal,
    seal,
    shard_name,
    sync_directory,
    write_durably,
)
from kd_kernels.cache.record import TeacherRecord, name_of
from kd_kernels.progress import Progress
from kd_kernels.topk import TopK

# An Arrow list counts its values in 31 bits; a shard has to stay below that whatever its columns.
MOST_SHARD_BYTES = 1 << 30
Columns = dict[str, Optional[Tensor]]


class CacheWriter:
    """Writes one rank's part of a cache; see :meth:`kd_kernels.TeacherCache.create`. A context manager:
    leaving it, in whatever way, commits what was appended. ``sequence_id in writer`` says what needs not be
    computed again."""

    def __init__(
        self, path: Path, manifest: Manifest, rank: int, shard_bytes: int, total: Optional[int]
    ) -> None:
        arrow()
        if not isinstance(rank, int) or not 0 <= rank < 100_000:
            raise ValueError(f"rank must be an integer in [0, 100000), got {rank!r}")
        if not 0 < shard_bytes <= MOST_SHARD_BYTES:
            raise ValueError(f"shard_bytes must be in [1, {MOST_SHARD_BYTES}], got {shard_bytes}")
        self.path, self.manifest, self.rank, self.shard_bytes = path, manifest, rank, shard_bytes
        agree_on_manifest(path, manifest)
        self._unlock = weakref.finalize(self, _unlock, _lock(journal_file(path, rank)), os.getpid())
        self._committed: set[str] = set()
        self._shards, self._end = 0, 0
        try:
            self._read_journals()
        except BaseException:  # nobody gets a writer to close
            self._unlock()
            raise
        self._forget()
        self._progress = Progress(f"{path.name}, sequences", total)

    @property
    def committed(self) -> frozenset[str]:
        """The sequences that are safe on disk, of every rank as of this writer's start."""
        return frozenset(self._committed)

    def __contains__(self, sequence_id: object) -> bool:
        return _name(sequence_id) in self._committed or _name(sequence_id) in self._pending

    def append(self, sequence_id: Union[str, int], topk: Union[TopK, TeacherRecord]) -> None:
        """Take one sequence.

        Args:
            sequence_id: what to find it by; an int stands for its decimal digits.
            topk: of leading shape ``[L]``, with the cache's k, samples and temperatures. Row j is the
                teacher's distribution after token j.

        Raises:
            TypeError, ValueError: a sequence that is there already; shapes, dtypes, ids or a temperature not
                the cache's.
        """
        self._append(_name(sequence_id), _columns(topk), topk.temperature)

    def _append(self, name: str, columns: Columns, temperature: object) -> None:
        if not self._unlock.alive:
            raise ValueError("this writer is closed")
        if name in self:
            raise ValueError(
                f"sequence {name!r} is in the cache already; `sequence_id in writer` asks before the work"
            )
        rows = _rows(self.manifest, name, columns, temperature)
        size = sum(x.numel() * x.element_size() for x in rows.values())
        if size > MOST_SHARD_BYTES:
            raise ValueError(f"sequence {name!r} takes {size} bytes; the most is {MOST_SHARD_BYTES}")
        if self._bytes and self._bytes + size > self.shard_bytes:
            self.flush()
        self._pending[name] = len(rows["lse"])
        self._rows.append(rows)
        self._bytes += size
        self._progress.step(f"{self._shards} shards")
        if self._bytes >= self.shard_bytes:
            self.flush()

    def append_batch(
        self,
        sequence_ids: Sequence[Union[str, int]],
        topk: Union[TopK, TeacherRecord],
        lengths: Sequence[int],
    ) -> None:
        """Take the first ``lengths[b]`` tokens of each sequence b of a padded batch ``[B, L]``, padded on the
        right.

        Raises:
            TypeError, ValueError: as :meth:`append`; numbers of sequences that differ; lengths that are none.
        """
        columns = _columns(topk)
        if not len(sequence_ids) == len(lengths) == topk.lse.shape[0]:
            raise ValueError(
                f"sequence_ids, lengths and topk must be of as many sequences; they are of "
                f"{len(sequence_ids)}, {len(lengths)} and {topk.lse.shape[0]}"
            )
        for row, (sequence_id, length) in enumerate(zip(sequence_ids, lengths)):
            if int(length) != length or not 0 <= length <= topk.lse.shape[1]:
                raise ValueError(f"lengths[{row}] must be in [0, {topk.lse.shape[1]}], got {length}")
            cut = {name: None if x is None else x[row, : int(length)] for name, x in columns.items()}
            self._append(_name(sequence_id), cut, topk.temperature)

    def flush(self) -> None:
        """Commit what was appended: after it a kill loses nothing."""
        if not self._pending:
            return
        name = shard_name(self.rank, self._shards)
        ids, lengths = list(self._pending), list(self._pending.values())
        rows = {key: torch.cat([row[key] for row in self._rows]) for key in self._rows[0]}
        data = _serialised(self.manifest, ids, lengths, rows)
        part = self.path / f"{name}.part"
        write_durably(part, data)
        os.replace(part, self.path / name)
        sync_directory(self.path)
        # Only what this line lists is part of the cache.
        shard = Shard(name, data.size, zlib.crc32(data), tuple(ids), tuple(lengths))
        line = seal(vars(shard)) + b"\n"
        append_durably(journal_file(self.path, self.rank), self._end, line)
        if not self._shards:
            sync_directory(self.path)
        self._committed.update(ids)
        self._shards, self._end = self._shards + 1, self._end + len(line)
        self._forget()

    def close(self) -> None:
        if not self._unlock.alive:
            return
        try:
            self.flush()
        finally:
            self._unlock()
            self._progress.close()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_journals(self) -> None:
        for journal in journals(self.path):
            shards, end = read_journal(journal, self.manifest)
            self._committed.update(sequence for shard in shards for sequence in shard.ids)
            if journal == journal_file(self.path, self.rank):
                self._shards, self._end = len(shards), end

    def _forget(self) -> None:
        self._pending: dict[str, int] = {}
        self._rows: list[dict[str, Tensor]] = []
        self._bytes = 0


def _name(sequence_id: object) -> str:
    name = name_of(sequence_id)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"sequence_id must be text that UTF-8 can hold, got {sequence_id!r}") from None
    return name


def _lock(journal: Path) -> int:
    """Held while the writer lives, and dropped by the system with the process, however it dies."""
    descriptor = os.open(journal, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CacheError(
            f"{journal}: another writer is open as this rank; give each writing process its own rank"
        ) from None
    except (ImportError, OSError):  # a system or file system without locks: the caller's ranks are trusted
        pass
    return descriptor


def _unlock(descriptor: int, owner: int) -> None:
    """Also where a child, forked while the writer was open, still has the descriptor; not by that child."""
    if os.getpid() == owner:
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_UN)
        except (ImportError, OSError):
            pass
    os.close(descriptor)


def _serialised(manifest: Manifest, ids: list[str], lengths: list[int], rows: dict[str, Tensor]) -> Any:
    pa = arrow()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, layout.schema(manifest)) as stream:
        stream.write_batch(layout.batch(manifest, ids, lengths, rows))
    return sink.getvalue()


def _columns(topk: Union[TopK, TeacherRecord]) -> Columns:
    if not isinstance(topk, (TopK, TeacherRecord)):
        raise TypeError(
            f"topk must be what kd.linear_topk or kd_kernels.cache.foreign gives, got {type(topk).__name__}"
        )
    names = ("ids", "logits", "lse", "log_tail_mass", "sample_ids", "sample_counts")
    return {name: getattr(topk, name) for name in names}


def _rows(manifest: Manifest, name: str, columns: Columns, temperature: object) -> dict[str, Tensor]:
    """The columns of one sequence as a shard has them, checked."""
    if isinstance(temperature, tuple) != isinstance(manifest.temperature, tuple) or (
        temperature != manifest.temperature
    ):
        raise ValueError(
            f"sequence {name!r} was made at temperature {temperature}, the cache is of {manifest.temperature}"
        )
    length = columns["lse"].shape[0] if columns["lse"].dim() else 0
    rows = {}
    for column, (dtype, width) in layout.columns(manifest).items():
        value = columns[column]
        shape = (length,) if width is None else (length, width)
        if value is None or tuple(value.shape) != shape:
            found = None if value is None else tuple(value.shape)
            batch = "; append_batch takes a batch" if value is not None and value.dim() > len(shape) else ""
            raise ValueError(
                f"sequence {name!r}: {column} must be {shape}, one row a token; got {found}{batch}"
            )
        _check_dtype(manifest, name, column, value)
        rows[column] = value.detach().cpu()
        if column == "ids":
            _check_ids(manifest, name, column, rows[column])
        if column not in ("logits", "lse"):
            rows[column] = rows[column].to(dtype)
    if manifest.k and manifest.dtype == "float16":
        _make_relative(manifest, rows)
    for column in ("logits", "lse"):
        if column in rows:
            rows[column] = rows[column].to(layout.columns(manifest)[column][0])
    if manifest.samples:
        rows.update(_draws(manifest, name, columns, length))
    # Copies: the caller may fill its memory anew before this is written.
    return {column: value.clone(memory_format=torch.contiguous_format) for column, value in rows.items()}


def _make_relative(manifest: Manifest, rows: dict[str, Tensor]) -> None:
    """Logits, and lse with them, as distances from the largest logit; see :mod:`kd_kernels.cache.layout`."""
    logits = rows["logits"].to(torch.float64)
    largest = logits.amax(-1)
    largest = torch.where(largest.isfinite(), largest, 0.0)
    rows["logits"] = logits - largest[:, None]
    shift = largest[:, None] / torch.tensor(manifest.temperatures, dtype=torch.float64)
    lse = rows["lse"].to(torch.float64)
    rows["lse"] = lse - (shift if isinstance(manifest.temperature, tuple) else shift[:, 0])


def _draws(manifest: Manifest, name: str, columns: Columns, length: int) -> dict[str, Tensor]:
    ids, counts = columns["sample_ids"], columns["sample_counts"]
    shape = (length, manifest.samples)
    if ids is None or counts is None or tuple(ids.shape) != shape or tuple(counts.shape) != shape:
        found = None if ids is None else tuple(ids.shape)
        raise ValueError(f"sequence {name!r}: sample_ids and sample_counts must be {shape}; got {found}")
    for column in ("sample_ids", "sample_counts"):
        _check_dtype(manifest, name, column, columns[column])
    ids, counts = ids.detach().cpu(), counts.detach().cpu()
    _check_ids(manifest, name, "sample_ids", ids)
    used = ids >= 0
    if ids.numel() and bool((used & ((counts < 1) | (counts > manifest.samples))).any()):
        raise ValueError(f"sequence {name!r}: sample_counts must be in [1, {manifest.samples}] where drawn")
    return {
        "samples_per_token": used.sum(-1),
        "sample_ids": ids[used].to(torch.int32),
        "sample_counts": counts[used].to(layout.count_dtype(manifest)),
    }


def _check_dtype(manifest: Manifest, name: str, column: str, value: Tensor) -> None:
    floating = column in ("logits", "lse", "log_tail_mass")
    if floating != value.dtype.is_floating_point or value.dtype in (
        torch.bool,
        torch.complex64,
        torch.complex128,
    ):
        what = "floating" if floating else "integers"
        raise ValueError(f"sequence {name!r}: {column} must be {what}, got {value.dtype}")
    if value.dtype == torch.float64 and manifest.dtype == "float32":
        raise ValueError(
            f"sequence {name!r}: {column} is float64, the cache keeps float32; create it with "
            f'dtype="float64", or narrow what is appended'
        )


def _check_ids(manifest: Manifest, name: str, column: str, ids: Tensor) -> None:
    if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < manifest.vocab_size:
        raise ValueError(
            f"sequence {name!r}: {column} must be in [-1, {manifest.vocab_size}), the cache's "
            f"vocabulary; got {int(ids.min())} to {int(ids.max())}"
        )
