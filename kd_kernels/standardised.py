"""The softmax of each token's logits over their own standard deviation, as Multi-Level OT has it: sums over
tokens, and the probabilities of a few entries with their gradient. Plain torch, a few tokens at a time and in
place; on the CPU in blocks that stay in its cache."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Optional

import torch
from torch import Tensor

from kd_kernels.arguments import autocast_dtype
from kd_kernels.dense_chunks import chunk_logits, rows_that_fit
from kd_kernels.drivers.workspace import fresh
from kd_kernels.ops.backward import once
from kd_kernels.sources import Head, Source

_LEAST_SPREAD = 1e-4  # added to a token's standard deviation, as published
_BLOCK = 1 << 18  # numbers: 1 MiB in float32
# Columns of the statistics: mean and standard deviation of the logits, the largest one less the mean, the
# factor on logits, and the reciprocal of the sum of exponentials.
_STATISTICS = 5


def _in_its_dtypes(method):
    """Autocast has had its say: products of float32 here are sums, which must stay so."""

    @functools.wraps(method)
    def wrapped(self: Standardised, *arguments):
        with torch.autocast(self.picked.device.type, enabled=False):
            return method(self, *arguments)

    return wrapped


class Standardised:
    """``p = softmax(z / ((std z + 1e-4) temperature))`` of some tokens of a source: those whose places among
    all tokens are ``picked`` ``[N]``. Under autocast heads compute in its dtype."""

    def __init__(
        self,
        source: Source,
        picked: Tensor,
        temperature: float,
        dtype: torch.dtype,
        workspace_bytes: Optional[int],
    ) -> None:
        values, weight, _ = source.tensors()
        values = values.reshape(-1, values.shape[-1])
        if isinstance(source, Head):
            compute = autocast_dtype(source) or values.dtype
            source = replace(source, hidden=values.to(compute), weight=weight.to(compute))
        else:
            source = replace(source, values=values)
        self.source, self.picked, self.temperature, self.dtype = source, picked, temperature, dtype
        self.vocab = source.vocab_size
        self.existing = not isinstance(source, Head)
        self.block = max(1, _BLOCK // self.vocab) if values.device.type == "cpu" else len(picked)
        self.rows = rows_that_fit(values, self.vocab, dtype, workspace_bytes)
        if self.existing:  # heads want many rows for their products
            self.rows = max(1, min(self.rows, self.block))
        self.statistics = values.new_empty(len(picked), _STATISTICS, dtype=dtype)

    def scratch(self, count: int) -> list[Tensor]:
        """``[block, V]`` each, for one walk: memory that comes anew would cost more than the work on it."""
        rows = min(self.block, self.rows, len(self.picked))
        return [self.statistics.new_empty(rows, self.vocab) for _ in range(count)]

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of ``picked``, and the source's values there, which the next chunk may overwrite."""
        values = self.source.tensors()[0]
        reused = self.scratch(1)[0] if self.existing and values.dtype == self.dtype else None
        for start in range(0, len(self.picked), self.rows):
            rows = slice(start, min(start + self.rows, len(self.picked)))
            out = None if reused is None else reused[: rows.stop - rows.start]
            yield rows, torch.index_select(values, 0, self.picked[rows], out=out)

    def blocks(self, rows: slice) -> Iterator[slice]:
        """Of the rows of a chunk, from its start."""
        count = rows.stop - rows.start
        for start in range(0, count, self.block):
            yield slice(start, min(start + self.block, count))

    @torch.no_grad()
    @_in_its_dtypes
    def measure(self) -> Tensor:
        """``[V]`` float64: sums of the probabilities over all tokens. Fills in the statistics."""
        sums = self.statistics.new_zeros(self.vocab, dtype=torch.float64)
        (centred,) = self.scratch(1)
        for rows, values in self.chunks():
            logits = chunk_logits(self.source, values, self.dtype)
            for block in self.blocks(rows):
                sums += self._measure(logits[block], self.statistics[rows][block], centred)
        return sums

    def _measure(self, logits: Tensor, statistics: Tensor, scratch: Tensor) -> Tensor:
        mean = logits.mean(1, keepdim=True)
        centred = torch.sub(logits, mean, out=scratch[: len(logits)])
        # torch.std takes several times as long.
        spread = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / max(self.vocab - 1, 1) ** 0.5
        factor = 1 / ((spread + _LEAST_SPREAD) * self.temperature)
        top = centred.amax(1, keepdim=True)
        weights = centred.sub_(top).mul_(factor).exp_()
        share = 1 / weights.sum(1, keepdim=True)
        torch.cat([mean, spread, top, factor, share], 1, out=statistics)
        return torch.mv(weights.t(), share[:, 0])  # not @, which changes its product in place

    @torch.no_grad()
    def probabilities(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of ``picked`` and ``[n, V]``, of a few tokens each. After :meth:`measure`."""
        for rows, values in self.chunks():
            logits = chunk_logits(self.source, values, self.dtype)
            yield rows, _probabilities(logits, self.statistics[rows])

    def kept(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """``[N, K]``, differentiable: probabilities of ``ids`` ``[B, K]``, each row of which is for as many
        tokens as ``lengths`` says. After :meth:`measure`."""
        return _Kept.apply(self, ids, lengths, *self.source.tensors())

    @_in_its_dtypes
    def kept_logits(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        values, weight, bias = self.source.tensors()
        found = [values.new_zeros(0, ids.shape[1], dtype=self.dtype)]
        for rows, wanted in zip(self.picked.split(list(lengths)), ids):
            if isinstance(self.source, Head):
                few = replace(self.source, weight=weight[wanted], bias=None if bias is None else bias[wanted])
                found.append(chunk_logits(few, values[rows], self.dtype))
            else:
                found.append(chunk_logits(self.source, values[rows[:, None], wanted], self.dtype))
        return torch.cat(found)

    def without_tensors(self) -> Standardised:
        """What a backward pass may keep: the source's tensors are autograd's to keep, and to let go."""
        bare = copy.copy(self)
        bare.source = functools.partial(
            type(self.source), scale=self.source.scale, softcap=self.source.softcap
        )
        return bare

    def with_tensors(self, tensors: Sequence[Optional[Tensor]]) -> Standardised:
        whole = copy.copy(self)
        whole.source = self.source(*(x for x in tensors if x is not None))
        return whole

    @_in_its_dtypes
    def backward(self, ids: Tensor, arriving: Tensor, needs: Sequence[bool]) -> list[Optional[Tensor]]:
        """Gradients of the source's tensors. ``ids`` and ``arriving`` are ``[N, K]``, the latter what arrives
        at the probabilities, times these."""
        tensors = self.source.tensors()
        # Of parameters: sums over chunks.
        results = [
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if needed else None
            for x, needed in zip(tensors, (False, *needs[1:]))
        ]
        if needs[0]:
            results[0] = fresh(tensors[0].shape, tensors[0].dtype, tensors[0].device)
            others = torch.ones(len(tensors[0]), dtype=torch.bool, device=ids.device)
            results[0][others.index_fill_(0, self.picked, False)] = 0.0
        scratch = self.scratch(3)
        for rows, values in self.chunks():
            leaves = [
                x if x is None else x.detach().requires_grad_(y)
                for x, y in zip((values, *tensors[1:]), needs)
            ]
            with torch.enable_grad():
                source = self.source
                if isinstance(source, Head):
                    source = replace(source, weight=leaves[1], bias=leaves[2])
                logits = chunk_logits(source, leaves[0], self.dtype)
            final = logits is leaves[0]  # existing logits, with nothing done to them
            gradient = None if final else torch.empty_like(logits)
            for block in self.blocks(rows):
                of_block = (self.statistics[rows][block], ids[rows][block], arriving[rows][block])
                one = self._gradient(logits.detach()[block], *of_block, scratch)
                if gradient is None:
                    results[0].index_copy_(0, self.picked[rows][block], one)
                else:
                    gradient[block] = one
            if final:
                continue
            wanted = [i for i, needed in enumerate(needs) if needed]
            for i, part in zip(wanted, torch.autograd.grad(logits, [leaves[i] for i in wanted], gradient)):
                if i == 0:
                    results[0].index_copy_(0, self.picked[rows], part)
                else:
                    results[i].add_(part)
        return [x if x is None else x.to(like.dtype) for x, like in zip(results, tensors)]

    def _gradient(
        self, logits: Tensor, statistics: Tensor, ids: Tensor, arriving: Tensor, scratch: Sequence[Tensor]
    ) -> Tensor:
        """With ``x = factor z``: ``dx = scatter(arriving) - p sum(arriving)``; z reaches x through the factor
        too: ``dz = factor dx + c (z - mean)``, ``c = -<dx, z> factor^2 temperature / ((V - 1) std)``."""
        mean, spread, top, factor, share = statistics.split(1, 1)
        centred, out, product = (x[: len(logits)] for x in scratch)
        torch.sub(logits, mean, out=centred)
        torch.sub(centred, top, out=out).mul_(factor).exp_()
        out.mul_(arriving.sum(1, keepdim=True).neg_() * share).scatter_add_(1, ids, arriving)
        along = torch.mul(out, centred, out=product).sum(1, keepdim=True)  # dx sums to 0: centred does
        through = -along * factor.square() * self.temperature / (max(self.vocab - 1, 1) * spread)
        # A token whose logits are all the same has no direction in which they spread.
        return out.mul_(factor).addcmul_(centred, torch.where(spread == 0, 0.0, through))


def _probabilities(logits: Tensor, statistics: Tensor) -> Tensor:
    """Of all entries or of some, ``[n, ...]``."""
    mean, _, top, factor, share = statistics.split(1, 1)
    return (logits - mean).sub_(top).mul_(factor).exp_().mul_(share)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, side: Standardised, ids: Tensor, lengths: Sequence[int], *tensors: Optional[Tensor]
    ) -> Tensor:
        found = _probabilities(side.kept_logits(ids, lengths), side.statistics)
        # A product of fewer columns rounds differently: where logits hardly spread, by more than this allows.
        found.clamp_(max=1.0)
        ctx.side, ctx.lengths = side.without_tensors(), lengths
        ctx.save_for_backward(ids, found, *tensors)
        return found

    @staticmethod
    def backward(ctx, arriving: Tensor) -> tuple[Optional[Tensor], ...]:
        ids, found, *tensors = ctx.saved_tensors
        with torch.no_grad():
            side = ctx.side.with_tensors(tensors)
            counts = torch.tensor(ctx.lengths, dtype=torch.int64, device=ids.device)
            each = ids.repeat_interleave(counts, 0, output_size=len(found))
            made = side.backward(each, arriving * found, ctx.needs_input_grad[3:])
        made = (x if x is None else once("multi_level_transport", x, arriving, *tensors) for x in made)
        return None, None, None, *made
