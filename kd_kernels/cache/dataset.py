"""A token data set joined to a cache by sequence id, for torch.utils.data.

Sampler and data set are map-style, so that any number of workers share the work without doubles, and a
position in an epoch is a number of sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Optional, Union

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from kd_kernels.cache.draws import stack_draws
from kd_kernels.cache.errors import CacheError
from kd_kernels.cache.reader import TeacherCache
from kd_kernels.cache.record import TeacherRecord


class TeacherDataset(Dataset):
    """Each item of ``tokens`` with what the teacher said of it, as ``item["teacher"]``.

    Args:
        tokens: map-style; items are mappings with ``id_key`` and ``tokens_key`` (a list or tensor ``[L]``),
            as those of Hugging Face ``datasets`` are.
        cache: a :class:`kd_kernels.TeacherCache`, or its path.
        id_key, tokens_key: names of the sequence id and of the tokens in an item.

    Raises (when an item is read):
        CacheError: no such sequence in the cache, or one of another length: not the tokens it was made of.
    """

    def __init__(
        self,
        tokens: Sequence[Mapping[str, Any]],
        cache: Union[TeacherCache, str, PathLike],
        id_key: str = "sequence_id",
        tokens_key: str = "input_ids",
    ) -> None:
        self.tokens, self.id_key, self.tokens_key = tokens, id_key, tokens_key
        self.cache = cache if isinstance(cache, TeacherCache) else TeacherCache.open(cache)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.tokens[index]
        sequence_id = item[self.id_key]
        if sequence_id not in self.cache:
            raise CacheError(f"{self.cache.path}: sequence_id: the cache has no sequence {sequence_id!r}")
        length = len(item[self.tokens_key])
        if self.cache.length(sequence_id) != length:
            raise CacheError(
                f"{self.cache.path}: length: sequence {sequence_id!r} has {self.cache.length(sequence_id)} "
                f"tokens in the cache and {length} in the data set"
            )
        return {**item, "teacher": self.cache[sequence_id]}


class ResumableSampler(Sampler):
    """The order of an epoch, dealt out to ranks: no sequence twice, as many for every rank.

    What does not divide by the number of ranks is left out of the epoch: another part each time, without
    ``shuffle`` the data set's last sequences. The order depends on seed and epoch alone, so that
    ``set_position(epoch, consumed)`` goes on in the middle, with any number of ranks.

    Args:
        size: of the data set.
        rank, world_size: None: of torch.distributed, (0, 1) without it.
        seed: of the order; the same on every rank.
        shuffle: False: in the order of the data set.
    """

    def __init__(
        self,
        size: int,
        *,
        rank: Optional[int] = None,
        world_size: Optional[int] = None,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        on = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = rank if rank is not None else (torch.distributed.get_rank() if on else 0)
        self.world_size = world_size or (torch.distributed.get_world_size() if on else 1)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}), got {self.rank}")
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.epoch, self.consumed = 0, 0

    def set_position(self, epoch: int, consumed: int = 0) -> None:
        """Begin ``epoch`` after its first ``consumed`` sequences, counted over all ranks: steps times the
        global batch. What workers have fetched ahead does not count."""
        if not 0 <= consumed <= self.size:
            raise ValueError(f"consumed must be in [0, {self.size}], got {consumed}")
        self.epoch, self.consumed = epoch, consumed

    def __len__(self) -> int:
        return (self.size - self.consumed) // self.world_size

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self.size)
        if self.shuffle:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
            order = torch.randperm(self.size, generator=generator)
        rest = order[self.consumed :]
        mine = rest[: len(self) * self.world_size][self.rank :: self.world_size]
        return iter(mine.tolist())


class PadTogether:
    """``collate_fn``: items of :class:`TeacherDataset` as one batch, padded on the right.

    Gives ``input_ids`` ``[B, L]``, ``attention_mask`` (the item's, or all of its tokens), ``labels`` (the
    item's, or the tokens that are attended to; -100 elsewhere), int64 all, and ``teacher``, a
    :class:`TeacherRecord` ``[B, L]`` whose padding names no tokens. Mask it in the loss:
    ``kd.distill(..., labels=kd.next_token_labels(batch["labels"]))``.

    Raises (when called):
        TypeError, ValueError: an item's tokens, mask or labels that are no integers, or not of one length.
    """

    def __init__(self, pad_token_id: int = 0, tokens_key: str = "input_ids") -> None:
        self.pad_token_id, self.tokens_key = pad_token_id, tokens_key

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        tokens, masks, labels = [], [], []
        for item in items:
            own = _integers(self.tokens_key, item[self.tokens_key])
            mask, label = (_per_token(own, item, name) for name in ("attention_mask", "labels"))
            mask = torch.ones_like(own) if mask is None else mask
            tokens.append(own)
            masks.append(mask)
            labels.append(own.masked_fill(mask == 0, -100) if label is None else label)
        return {
            self.tokens_key: _padded(tokens, self.pad_token_id),
            "attention_mask": _padded(masks, 0),
            "labels": _padded(labels, -100),
            "teacher": stack([item["teacher"] for item in items]),
        }


def _integers(name: str, values: Any) -> Tensor:
    found = torch.as_tensor(values)
    if found.numel() and (found.dtype.is_floating_point or found.dtype.is_complex):
        raise TypeError(f"{name} must be integers, got {found.dtype}")
    return found.to(torch.int64)


def _per_token(tokens: Tensor, item: Mapping[str, Any], name: str) -> Optional[Tensor]:
    """What the item has under ``name`` for each of its tokens."""
    if item.get(name) is None:
        return None
    found = _integers(name, item[name])
    if found.shape != tokens.shape:
        raise ValueError(f"{name} must have the {len(tokens)} tokens of its item, got {tuple(found.shape)}")
    return found


def stack(records: Sequence[TeacherRecord]) -> TeacherRecord:
    """Records ``[L]`` of one cache as one ``[B, longest L]``."""
    columns = {}
    for name, fill in {"ids": -1, "logits": -torch.inf, "lse": 0.0, "log_tail_mass": 0.0}.items():
        values = [getattr(record, name) for record in records]
        columns[name] = None if values[0] is None else _padded(values, fill)
    draws = None if records[0].draws is None else stack_draws([record.draws for record in records])
    return TeacherRecord(**columns, draws=draws, temperature=records[0].temperature)


def _padded(values: Sequence[Tensor], fill: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
