"""What to save of a teacher: its top-K, its draws, where given tokens rank; straight from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor

from kd_kernels import rows as R
from kd_kernels.arguments import (
    autocast_dtype,
    check_resources,
    check_source,
    detached,
    flat_ids,
    is_number,
    number,
    refuse_transforms,
    shaping,
)
from kd_kernels.ops.topk import linear_topk as _op
from kd_kernels.sources import Source, SparseTarget, as_source, result_dtype, sampled_of, shown, target_of


class TopK(NamedTuple):
    """What :func:`linear_topk` found. ``[...]`` is the leading shape of the tokens; floats are float32,
    float64 for float64 inputs. With a sequence of M temperatures, what depends on the temperature has one
    more dimension, of M, at the end. None where not asked for. A token whose logits hold NaN or ``+inf``, or
    nothing finite, has NaN for all floats below but ``logits``, and no draws."""

    ids: Tensor
    """``[..., k]`` int32: the k largest logits, by logit descending, then by id ascending; -1 where fewer
    than k are above ``-inf``."""
    logits: Tensor
    """``[..., k]``: the model's logits at ``ids`` (after scale and softcap, before temperature)."""
    lse: Tensor
    """``log sum exp(logits / temperature)``: ``logits / temperature - lse`` are log-probabilities."""
    max: Tensor
    """``[...]``: the largest logit."""
    entropy: Tensor
    """In nats, of the whole distribution."""
    log_tail_mass: Tensor
    """Logarithm of the probability outside the k, summed over what is there: right where 1 minus the rest
    would be lost to rounding."""
    target_logprob: Optional[Tensor]
    """Log-probability of the target; 0 where there is none."""
    target_rank: Optional[Tensor]
    """``[...]`` int32: 1 + how many tokens come before the target, ties by id; 0 where there is none, or no
    distribution."""
    sample_ids: Optional[Tensor]
    """``[..., samples]`` int32: the tokens drawn, each once, ascending; then -1."""
    sample_counts: Optional[Tensor]
    """``[..., samples]`` int32: how often each was drawn; then 0."""
    temperature: Union[float, tuple[float, ...]]
    """As in the call."""

    def __repr__(self) -> str:
        return f"TopK({', '.join(f'{name}={shown(value)}' for name, value in self._asdict().items())})"

    def target(self, missing: str = "tail", index: int = 0) -> SparseTarget:
        """The top-K as a teacher for :func:`distill`, at the ``index``-th temperature.

        Raises:
            ValueError: no such temperature; an unknown ``missing``; ``k`` was 0.
        """
        return target_of(self, missing, index)

    def sampled(self) -> SparseTarget:
        """The draws as a teacher for :func:`distill`, at the first temperature. A token without draws teaches
        nothing.

        Raises:
            ValueError: the call asked for no draws.
        """
        if self.sample_ids is None:
            raise ValueError("there are no draws: linear_topk(..., samples=50)")
        return sampled_of(self.sample_ids, self.sample_counts, self.temperature)


class Ranks(NamedTuple):
    """What :func:`linear_rank` found, in the shape of the ids."""

    rank: Tensor
    """int32: 1 for the most likely token, ties by id; 0 where there is no id, or no distribution."""
    member: Optional[Tensor]
    """bool: among the k most likely, which ``-inf`` never is; None without ``k``."""


