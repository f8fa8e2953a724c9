"""Reading: an index from the journals, shards mapped and checked when first touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Optional, Union

import torch
from torch import Tensor

from kd_kernels.cache.checks import check_size, load
from kd_kernels.cache.draws import Draws
from kd_kernels.cache.errors import CacheError, arrow
from kd_kernels.cache.manifest import Manifest, Shard, journals, read_journal, read_manifest, unlisted
from kd_kernels.cache.record import TeacherRecord, name_of
from kd_kernels.cache.writer import CacheWriter


class TeacherCache:
    """A teacher on disk: ``cache[sequence_id]`` is a :class:`TeacherRecord`, bit for bit as it was written.

    A directory of Arrow files that ``datasets.Dataset.from_file`` opens, memory-mapped; JSON beside them, and
    no pickle. Made by :meth:`create`, read by :meth:`open`. May be shared by forked processes, and sent to
    spawned ones, which open it again.

    Attributes:
        path: the directory.
        manifest: model, vocab_size, k, temperature, samples and dtype.
        shards: what the journals list.
    """

    def __init__(self, path: Path) -> None:
        arrow()
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        self.shards: list[Shard] = []
        self._places: dict[str, tuple[int, int]] = {}
        for journal in journals(path):
            for shard in read_journal(journal, self.manifest)[0]:
                check_size(path / shard.name, shard)
                self._list(journal, shard)
        self._shards: dict[int, _Mapped] = {}

    @classmethod
    def open(cls, path: Union[str, PathLike]) -> TeacherCache:
        """
        Raises:
            CacheError: no cache, or a damaged one. Each shard's checksum is verified when it is first read;
                :meth:`verify` does so at once.
            ImportError: pyarrow is not installed.
        """
        return cls(Path(path).absolute())

    @staticmethod
    def create(
        path: Union[str, PathLike],
        *,
        model: str,
        vocab_size: int,
        k: int,
        temperature: Union[float, list[float], tuple[float, ...]] = 1.0,
        samples: int = 0,
        dtype: str = "float32",
        rank: Optional[int] = None,
        shard_bytes: int = 64 << 20,
        total: Optional[int] = None,
    ) -> CacheWriter:
        """Begin a cache, or go on with the one at ``path``.

        Args:
            path: the directory; made where it is not there.
            model: the teacher's name, for people.
            vocab_size, k, temperature, samples: as in the :func:`kd_kernels.linear_topk` calls to come.
            dtype: of saved logits: ``"float32"`` or ``"float64"`` keep them bit for bit; ``"float16"`` takes
                six bytes for an entry instead of eight, and keeps differences from the largest logit to 1
                part in 2000.
            rank: number of this writing process, other than that of every other one. None: the rank in
                torch.distributed, 0 without it.
            shard_bytes: size of a file, and about what a kill can lose.
            total: number of sequences to come, for the progress line on stderr.

        Raises:
            CacheError: a cache of other contents is there; or another process writes as this rank; or an
                argument that makes no cache.
            ImportError: pyarrow is not installed.
        """
        if rank is None:
            on = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if on else 0
        manifest = Manifest(model, vocab_size, k, temperature, samples, dtype)
        return CacheWriter(Path(path).absolute(), manifest, rank, shard_bytes, total)

    def __getitem__(self, sequence_id: Union[str, int]) -> TeacherRecord:
        """
        Raises:
            KeyError, TypeError: no such sequence.
            CacheError: its shard is damaged.
        """
        number, row = self._place(sequence_id)
        shard = self._shards.get(number) or self._open(number)
        return shard.record(row, self.manifest)

    def _place(self, sequence_id: Union[str, int]) -> tuple[int, int]:
        name = name_of(sequence_id)
        if name not in self._places:
            raise KeyError(f"no sequence {name!r} among the {len(self)} of this cache")
        return self._places[name]

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        """Sequence ids in the order in which they were written, by rank."""
        return iter(self._places)

    def __contains__(self, sequence_id: object) -> bool:
        try:
            return name_of(sequence_id) in self._places
        except TypeError:
            return False

    def length(self, sequence_id: Union[str, int]) -> int:
        """Tokens of a sequence, without reading it."""
        number, row = self._place(sequence_id)
        return self.shards[number].lengths[row]

    @property
    def tokens(self) -> int:
        return sum(sum(shard.lengths) for shard in self.shards)

    def verify(self, shard: Shard) -> None:
        """Read and check one of ``shards`` whole, whatever was checked before.

        Raises:
            CacheError: it is damaged.
        """
        load(self.path / shard.name, shard, self.manifest)

    def unlisted(self) -> list[str]:
        """Files that are no part of the cache: what killed writers left."""
        return unlisted(self.path, self.shards)

    def __reduce__(self) -> tuple:
        return TeacherCache.open, (self.path,)

    def _list(self, journal: Path, shard: Shard) -> None:
        self.shards.append(shard)
        for row, sequence_id in enumerate(shard.ids):
            if sequence_id in self._places:
                other = self.shards[self._places[sequence_id][0]].name
                raise CacheError(
                    f"{journal}: ids: sequence {sequence_id!r} is twice in the cache, in {other} and in "
                    f"{shard.name}"
                )
            self._places[sequence_id] = (len(self.shards) - 1, row)

    def _open(self, number: int) -> _Mapped:
        shard = self.shards[number]
        self._shards[number] = _Mapped(load(self.path / shard.name, shard, self.manifest), shard.lengths)
        return self._shards[number]


class _Mapped:
    """A shard that has been checked, and where its sequences begin."""

    def __init__(self, columns: dict[str, Tensor], lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.of_tokens = [columns.get(name) for name in ("ids", "logits", "lse", "log_tail_mass")]
        self.of_draws = [columns.get(name) for name in ("sample_ids", "sample_counts", "sample_ends")]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        self.starts = starts.tolist()
        self.drawn = columns["sample_ends"][starts].tolist() if "sample_ends" in columns else []

    def record(self, row: int, manifest: Manifest) -> TeacherRecord:
        """Copies, so that nothing of the caller's hangs on a mapped file."""
        start, length = self.starts[row], self.lengths[row]
        found = [None if x is None else x.narrow_copy(0, start, length) for x in self.of_tokens]
        return TeacherRecord(*found, self._draws(row, manifest.samples), manifest.temperature)

    def _draws(self, row: int, samples: int) -> Optional[Draws]:
        if not samples:
            return None
        first, n, length = self.drawn[row], self.drawn[row + 1] - self.drawn[row], self.lengths[row]
        ids, counts, ends = self.of_draws
        return Draws(
            ids.narrow_copy(0, first, n),
            counts.narrow_copy(0, first, n),
            ends.narrow_copy(0, self.starts[row], length + 1),
            (length,),
            samples,
        )
