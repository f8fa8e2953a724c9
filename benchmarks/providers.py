"""Who is measured. Each provider is one function ``step(inputs, objective) -> loss`` that runs forward and
backward and leaves the gradients in ``.grad`` of the student's hidden states and weight.

A provider that cannot run raises :class:`Unavailable` with the word and the reason that the table shows.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Optional

import torch
from formulas import user_loss
from torch import Tensor
from workloads import Inputs, Objective

Step = Callable[[Inputs, Objective], Tensor]


class Unavailable(Exception):
    """``status`` is "absent" (not importable) or "not offered" (no such objective)."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status
        self.reason = reason


@functools.cache
def _load(module: str) -> ModuleType | Unavailable:
    # Importing a peer runs its code and that of its dependencies: whatever it raises is its reason.
    try:
        return importlib.import_module(module)
    except Exception as error:
        return Unavailable("absent", f"{type(error).__name__}: {error}".splitlines()[0][:160])


def need(module: str) -> Any:
    loaded = _load(module)
    if isinstance(loaded, Unavailable):
        raise loaded
    return loaded


# -- ours ------------------------------------------------------------------------------------------


def ours(inputs: Inputs, objective: Objective, **options: Any) -> Tensor:
    """The package's defaults, but for ``options``: float32 logits whatever the inputs are."""
    kd = need("kd_kernels")
    try:
        loss = kd.distill(
            kd.Head(inputs.h_s, inputs.w_s),
            kd.Head(inputs.h_t, inputs.w_t),
            kd.objectives.CATALOGUE[objective.name](**dict(objective.parameters)),
            **options,
        )
    except kd.BackendUnavailable as error:
        raise Unavailable("absent", str(error).splitlines()[0]) from None
    loss.backward()
    return loss


# -- plain torch -----------------------------------------------------------------------------------


def _plain_loss(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, objective: Objective) -> Tensor:
    with torch.no_grad():
        teacher = h_t @ w_t.t()
    try:
        return user_loss(objective, h_s @ w_s.t(), teacher)
    except KeyError as error:
        raise Unavailable("not offered", str(error.args[0])) from None


def plain_torch(inputs: Inputs, objective: Objective) -> Tensor:
    """What a user writes: logits of both models, log-softmax in float32, the divergence."""
    loss = _plain_loss(inputs.h_s, inputs.w_s, inputs.h_t, inputs.w_t, objective)
    loss.backward()
    return loss


