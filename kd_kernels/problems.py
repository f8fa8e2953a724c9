"""The contract between the Sinkhorn driver and its kernel. csrc/sinkhorn.h states the same for C++.

A problem is a cost ``C [n, m]`` and two marginals. The kernel keeps logarithms ``phi [n]`` and ``psi [m]`` of
the scalings; the plan is ``P_ij = exp(phi_i + psi_j - C_ij / epsilon)``. A half-step makes one of its
marginals right:

    rows:     phi_i = log a_i - logsumexp_j(psi_j - C_ij / epsilon)
    columns:  psi_j = log b_j - logsumexp_i(phi_i - C_ij / epsilon)

from ``psi = 0``, the row step first. An entry with marginal 0 is absent: its potential is -inf, no plan and
no gradient reaches it, and whatever the cost holds there is never used. An infinite cost forbids its pair.

Source: Cuturi 2013; the adjoints are derived in docs/sinkhorn.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

# Phases.
SOLVE, UNROLLED, IMPLICIT = 1, 2, 4
# Domains: scalings, or their logarithms; AUTO takes scalings where they have room (see SCALING_ROOM).
AUTO, SCALING, LOG = 0, 1, 2
DOMAINS = ("auto", "scaling", "log")

# Columns of ``numbers`` [B, 5], float64: <P, C>; the rows' L1 error; iterations taken; the divergence
# KL(P | a b') of the plan from the product coupling, both as distributions; and how the solution ended.
TRANSPORT, ERROR, ITERATIONS, GAP, STATUS = range(5)
NUMBER_COLUMNS = 5
# Values of the column STATUS.
SOLVED, INFEASIBLE, OUT_OF_ROOM = range(3)

# The largest (cost - the row's least cost) / epsilon for which AUTO takes scalings: exp(-60) is 1e-26, which
# leaves float32's 1e-38 some room for sums of scalings.
SCALING_ROOM = 60.0
# Of the implicit adjoint's conjugate gradients: steps at most, and the fall of the residual that is enough.
CG_STEPS, CG_TOLERANCE = 1000, 1e-10


def room(dtype: torch.dtype) -> float:
    """The largest (cost - the row's least cost) / epsilon for which scalings are not refused where asked for:
    the least normal number's logarithm."""
    return -math.log(torch.finfo(dtype).tiny)


def reach(cost: Tensor) -> Tensor:
    """``[n]`` float64: how far a row of costs ``[n, m]`` goes above its least one, infinite ones left
    out; 0 where all are."""
    least, most = cost.amin(1), cost.amax(1)
    if cost.device.type != "cpu" or bool((most == math.inf).any()):  # a look would wait for a GPU
        most = torch.where(cost < math.inf, cost, -math.inf).amax(1)
    return (most.double() - least.double()).clamp(min=0.0)


def fits_scalings(cost: Tensor, epsilons: Tensor) -> bool:
    """Whether a cost [n, m] leaves scalings room; waits for the device. A change of epsilon raises them to a
    power, for which there may be none whatever the costs."""
    least, most = (float(x) for x in epsilons.aminmax())
    return least == most and not bool((reach(cost) > SCALING_ROOM * least).any())


def offset(cost: Tensor, a: Tensor, b: Tensor) -> Optional[Tensor]:
    """``[B]``, of a shared cost 0-d: the least cost of a problem whose costs all lie further from 0 than from
    each other, else 0; None where no problem is so. It moves no plan, and takes digits from potentials."""
    if cost.numel() == 0 or len(a) == 0:
        return None
    rows, columns = a > 0, b > 0
    if cost.dim() == 2:
        rows, columns = rows.any(0), columns.any(0)
    looks = cost.device.type == "cpu"
    if looks:  # where a row's costs are not so, all of them are not
        first = rows.to(torch.uint8).argmax(-1)
        row = cost[first] if cost.dim() == 2 else cost[torch.arange(len(cost)), first]
        present = columns & rows.any(-1, keepdim=True)
        finite = present & row.isfinite()
        unknown = present.any(-1) & ~finite.any(-1)
        if not bool((unknown | _far(*_ends(row, finite, a.dtype))).any()):
            return None
    present = (rows[..., None] & columns[..., None, :]) & cost.isfinite()
    least, most = _ends(cost.flatten(-2), present.flatten(-2), a.dtype)
    far = _far(least, most)
    return None if looks and not bool(far.any()) else torch.where(far, least, 0.0)


def _ends(costs: Tensor, there: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The least and the most of what is there."""
    least = torch.where(there, costs, math.inf).amin(-1)
    return least.to(dtype), torch.where(there, costs, -math.inf).amax(-1).to(dtype)


def _far(least: Tensor, most: Tensor) -> Tensor:
    """Whether what lies between is further from 0 than from each other; not where nothing does."""
    return (least <= most) & (torch.minimum(least.abs(), most.abs()) > most - least)


@dataclass
class SinkhornJob:
    """B problems of one size. Floats are float32, float64 for float64 costs ("the state's dtype") unless said
    otherwise; everything but ``cost`` is contiguous."""

    cost: Tensor  # [B, n, m], columns contiguous; any floating dtype; one cost for all has batch stride 0
    a: Tensor  # [B, n] >= 0
    b: Tensor  # [B, m] >= 0
    epsilons: Tensor  # [iterations] float64 on the host: of each iteration
    # Ends where the rows' L1 error is at most this share of the mass; 0: never. Looked at before the row step
    # of every iteration but the first that is at the last epsilon as the one before it was: what a schedule's
    # earlier epsilons solve is another problem.
    tolerance: float
    domain: int
    # Results of SOLVE, read by the others.
    phi: Tensor  # [B, n]
    psi: Tensor  # [B, m]
    numbers: Tensor  # [B, 5] float64; NaN where the cost holds NaN or -inf
    phi_history: Optional[Tensor] = None  # [B, iterations, n]: after each row step
    psi_history: Optional[Tensor] = None  # [B, iterations, m]: after each column step
    # What arrives at the gradients of <P, C>, of P (or None), and, in UNROLLED, of phi and psi.
    d_transport: Optional[Tensor] = None  # [B]
    d_plan: Optional[Tensor] = None  # [B, n, m]
    d_phi: Optional[Tensor] = None  # [B, n]
    d_psi: Optional[Tensor] = None  # [B, m]
    # Also in IMPLICIT: what arrives at <P, C> as if P were constant, [B].
    d_value: Optional[Tensor] = None
    # Results of UNROLLED: gradients of the cost, log a and log b; of IMPLICIT: of the cost, a and b, the last
    # two up to a constant that one gains and the other loses.
    d_cost: Optional[Tensor] = None  # [B, n, m]
    d_a: Optional[Tensor] = None  # [B, n]
    d_b: Optional[Tensor] = None  # [B, m]
    # Added to the denominators of scalings (of ``exp(-C / epsilon)``), which start at equal shares then; only
    # where drivers/sinkhorn_shared.py iterates.
    denominator: float = 0.0

    def looks(self, step: int) -> bool:
        """Whether the tolerance is looked at before ``step``."""
        return (
            self.tolerance > 0
            and step > 0
            and bool((self.epsilons[step - 1 : step + 1] == self.epsilons[-1]).all())
        )

    @property
    def iterations(self) -> int:
        return self.epsilons.numel()


@dataclass
class GibbsJob:
    """``kernel = exp((shift - C) / epsilon)`` of a cost, and ``weighted``, the same times C and 0 where the
    kernel is. The shift is the least finite cost of a row, 0 where there is none; ``reach`` is by how much
    the largest finite one exceeds it. All float32 or all float64; the matrices ``[n, m]`` have unit stride
    along the same dimension."""

    cost: Tensor
    epsilon: float
    shift: Tensor  # [n]
    reach: Tensor  # [n]
    kernel: Tensor
    weighted: Tensor  # with the strides of ``kernel``


@dataclass
class HalfStepJob:
    """One half-step of all problems that share a cost, whose kernel ``K = exp(-C / epsilon)`` is given.

    With ``s = x K'``, or ``x K`` if ``transposed``, ``out`` is ``weight / (s + extra)``, 0 where the weight
    or that denominator is; or, where it does not ``divide``, ``weight s``. float32 or float64, all the same;
    columns are contiguous.
    """

    kernel: Tensor  # [n, m], columns contiguous
    x: Tensor  # [B, m]; transposed: [B, n]
    weight: Tensor  # [B, n]; transposed: [B, m]
    out: Tensor  # as weight
    transposed: bool
    divide: bool
    extra: Optional[Tensor] = None  # [n]; transposed: [m]
