"""Entropic optimal transport between small sets: the public calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional, Union

import torch
from torch import Tensor

from kd_kernels import problems as P
from kd_kernels.arguments import check_backend, check_positive, number, refuse_transforms, saveable
from kd_kernels.ops.checks import checks_values
from kd_kernels.ops.class_cost import class_cost as _class_cost
from kd_kernels.ops.sinkhorn import sinkhorn as _op
from kd_kernels.sources import Shown

ORDERS, MASSES = ("rows_columns", "columns_rows"), ("probability", "unit")
GRADIENTS = ("implicit", "envelope", "unrolled")
_MOST_ITERATIONS = 1000
# Of the mass: what float32 reaches, and what is worth waiting for in float64.
_TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-9}


@dataclass(frozen=True, eq=False, repr=False)
class Transport(Shown):
    """What :func:`sinkhorn` found. ``[...]`` is ``[B]``, or nothing for a single problem; float32, float64
    for float64 costs. ``transport_cost``, ``value`` and ``plan`` carry gradients, as far as ``gradient``
    says."""

    transport_cost: Tensor
    """``[...]``: ``<P, C>``."""
    value: Tensor
    """``[...]``: ``<P, C> + epsilon KL(P | a b')`` at a solution; before one, ``<a, f> + <b, g>``, which is
    less."""
    f: Tensor
    """``[..., n]``: potentials of the rows in units of the cost, ``P_ij = a_i b_j exp((f_i + g_j - C_ij) /
    epsilon)``; 0 where ``a`` is."""
    g: Tensor
    """``[..., m]``: likewise of the columns."""
    marginal_error: Tensor
    """``[...]``: L1 error of the marginal that the last half-step left inexact (the other one is exact)."""
    iterations: Tensor
    """``[...]`` int64: iterations taken."""
    product_gap: Tensor
    """``[...]``: how far the plan is from the product coupling ``a b'``, ``KL(P | a b')`` in nats of P and
    ab' as distributions. Near 0, epsilon is so large that the transport cost is the mean cost, whatever is
    close to what."""
    plan: Optional[Tensor] = None
    """``[..., n, m]``, where asked for."""


def sinkhorn(
    cost: Tensor,
    a: Optional[Tensor] = None,
    b: Optional[Tensor] = None,
    *,
    epsilon: float,
    iterations: Optional[int] = None,
    tolerance: Optional[float] = None,
    lengths: Optional[Union[Tensor, tuple[Tensor, Tensor]]] = None,
    domain: str = "auto",
    order: str = "rows_columns",
    mass: str = "probability",
    gradient: str = "implicit",
    epsilon_schedule: Optional[Sequence[float]] = None,
    return_plan: bool = False,
    backend: Optional[str] = None,
) -> Transport:
    """Entropic optimal transport, ``min <P, C> + epsilon KL(P | a b')`` over plans with marginals a and b, by
    alternate scaling of rows and columns.

    Args:
        cost: ``[n, m]`` or ``[B, n, m]``; with marginals ``[B, n]`` or ``[B, m]`` an ``[n, m]`` cost is
            shared by B problems and never repeated. float32, bfloat16, float16 (the iterations are in
            float32) or float64. ``inf`` forbids a pair.
        a, b: ``[n]`` or ``[B, n]``, and ``[m]`` or ``[B, m]``; >= 0, of the same mass. An entry of 0 is
            absent: whatever the cost holds there is not used. None: equal for all entries, see ``mass``.
        epsilon: > 0, in units of the cost.
        iterations: how many (row and column step together); with ``tolerance`` at most so many. Default 1000
            at most.
        tolerance: ends where the marginals' L1 error is at most this share of the mass. None with
            ``iterations`` given: never, all are done (the form of published losses). None without: 1e-5, 1e-9
            in float64.
        lengths: ``[B, 2]`` integers or a pair of ``[B]``: the rows and columns that problem b has; what is
            beyond is absent.
        domain: ``"scaling"`` iterates on scalings, one multiplication per entry, ``"log"`` on their
            logarithms, an exponential per entry, for any cost. ``"auto"``: scalings where a row's costs span
            at most 60 epsilon (and of one shared cost, without a schedule).
        order: which half-step comes first. The marginal of the second one is exact.
        mass: what marginals not given sum to: ``"probability"`` to 1, ``"unit"`` each entry is 1.
        gradient: ``"implicit"``: of the solution, by one linear system per problem; right for
            ``transport_cost`` and ``plan``, and for ``value`` the envelope. ``"envelope"``: ``value`` only,
            the others carry none. ``"unrolled"``: of the number returned, back through all iterations, as
            published losses have it; needs ``iterations``, and neither ``tolerance`` nor
            ``epsilon_schedule``. To marginals they are right up to a constant that one gains and the other
            loses.
        epsilon_schedule: epsilons of iterations that go ahead of all, one each, such as ``[1.0, 0.5, 0.2]``.
        return_plan: also return the plan, ``[B, n, m]`` also where the cost is shared.
        backend: name of a backend, or None for the first that serves the call.

    Returns:
        :class:`Transport`.

    Raises:
        ValueError, TypeError: an argument that does not fit. On CPU also: a marginal that cannot be met
            because its pairs are forbidden, costs too far apart for ``domain="scaling"``, NaN in the cost. On
            a GPU, where looking would wait, such a problem's numbers are NaN or infinite.
        BackendUnavailable: the named backend cannot serve the call.

    Double backward is not implemented and raises; ``torch.func`` transforms are refused.

    Source: Cuturi 2013, "Sinkhorn Distances"; gradients: docs/sinkhorn.md.
    """
    _check_options(cost, domain, order, mass, gradient, backend)
    for name, marginal in (("a", a), ("b", b)):
        if marginal is not None:
            _check_floating(name, marginal)
    check_positive("epsilon", epsilon)
    if tolerance is not None:
        check_positive("tolerance", tolerance)
    refuse_transforms("kd_kernels.sinkhorn", cost, *(x for x in (a, b) if x is not None))
    state = torch.float64 if cost.dtype == torch.float64 else torch.float32
    single = cost.dim() == 2 and all(x is None or x.dim() == 1 for x in (a, b)) and lengths is None
    count = _batch(cost, a, b, lengths)
    a, b = _marginals(cost, (a, b), lengths, count, mass, state)
    if single:
        cost = cost[None]
    ahead = [float(e) for e in (() if epsilon_schedule is None else epsilon_schedule)]
    exact = tolerance is None and iterations is not None
    if gradient == "unrolled" and (not exact or ahead):
        raise ValueError(
            'gradient="unrolled" needs iterations= without tolerance= or epsilon_schedule=: it goes back '
            "through a fixed number of steps"
        )
    steps = _MOST_ITERATIONS if iterations is None else iterations
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"iterations must be an int > 0, got {iterations!r}")
    if any(not 0 < e < float("inf") for e in ahead):
        raise ValueError(f"epsilon_schedule must be finite and > 0, got {ahead}")
    epsilons = torch.cat([*(number(e)[None] for e in ahead), number(epsilon).expand(steps)])
    limit = 0.0 if exact else _TOLERANCES[state] if tolerance is None else tolerance
    find = _traced_offset if torch.compiler.is_compiling() else P.offset
    offset = find(*(x.detach() for x in (cost, a, b)))
    if offset is not None:
        cost = cost.to(state) - (offset[:, None, None] if cost.dim() == 3 else offset)
    phi, psi, transport, value, plan, found, *_ = _op(
        saveable(cost),
        saveable(a),
        saveable(b),
        epsilons,
        number(limit),
        P.DOMAINS.index(domain),
        order == ORDERS[1],
        gradient == "unrolled",
        return_plan,
        backend,
    )

    def potential(log_scaling: Tensor, mass: Tensor, more: Union[Tensor, float]) -> Tensor:
        return torch.where(mass == 0, 0.0, epsilon * (log_scaling - mass.log()) + more).detach()

    of_rows, of_columns = 0.0, 0.0
    if offset is not None:
        first, last = (b, a) if order == ORDERS[1] else (a, b)
        # The plan has the last one's mass whatever the cost; the first one's potential takes the offset up.
        of_plan, of_value = (offset * torch.where(x > 0, x, 0.0).sum(1) for x in (last, first))
        transport, value = transport + of_plan, value + of_value
        of_rows, of_columns = (0.0, offset[..., None]) if first is b else (offset[..., None], 0.0)
    if gradient == "envelope":
        transport, plan = transport.detach(), plan.detach()
    results = {
        "transport_cost": transport,
        "value": value,
        "f": potential(phi, a, of_rows),
        "g": potential(psi, b, of_columns),
        "marginal_error": found[:, P.ERROR].detach().to(state),
        "iterations": found[:, P.ITERATIONS].to(torch.int64),
        "product_gap": found[:, P.GAP].detach().to(state),
        "plan": plan if return_plan else None,
    }
    if single:
        results = {name: None if x is None else x[0] for name, x in results.items()}
    return Transport(**results)


@torch.library.custom_op("kd_kernels::cost_offset", mutates_args=())
def _traced_offset(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """For a compiler, which cannot ask sizes that depend on values."""
    found = P.offset(cost, a, b)
    return a.new_zeros(a.shape[0] if cost.dim() == 3 else ()) if found is None else found


@_traced_offset.register_fake
def _(cost, a, b):
    return a.new_empty(a.shape[0] if cost.dim() == 3 else ())


def sinkhorn_divergence(
    cost: Tensor,
    cost_a: Tensor,
    cost_b: Tensor,
    a: Optional[Tensor] = None,
    b: Optional[Tensor] = None,
    *,
    epsilon: float,
    **options,
) -> Tensor:
    """The debiased divergence ``OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2`` of entropic values: 0 where both are
    the same, which the value alone is not. Three solves.

    Args:
        cost: ``[n, m]`` or ``[B, n, m]``, between the two.
        cost_a, cost_b: ``[.., n, n]`` and ``[.., m, m]``, of each with itself.
        a, b, epsilon, options: as in :func:`sinkhorn`; ``lengths`` as a pair.

    Returns:
        ``[B]`` or 0-d, differentiable.

    Source: Feydy et al. 2019, "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences".
    """
    lengths = options.pop("lengths", None)
    of_rows, of_columns = (None, None) if lengths is None else _pair(lengths)

    def value(cost: Tensor, a: Optional[Tensor], b: Optional[Tensor], rows, columns) -> Tensor:
        pair = None if rows is None else (rows, columns)
        return sinkhorn(cost, a, b, epsilon=epsilon, lengths=pair, **options).value

    own = value(cost_a, a, a, of_rows, of_rows) + value(cost_b, b, b, of_columns, of_columns)
    return value(cost, a, b, of_rows, of_columns) - own / 2


def class_cost(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    epsilon: float,
    iterations: int,
    domain: str,
    order: str,
    denominator: float,
    backend: Optional[str],
) -> tuple[Tensor, Tensor, Tensor]:
    """``<P, C>`` ``[B]``, product gap and marginal error of one cost ``[n, m]`` for all. The first is
    differentiated through the iterations; as in published losses, a number is added to every denominator, and
    scalings start at equal shares."""
    _check_options(cost, domain, order, "probability", "unrolled", backend)
    # What all costs have in common moves no plan, and takes digits from potentials.
    least = cost.amin() if cost.numel() and not denominator else cost.new_zeros(())
    least = torch.where(least.isfinite(), least, 0.0)
    if torch.compiler.is_compiling() or cost.device.type != "cpu" or bool(least != 0):
        cost = cost - least
    transport, found, *_ = _class_cost(
        *(saveable(x) for x in (a, b, cost)),
        number(epsilon).repeat(iterations),
        number(denominator),
        P.DOMAINS.index(domain),
        order == ORDERS[1],
        backend,
        [torch.is_grad_enabled() and x.requires_grad for x in (a, b)],
    )
    gap, error = (found[:, i].detach().to(a.dtype) for i in (P.GAP, P.ERROR))
    return transport + least * a.detach().sum(1), gap, error


def apart_from_nan(cost: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """For losses, whose problems must not share a fate: costs ``[B, n, m]`` that can all be solved, zeros
    where nothing is ``present`` or the problem holds NaN or infinity; and ``[B]`` to be added to what was
    found: 0, or NaN in value and in the gradients of all that problem's costs."""
    lost = (~cost.isfinite() & present).flatten(1).any(1)
    held = torch.where(present, cost, 0.0).flatten(1).sum(1)
    solvable = torch.where(lost[:, None, None] | ~present, 0.0, cost)
    return solvable, held * torch.where(lost, torch.nan, 0.0).to(held.dtype)


# --- checks -------------------------------------------------------------------------------------------


def _check_floating(name: str, value: object) -> None:
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating tensor, got {found}")


def _check_options(
    cost: Tensor, domain: str, order: str, mass: str, gradient: str, backend: Optional[str]
) -> None:
    _check_floating("cost", cost)
    if cost.dim() not in (2, 3):
        raise ValueError(f"cost must be [n, m] or [B, n, m], got {tuple(cost.shape)}")
    for name, value, known in (
        ("domain", domain, P.DOMAINS),
        ("order", order, ORDERS),
        ("mass", mass, MASSES),
        ("gradient", gradient, GRADIENTS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    check_backend(backend)


def _pair(lengths: Union[Tensor, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if isinstance(lengths, Tensor) and lengths.dim() == 2 and lengths.shape[1] == 2:
        return lengths[:, 0], lengths[:, 1]
    if (
        isinstance(lengths, (tuple, list))
        and len(lengths) == 2
        and all(isinstance(x, Tensor) for x in lengths)
    ):
        return tuple(lengths)
    raise ValueError("lengths must be [B, 2] integers or a pair of [B] tensors: rows, columns")


def _check_lengths(lengths: Tensor, size: int, what: str) -> None:
    if lengths.dtype.is_floating_point or lengths.dim() != 1:
        raise TypeError(f"lengths must be integers [B], got {lengths.dtype} {tuple(lengths.shape)}")
    if torch.compiler.is_compiling() or not checks_values(lengths.device):
        return  # beyond the size is as much as the size
    lengths = lengths.to(torch.int64)  # small types would wrap in comparisons
    wrong = lengths[(lengths < 0) | (lengths > size)]
    if wrong.numel():
        raise ValueError(f"lengths must be in [0, {size}], the {what} of the cost, got {wrong[0].item()}")


def _batch(cost: Tensor, a: Optional[Tensor], b: Optional[Tensor], lengths) -> int:
    counts = [x.shape[0] for x in (a, b) if isinstance(x, Tensor) and x.dim() == 2]
    counts += [cost.shape[0]] if cost.dim() == 3 else []
    counts += [x.shape[0] for x in _pair(lengths)] if lengths is not None else []
    # Compared one by one: a set would make constants of a compiled graph of sizes that vary.
    if any(count != counts[0] for count in counts[1:]):
        raise ValueError(
            f"cost, a, b and lengths must agree on the number of problems, got {sorted(set(counts))}"
        )
    return counts[0] if counts else 1


def _marginals(
    cost: Tensor,
    given: tuple[Optional[Tensor], Optional[Tensor]],
    lengths,
    count: int,
    mass: str,
    state: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Both as ``[B, size]`` in the state's dtype, 0 beyond the lengths."""
    both = []
    pair = (None, None) if lengths is None else _pair(lengths)
    for name, value, size, length in zip("ab", given, cost.shape[-2:], pair):
        present = None
        if length is not None:
            _check_lengths(length, size, "rows" if name == "a" else "columns")
            length = length.to(cost.device, torch.int64)
            present = torch.arange(size, device=cost.device) < length[:, None]
        if value is None:
            value = torch.ones(count, size, dtype=state, device=cost.device)
            if mass == "probability" and size > 0:
                sums = size if present is None else present.sum(1, keepdim=True).clamp(min=1)
                value = value / sums
        else:
            if mass == "unit":
                raise ValueError(
                    f'mass="unit" makes every entry 1; with {name}= given, leave it "probability"'
                )
            if value.device != cost.device:
                raise ValueError(f"{name} is on {value.device}, the cost on {cost.device}")
            if value.shape[-1:] != (size,) or value.dim() not in (1, 2):
                raise ValueError(f"{name} must be [{size}] or [B, {size}], got {tuple(value.shape)}")
            value = value.to(state).expand(count, size)
        both.append(value if present is None else torch.where(present, value, 0.0))
    if all(x is None for x in given) and (lengths is not None or 0 in cost.shape[-2:]):
        # Nobody said that one side has mass where the other one has nothing.
        filled = (both[0].any(1) & both[1].any(1))[:, None]
        both = [torch.where(filled, x, 0.0) for x in both]
    return tuple(both)