@functools.cache
def _compiled_loss(objective: Objective) -> Callable[..., Tensor]:
    def loss(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
        return user_loss(objective, h_s @ w_s.t(), h_t @ w_t.t())

    # Static shapes: the gate, the warm-up and the timing all run the one shape of the case.
    return torch.compile(loss, dynamic=False)


def compiled_torch(inputs: Inputs, objective: Objective) -> Tensor:
    """``torch.compile`` of the plain loss."""
    loss = _compiled_loss(objective)(inputs.h_s, inputs.w_s, inputs.h_t, inputs.w_t)
    loss.backward()
    return loss


# -- peers -----------------------------------------------------------------------------------------


def _beta(objective: Objective, who: str) -> float:
    """Liger and TRL know one family: 0 is forward KL, 1 reverse KL, between them JS with our convention."""
    if objective.name == "forward_kl":
        return 0.0
    if objective.name == "reverse_kl":
        return 1.0
    if objective.name == "jensen_shannon":
        return objective["beta"]
    raise Unavailable("not offered", f"{who} has forward KL, reverse KL and JS")


def _liger(inputs: Inputs, objective: Objective, compiled: bool) -> Tensor:
    beta = _beta(objective, "Liger")
    loss_class = need("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    loss = loss_class(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)(
        inputs.h_s, inputs.w_s, inputs.h_t, inputs.w_t, inputs.labels
    )
    loss.backward()
    return loss


def liger(inputs: Inputs, objective: Objective) -> Tensor:
    """Liger's chunked loss, default chunk of 1024 tokens, run eagerly."""
    return _liger(inputs, objective, compiled=False)


def liger_compiled(inputs: Inputs, objective: Objective) -> Tensor:
    """The same with its own default, ``compiled=True``."""
    return _liger(inputs, objective, compiled=True)


def liger_fused(inputs: Inputs, objective: Objective) -> Tensor:
    """Liger's Triton kernel between chunked products."""
    loss_class = need("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD
    loss = loss_class(jsd_beta=_beta(objective, "Liger"))(
        inputs.h_s, inputs.w_s, inputs.h_t, inputs.w_t, inputs.labels
    )
    loss.backward()
    return loss


def trl(inputs: Inputs, objective: Objective) -> Tensor:
    """TRL's chunked divergence: per-token values, so the mean is ours; its torch path on CPU."""
    beta = _beta(objective, "TRL")
    function = need("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    divergence, _ = function.apply(inputs.h_s, inputs.w_s, None, inputs.h_t, inputs.w_t, None, beta)
    loss = divergence.mean()
    loss.backward()
    return loss


# -- the list --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    name: str
    step: Step
    options: Optional[dict[str, Any]] = None  # of a step of ours
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiles: bool = False  # seconds of compilation at first call: left out of --quick

    @property
    def ours(self) -> bool:
        return self.options is not None


def _ours(name: str, options: dict[str, Any], **only: Any) -> Provider:
    return Provider(name, functools.partial(ours, **options), options, **only)


GPU = ("cuda",)
PROVIDERS = (
    _ours("kd", {}),
    # Logits rounded to bfloat16, as every peer has them for bfloat16 inputs, except TRL.
    _ours("kd bf16 logits", {"logits_dtype": torch.bfloat16}, dtypes=("bf16",)),
    _ours("kd 1 GiB", {"workspace_bytes": 1 << 30}, devices=GPU),
    _ours("kd cuda", {"backend": "cuda"}, devices=GPU),
    Provider("torch", plain_torch),
    Provider("torch.compile", compiled_torch, compiles=True),
    Provider("liger", liger),
    Provider("liger compiled", liger_compiled, compiles=True),
    Provider("liger fused", liger_fused, devices=GPU),
    Provider("trl", trl),
)


def selected(
    dtype: str, device: str, names: Optional[Sequence[str]] = None, compiling: bool = True
) -> list[Provider]:
    return [
        p
        for p in PROVIDERS
        if dtype in p.dtypes
        and torch.device(device).type in p.devices
        and (names is None or p.name in names)
        and (compiling or not p.compiles)
    ]


def backend(provider: Provider, device: str = "cpu") -> Optional[str]:
    """Which of the package's backends serves a provider of ours; None for peers."""
    if provider.options is None:
        return None
    named = provider.options.get("backend")
    return need("kd_kernels.backends").pick("row_divergence", torch.device(device), named)[0]


def workspace(provider: Provider, device: str) -> int:
    """Bytes of scratch memory that a provider of ours may take."""
    assert provider.options is not None
    named = provider.options.get("workspace_bytes")
    return named or need("kd_kernels.drivers.chunks").default_workspace(torch.device(device))


def by_name(name: str) -> Provider:
    for provider in PROVIDERS:
        if provider.name == name:
            return provider
    raise SystemExit(f"unknown provider {name!r}; there are {[p.name for p in PROVIDERS]}")


def forget_compiled() -> None:
    """Drops compiled code, so that one case's graphs neither count against nor serve the next."""
    _compiled_loss.cache_clear()
    torch._dynamo.reset()
    # A step that silently went back to eager would be timed under the wrong name.
    config = torch._dynamo.config
    newer = "fail_on_recompile_limit_hit"
    setattr(config, newer if hasattr(config, newer) else "fail_on_cache_limit_hit", True)  # before torch 2.7


class Floor:
    """The four products a step cannot do without, into outputs allocated beforehand.

    ``row_major`` has logits [N, V] from ``hidden @ weight.T``; the other form has them [V, N] from
    ``weight @ hidden.T``. The student's logits stand in for their gradient: a GEMM's time does not
    depend on the values.
    """

    def __init__(self, inputs: Inputs, row_major: bool = True) -> None:
        self.h_s, self.w_s, self.h_t, self.w_t = (
            t.detach() for t in (inputs.h_s, inputs.w_s, inputs.h_t, inputs.w_t)
        )
        self.row_major = row_major
        tokens, vocab = self.h_s.shape[0], self.w_s.shape[0]
        size = (tokens, vocab) if row_major else (vocab, tokens)
        self.student, self.teacher = self.h_s.new_empty(size), self.h_s.new_empty(size)
        self.d_hidden, self.d_weight = torch.empty_like(self.h_s), torch.empty_like(self.w_s)

    def __call__(self) -> None:
        if self.row_major:
            torch.mm(self.h_s, self.w_s.t(), out=self.student)
            torch.mm(self.h_t, self.w_t.t(), out=self.teacher)
            torch.mm(self.student, self.w_s, out=self.d_hidden)
            torch.mm(self.student.t(), self.h_s, out=self.d_weight)
        else:
            torch.mm(self.w_s, self.h_s.t(), out=self.student)
            torch.mm(self.w_t, self.h_t.t(), out=self.teacher)
            torch.mm(self.student.t(), self.w_s, out=self.d_hidden)
            torch.mm(self.student, self.h_s, out=self.d_weight)
