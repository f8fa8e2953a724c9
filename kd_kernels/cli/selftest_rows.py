"""The self-test of what looks at one model: log-probabilities, sparse teachers, top-K."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_kernels.distill import distill
from kd_kernels.logprobs import linear_logprobs
from kd_kernels.objectives import ForwardKL
from kd_kernels.reference import dense_distill
from kd_kernels.reference.dense import logits_of
from kd_kernels.sources import Head, Logits, Source, SparseTarget
from kd_kernels.topk import linear_topk

TOKENS, VOCAB, WIDTH, K = 37, 1031, 24, 9
TEMPERATURE = 1.3
Results = list[tuple[str, Tensor]]


class OneModel:
    """A random model with every option in use; ``kind`` "head" or "logits"."""

    def __init__(self, kind: str, dtype: torch.dtype, seed: int) -> None:
        self.kind, self.dtype = kind, dtype
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        if kind == "head":
            made = [normal(TOKENS, WIDTH), normal(VOCAB, WIDTH) * 2.5 / WIDTH**0.5, normal(VOCAB)]
        else:
            made = [normal(TOKENS, VOCAB) * 2.5]
        self.tensors = [x.to(dtype) for x in made]
        self.ids = torch.rand(TOKENS, VOCAB, generator=g).argsort(1)[:, :K]
        self.ids[::4] = -1
        self.logprobs = (normal(TOKENS, K) - 1).log_softmax(1) - 0.3
        self.upstream = normal(TOKENS, K + 1)

    def source(self, where: str, dtype: torch.dtype) -> tuple[Source, list[Tensor]]:
        leaves = [x.detach().to(where, dtype).requires_grad_() for x in self.tensors]
        shaping = {"scale": 0.9, "softcap": 12.0}
        return (Head if self.kind == "head" else Logits)(*leaves, **shaping), leaves


def plain_logits(source: Source) -> Logits:
    """As a careful user has them: in the inputs' dtype, then float32."""
    z = F.linear(*source.tensors()) if isinstance(source, Head) else source.values
    return Logits(z.to(torch.promote_types(z.dtype, torch.float32)), source.scale, source.softcap)


def log_probabilities(
    model: OneModel, where: str, dtype: torch.dtype, backend: str, plainly: bool
) -> Results:
    source, leaves = model.source(where, dtype)
    ids = model.ids.to(where)
    if plainly:
        log_q = (logits_of(plain_logits(source)) / TEMPERATURE).log_softmax(1)
        used = ids >= 0
        logprobs = torch.where(used, log_q.gather(1, ids.clamp(min=0)), 0.0)
        entropy = torch.where(used.any(1), -(log_q.exp() * log_q).sum(1), 0.0)
    else:
        logprobs, entropy = linear_logprobs(
            source, ids, temperature=TEMPERATURE, entropy=True, backend=backend, workspace_bytes=256 << 10
        )
    out = torch.cat([logprobs, entropy[:, None]], 1)
    gradients = torch.autograd.grad(out, leaves, model.upstream.to(out))
    return [("log-probabilities", logprobs), ("entropy", entropy), *_named(gradients)]


def sparse_teacher(model: OneModel, where: str, dtype: torch.dtype, backend: str, plainly: bool) -> Results:
    source, leaves = model.source(where, dtype)
    target = SparseTarget(model.ids.to(where), model.logprobs.to(where))
    options = {
        "mask": (model.ids >= 0).any(1).to(where),
        "temperature": TEMPERATURE,
        "teacher_temperature": 1.0,
    }
    if plainly:
        loss = dense_distill(plain_logits(source), target, ForwardKL(), **options)
    else:
        loss = distill(source, target, ForwardKL(), backend=backend, workspace_bytes=256 << 10, **options)
    return [("loss", loss), *_named(torch.autograd.grad(loss, leaves))]


def largest(model: OneModel, where: str, dtype: torch.dtype, backend: str, plainly: bool) -> Results:
    source, _ = model.source(where, dtype)
    targets = model.ids[:, 0].to(where)
    if not plainly:
        found = linear_topk(
            source, K, temperature=TEMPERATURE, targets=targets, backend=backend, workspace_bytes=256 << 10
        )
        return [(name, getattr(found, name)) for name in _TOPK]
    z = logits_of(plain_logits(source)).detach()
    values, ids = z.topk(K, 1)
    log_p = (z / TEMPERATURE).log_softmax(1)
    at_target = torch.where(targets >= 0, log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0], 0.0)
    tail = log_p.scatter(1, ids, -torch.inf).logsumexp(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    return list(zip(_TOPK, (values, (z / TEMPERATURE).logsumexp(1), entropy, tail, at_target)))


_TOPK = ("logits", "lse", "entropy", "log_tail_mass", "target_logprob")
CHECKS: dict[str, dict[str, Callable[..., Results]]] = {
    "gather": {"log-probabilities": log_probabilities, "sparse forward KL": sparse_teacher},
    "topk": {"top-K": largest},
}
KINDS = ("head", "logits")


def _named(gradients: tuple[Tensor, ...]) -> Results:
    return list(zip(("d values", "d weight", "d bias"), gradients))
