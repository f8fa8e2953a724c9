"""How good a model is and how far from others, token by token; forward only."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from kd_kernels.arguments import (
    Scalar,
    autocast_dtype,
    check_resources,
    check_sources,
    check_vocab,
    count,
    detached,
    per_token,
    refuse_transforms,
    shaping,
    valid_tokens,
)
from kd_kernels.drivers.score import CONFIDENCE, ENTROPY, NLL
from kd_kernels.ops.score import score as score_op
from kd_kernels.sources import Source, as_source


class ModelScore(NamedTuple):
    """One model. All have the leading shape of the tokens, are of softmax(logits / temperature), and are 0
    at tokens that do not count."""

    nll: Optional[Tensor]
    """Negative log-likelihood of the label, in nats; None without labels."""
    entropy: Tensor
    """Entropy in nats."""
    confidence: Tensor
    """The largest probability, in (0, 1]."""
    top1: Tensor
    """int64: the id of the largest probability, the smallest such id; -1 at a row of logits with NaN or
    ``+inf`` or without a finite one, whose numbers are NaN."""
    correct: Optional[Tensor]
    """bool: ``top1`` is the label; None without labels."""


class PairScore(NamedTuple):
    """One teacher (p) against the student (q). All have the leading shape of the tokens, are of
    softmax(logits / temperature), and are 0 at tokens that do not count."""

    forward_kl: Tensor
    """KL(p || q) in nats."""
    reverse_kl: Tensor
    """KL(q || p) in nats."""
    jensen_shannon: Tensor
    """1/2 KL(p || m) + 1/2 KL(q || m) with m = (p + q) / 2, in nats; at most log 2."""
    top1_agreement: Tensor
    """bool: both have the same ``top1``."""


class Scores(NamedTuple):
    """What :func:`score` found; no tensor has a graph."""

    models: tuple[ModelScore, ...]
    """The student, then the teachers in the order of the call."""
    pairs: tuple[PairScore, ...]
    """Each teacher against the student; empty without a teacher."""
    counted: Tensor
    """bool, leading shape: the tokens that count; ``mask`` for :func:`calibration`."""
    valid_tokens: Tensor
    """0-d int64: how many tokens count."""

    def mean(self, values: Tensor) -> Tensor:
        """The mean of one of the per-token results over the tokens that count: 0-d float64; 0 without any."""
        if not isinstance(values, Tensor) or values.shape != self.counted.shape:
            shape = tuple(values.shape) if isinstance(values, Tensor) else values
            raise ValueError(
                f"mean takes one of the per-token results, of shape {tuple(self.counted.shape)}; got {shape} "
                f"(nll and correct are None without labels)"
            )
        return values.sum(dtype=torch.float64) / self.valid_tokens.clamp(min=1)

    def summary(self) -> dict[str, float]:
        """All means over the tokens that count, under flat names for a log: ``"student/nll"``,
        ``"student/accuracy"``, ``"teacher0/entropy"``, ``"teacher0/forward_kl"``, ...; and their number,
        ``"valid_tokens"``. ``teacher0`` is the first of :attr:`pairs`."""
        columns: dict[str, Tensor] = {}
        for i, model in enumerate(self.models):
            named = model._asdict()
            named["accuracy"] = named.pop("correct")
            del named["top1"]
            if i > 0:
                named.update(self.pairs[i - 1]._asdict())
            owner = f"teacher{i - 1}" if i > 0 else "student"
            columns.update({f"{owner}/{name}": x for name, x in named.items() if x is not None})
        means = torch.stack([self.mean(x) for x in columns.values()]).tolist()  # one wait for the device
        return {**dict(zip(columns, means)), "valid_tokens": int(self.valid_tokens)}


def score(
    student: Source | Tensor,
    *teachers: Source | Tensor,
    labels: Optional[Tensor] = None,
    ignore_index: int = -100,
    mask: Optional[Tensor] = None,
    temperature: Scalar = 1.0,
    vocab: str = "error",
    backend: Optional[str] = None,
    logits_dtype: Optional[torch.dtype] = None,
    workspace_bytes: Optional[int] = None,
) -> Scores:
    """Measure a model per token and compare it with others, without ``[tokens, vocab]`` logits.

    Forward only: no graph is kept, whatever requires grad. Tokens that do not count are dropped before any
    projection (on CUDA that takes one host synchronisation, where there are labels or a mask), and each
    model's logits are computed once.

    Args:
        student: :class:`Head`, :class:`Logits` or a tensor of logits; leading dimensions are tokens.
        teachers: likewise, with the same leading shape, each compared with the student; hidden sizes and
            dtypes may differ.
        labels: integer, leading shape, as they stand beside the hidden states (see
            :func:`next_token_labels`).
        ignore_index: tokens with this label do not count.
        mask: bool, leading shape; True = counts. Combines with ``labels``.
        temperature: > 0, one number for all tokens; divides every model's logits, so that all results,
            ``nll`` included, are of softmax(logits / temperature).
        vocab: ``"error"`` refuses unequal vocabularies, ``"truncate"`` restricts all models to the common
            prefix before any normaliser; labels must lie in it.
        backend: name of a backend, which must serve the topk kernel and, with teachers, the row kernel; or
            None for the first that serves each.
        logits_dtype: None keeps logits of a head in float32 (float64 for float64); the input's own
            dtype trades accuracy for speed.
        workspace_bytes: scratch memory for the logits of all models together, reused between calls.
            Default on CPU: 256 MiB.

    Returns:
        :class:`Scores`, in float32 (float64 where any model is float64). A model that gives a label, or what
        the other model holds possible, probability 0 has ``inf`` there.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it and what would do.
        BackendUnavailable: the named backend cannot serve the call.
    """
    sources = [as_source("student", student)]
    names = ["teacher"] if len(teachers) == 1 else [f"teacher {i}" for i in range(len(teachers))]
    sources += [as_source(name, teacher) for name, teacher in zip(names, teachers)]
    refuse_transforms("kd_kernels.score", *(x for source in sources for x in source.tensors()))
    check_vocab(vocab)
    check_resources(ignore_index, backend, workspace_bytes, logits_dtype)
    for name, other in zip(["student", *names], sources):
        check_sources(sources[0], other, vocab, name)
    lead, device = sources[0].leading_shape, sources[0].tensors()[0].device
    valid = valid_tokens(labels, ignore_index, mask, lead, device)

    sources = [detached(source) for source in sources]
    values, weights, biases = zip(*(source.tensors() for source in sources))
    measures, top1, divergences = score_op(
        list(values),
        list(weights),
        list(biases),
        valid,
        None if labels is None else labels.reshape(-1),
        torch.stack([*shaping(*sources), _one_number("temperature", temperature)]),
        autocast_dtype(*sources),
        logits_dtype,
        backend,
        workspace_bytes,
    )
    counted = torch.ones(lead, dtype=torch.bool, device=device) if valid is None else valid.reshape(lead)
    measures, divergences = (x.reshape(*x.shape[:2], *lead) for x in (measures, divergences))
    top1 = top1.reshape(len(sources), *lead)
    models = tuple(
        ModelScore(
            nll=None if labels is None else measures[i, NLL],
            entropy=measures[i, ENTROPY],
            confidence=measures[i, CONFIDENCE],
            top1=top1[i],
            correct=None if labels is None else (top1[i] == labels) & counted,
        )
        for i in range(len(sources))
    )
    agreed = (top1 == top1[0]) & (top1 >= 0) & counted
    pairs = tuple(
        PairScore(*divergences[i].unbind(), top1_agreement=agreed[i + 1]) for i in range(len(teachers))
    )
    return Scores(models, pairs, counted, count(valid, lead, device))


def _one_number(name: str, value: Scalar) -> Tensor:
    """0-d float64 on CPU."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(
                f"{name} must be one number for all tokens, got a tensor of shape {tuple(value.shape)}"
            )
        value = value.detach().cpu()
    return per_token(name, value, torch.Size(), torch.device("cpu"))