def linear_topk(
    source: Source | Tensor,
    k: int,
    *,
    temperature: Union[float, Sequence[float]] = 1.0,
    targets: Optional[Tensor] = None,
    ignore_index: int = -100,
    samples: int = 0,
    seed: Optional[int] = None,
    backend: Optional[str] = None,
    logits_dtype: Optional[torch.dtype] = None,
    workspace_bytes: Optional[int] = None,
) -> TopK:
    """The write side of a teacher cache: everything in one product and one read of each logit; forward only.

    Args:
        source: :class:`Head`, :class:`Logits` or a tensor of logits; leading dimensions are tokens.
        k: how many to keep, 0 to the size of the vocabulary; Triton's kernel keeps 1024 at most, and more are
            left to the slower ``"reference"``.
        temperature: > 0; or a sequence of them, at each of which lse, entropy and tail are wanted. Draws are
            made at the first.
        targets: integer, leading shape: tokens whose log-probability and rank are wanted.
        ignore_index: marks tokens without a target, as does -1.
        samples: how many tokens to draw with replacement, exactly (float32 exponentials, float64 sums).
        seed: of the draws, which depend on it, on the token's place in the call and on nothing else (chunks,
            device). None: drawn from torch's default generator.
        backend, logits_dtype, workspace_bytes: as for :func:`distill`.

    Returns:
        :class:`TopK`, without a graph.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and what would do.
        BackendUnavailable: the named backend cannot serve the call.

    Sources: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax" (one pass); Anshumann et
    al. 2025, "Sparse Logit Sampling" (what draws are for).
    """
    source = as_source("source", source)
    _check_count("k", k, source.vocab_size)
    _check_count("samples", samples, None)
    temperatures, many = _temperatures(temperature)
    lead, device = source.leading_shape, source.tensors()[0].device
    flat = torch.empty(lead.numel(), 0, dtype=torch.int64, device=device)
    if targets is not None:
        if isinstance(targets, Tensor) and targets.shape != lead:
            raise ValueError(
                f"targets must have the leading shape of the tokens, {tuple(lead)}; got "
                f"{tuple(targets.shape)}"
            )
        flat = flat_ids("targets", targets, ignore_index, lead, device)
    if seed is None:
        seed_of_draws = torch.zeros((), dtype=torch.int64, device="cpu")
        if samples:
            seed_of_draws.random_(1 << 62)
    elif isinstance(seed, int) and not isinstance(seed, bool):
        seed_of_draws = torch.tensor(seed % (1 << 63), device="cpu")
    else:
        raise TypeError(f"seed must be an int or None, got {seed!r}")
    ids, values, statistics, target_values, ranks, draws = _call(
        "linear_topk",
        source,
        flat,
        temperatures,
        seed_of_draws,
        k,
        samples,
        ignore_index,
        backend,
        logits_dtype,
        workspace_bytes,
    )
    dtype = result_dtype(source.tensors()[0])

    def column(which: int) -> Tensor:
        per_temperature = statistics[:, R.topk_column(which) :: 3]
        shaped = per_temperature.reshape(*lead, len(temperatures))
        return (shaped if many else shaped[..., 0]).to(dtype)

    logprob = rank = None
    if targets is not None:
        # By numbers on the host, which are not copied: nothing waits for the device.
        scaled = torch.cat([target_values / t for t in temperatures.unbind()], 1)
        logprob = scaled - statistics[:, R.topk_column(R.TOPK_LSE) :: 3]
        logprob = torch.where(flat < 0, 0.0, logprob).reshape(*lead, len(temperatures)).to(dtype)
        logprob = logprob if many else logprob[..., 0]
        rank = torch.where(_undefined(statistics), 0, ranks).reshape(lead)
    sample_ids = counts = None
    if samples:
        # What a kernel draws where there is no distribution is its own affair, and must not be trained on.
        sample_ids, counts = _runs(torch.where(_undefined(statistics), -1, draws))
    return TopK(
        ids=ids.reshape(*lead, k),
        logits=values.reshape(*lead, k).to(dtype),
        lse=column(R.TOPK_LSE),
        max=statistics[:, R.TOPK_MAX].reshape(lead).to(dtype),
        entropy=column(R.TOPK_ENTROPY),
        log_tail_mass=column(R.TOPK_LOG_TAIL),
        target_logprob=logprob,
        target_rank=rank,
        sample_ids=None if sample_ids is None else sample_ids.reshape(*lead, samples),
        sample_counts=None if counts is None else counts.reshape(*lead, samples),
        temperature=tuple(float(t) for t in temperature) if many else float(temperature),
    )


def linear_rank(
    source: Source | Tensor,
    ids: Tensor,
    k: Optional[int] = None,
    *,
    ignore_index: int = -100,
    backend: Optional[str] = None,
    logits_dtype: Optional[torch.dtype] = None,
    workspace_bytes: Optional[int] = None,
) -> Ranks:
    """Where given tokens stand in a model's order, and whether they are among its ``k`` most likely: what
    speculative decoding and distillation ask of a teacher. No top-K list is made.

    Args:
        source: :class:`Head`, :class:`Logits` or a tensor of logits; leading dimensions are tokens.
        ids: integer, the leading shape or that and K more; -1 or ``ignore_index`` where there is none.
        k: asks for membership too.
        ignore_index, backend, logits_dtype, workspace_bytes: as for :func:`distill`.

    Returns:
        :class:`Ranks`. The order is by logit descending, then by id ascending.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and what would do.
        BackendUnavailable: the named backend cannot serve the call.
    """
    source = as_source("source", source)
    if k is not None:
        _check_count("k", k, source.vocab_size)
    lead, device = source.leading_shape, source.tensors()[0].device
    flat = flat_ids("ids", ids, ignore_index, lead, device)
    seed, one = torch.zeros((), dtype=torch.int64, device="cpu"), number(1.0)[None]
    found = _call(
        "linear_rank", source, flat, one, seed, 0, 0, ignore_index, backend, logits_dtype, workspace_bytes
    )
    _, _, statistics, values, ranks, _ = found
    ranks = torch.where(_undefined(statistics), 0, ranks)
    member = None
    if k is not None:  # -inf is never among the k largest
        member = ((ranks > 0) & (ranks <= k) & (values > -torch.inf)).reshape(ids.shape)
    return Ranks(ranks.reshape(ids.shape), member)


def _call(
    function: str,
    source: Source,
    targets: Tensor,
    temperatures: Tensor,
    seed: Tensor,
    k: int,
    samples: int,
    ignore_index: int,
    backend: Optional[str],
    logits_dtype: Optional[torch.dtype],
    workspace_bytes: Optional[int],
) -> tuple[Tensor, ...]:
    refuse_transforms(f"kd_kernels.{function}", *source.tensors())
    check_source("source", source, source.tensors()[0].device)
    check_resources(ignore_index, backend, workspace_bytes, logits_dtype)
    return _op(
        *detached(source).tensors(),
        targets,
        temperatures,
        torch.stack(shaping(source)),
        seed,
        k,
        samples,
        autocast_dtype(source),
        logits_dtype,
        backend,
        workspace_bytes,
    )


def _undefined(statistics: Tensor) -> Tensor:
    """``[N, 1]`` bool: the token has no distribution."""
    return statistics[:, R.topk_column(R.TOPK_LSE), None].isnan()


def _check_count(name: str, value: int, most: Optional[int]) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 0 or (most is not None and value > most):
        bounds = ">= 0" if most is None else f"in [0, {most}], the size of the vocabulary"
        raise ValueError(f"{name} must be {bounds}, got {value}")


def _temperatures(temperature: Union[float, Sequence[float]]) -> tuple[Tensor, bool]:
    """(``[M]`` float64 on CPU, whether it was a sequence)"""
    many = isinstance(temperature, (list, tuple))
    if many and not temperature:
        raise ValueError("temperature must hold at least one number, got an empty sequence")
    values = temperature if many else [temperature]
    for value in values:
        if not is_number(value):
            raise TypeError(
                f"temperature must be a number, or a list or tuple of numbers, got "
                f"{type(value).__name__}; of a tensor or an array use .tolist()"
            )
    return torch.stack([number(value) for value in values]), many


def _runs(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending draws ``[N, S]`` as (ids, counts), each id once, then -1 and 0."""
    places = torch.arange(draws.shape[1], device=draws.device)
    first = torch.ones_like(draws, dtype=torch.bool)
    first[:, 1:] = draws[:, 1:] != draws[:, :-1]
    # The places where runs begin, in order; a run's length is the way to the next.
    begins = torch.where(first, places, draws.shape[1]).sort(dim=1).values
    ends = torch.nn.functional.pad(begins[:, 1:], (0, 1), value=draws.shape[1])
    used = begins < draws.shape[1]
    ids = draws.gather(1, begins.clamp(max=draws.shape[1] - 1))
    counts = torch.where(ids < 0, 0, ends - begins)  # a row without a distribution drew -1
    return torch.where(used, ids, -1), torch.where(used, counts, 0).to(torch.int32)
