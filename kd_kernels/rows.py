"""The row kernels' contracts, as csrc/*.h state them for the compiled backends.

A driver fills a job; every backend's ``row_divergence(job, phases)``, ``gather(job, phases)``,
``topk(job)``, ``sorted_l1(job)``, ``pairwise_l1(job, phases)``, ``angle(job)`` and ``distance(job, phases)``
reads and writes the job's tensors in place and returns nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import Tensor

STATISTICS, TERMS, GRADIENT = 1, 2, 4  # phases; a call runs consecutive ones, fused

# Columns of ``statistics`` [n, 10] float64; z = logit after scale and softcap, u = z / temperature: the
# largest z (-inf where all are, and only there), log sum exp(u - max u) (HARD: the student's at
# temperature 1), sum q dL/dq and sum p dL/dp, z at the label: NaN where that is out of range, which makes the
# row NaN unless a later phase is given another.
MAX_STUDENT, LOGZ_STUDENT, MAX_TEACHER, LOGZ_TEACHER, LOGZ_HARD, SUM_STUDENT, SUM_TEACHER, LABEL_LOGIT = (
    range(8)
)
# Sums of q and of p as computed: 1 up to rounding, which the gradient divides out of SUM_*.
MASS_STUDENT, MASS_TEACHER = 8, 9
STATISTIC_COLUMNS = 10
# The sorted L1, whose SUM_* are dL/d log mass, keeps here by how much its top-K form may be too small.
ERROR_BOUND = MASS_TEACHER
# Columns of ``terms`` [n, 4] float64, unweighted.
SOFT, HARD, STUDENT_ENTROPY, TEACHER_ENTROPY = range(4)
TERM_COLUMNS = 4


@dataclass
class Rows:
    """One model's logits, in one of two layouts.

    Row-major: ``logits`` is any tensor whose memory holds the rows, ``offsets`` [n] int64 gives the
    element offset of each row from its first element, the vocabulary is contiguous.
    Vocabulary-major: ``offsets`` is None and ``logits`` is ``[vocab, n]`` with unit stride along tokens.

    ``grad`` has the same layout; it may be ``logits`` itself.
    """

    logits: Tensor
    offsets: Optional[Tensor]
    temperature: Tensor  # [n] float64
    scale: float = 1.0
    softcap: float = 0.0  # 0: none
    grad: Optional[Tensor] = None
    grad_offsets: Optional[Tensor] = None
    # Row-major: what divides every offset, known without looking at them. Wide loads need it.
    multiple: int = 1
    grad_multiple: int = 1

    def read(self, n: int, vocab: int) -> Tensor:
        """The raw logits as ``[n, vocab]`` (a copy in the row-major layout)."""
        if self.offsets is None:
            return self.logits[:vocab, :n].t()
        return _flat(self.logits)[_entries(self.offsets, vocab)]

    def write_grad(self, values: Tensor) -> None:
        """Store ``values`` [n, vocab] as the gradient."""
        n, vocab = values.shape
        assert self.grad is not None
        if self.offsets is None:
            self.grad[:vocab, :n].copy_(values.t())
        else:
            assert self.grad_offsets is not None
            _flat(self.grad)[_entries(self.grad_offsets, vocab)] = values.to(self.grad.dtype)


@dataclass
class RowJob:
    """One call of a row kernel over ``n`` rows."""

    objective: str
    n: int
    vocab: int
    student: Rows
    teacher: Rows
    parameter0: Tensor  # [n] float64
    parameter1: Tensor  # [n] float64
    labels: Optional[Tensor]  # [n] int64; None: no cross-entropy
    soft_weight: Tensor  # [n] float64: the gradient is soft_weight dSoft + hard_weight dHard;
    hard_weight: Tensor  # [n] float64: a row with both 0 gets gradient 0, whatever it holds
    statistics: Tensor  # [n, 10] float64
    terms: Tensor  # [n, 4] float64
    entropies: bool


# Columns of a gather's ``statistics`` [n, 4] float64: over the entries that are at none of the row's ids.
# Where there are none, or all are -inf: -inf, -inf, -inf, 0.
OTHERS_MAX, OTHERS_LOGZ, OTHERS_LOGZ_HARD, OTHERS_MEAN = range(4)
GATHER_COLUMNS = 4


@dataclass
class GatherJob:
    """One call of the gather kernel over ``n`` rows: a few entries by id, and sums over all the others.

    STATISTICS fills ``gathered`` and ``statistics``: with z the logit after scale and softcap and
    ``x = (z - max z) / temperature``, over the others, max z, ``log sum exp(x)``, the same at temperature 1,
    and the mean of x under ``exp(x)``. A backend listed in ``backends.OVERWRITES`` may leave anything in the
    logits at the ids, which the gradient phase does not mind.

    GRADIENT writes ``side.grad``, the gradient with respect to the raw logit. With
    ``log share = x - OTHERS_LOGZ``, dL/dz of an entry among the others is
    ``share (soft + slope log share) + hard share_hard``, 0 where z is -inf; at the ids it is ``at_ids``.
    """

    n: int
    vocab: int
    side: Rows
    ids: Tensor  # [n, K] int32, ascending, none twice; -1 (unused) in front
    gathered: Tensor  # [n, K] float64: z at the ids, -inf where unused
    statistics: Tensor  # [n, 4] float64
    hard: bool  # whether OTHERS_LOGZ_HARD and hard_weight are wanted
    means: bool  # whether OTHERS_MEAN is wanted
    # For the gradient phase; a coefficient of 0 silences its summand whatever the row holds.
    soft: Optional[Tensor] = None  # [n] float64
    slope: Optional[Tensor] = None  # [n] float64; None: 0
    hard_weight: Optional[Tensor] = None  # [n] float64
    at_ids: Optional[Tensor] = None  # [n, K] float64


@dataclass
class SortedSide:
    """One model's end of a sorted L1."""

    rows: Rows  # row-major
    vocab: int
    max: Tensor  # [n] float64: the largest z, the logit after scale and softcap
    logz: Tensor  # [n] float64: log sum exp((z - max) / temperature)
    mass: Tensor  # [n] float64 > 0: what the row's probabilities sum to
    sum: Tensor  # [n] float64, out: dL/d log mass


@dataclass
class SortedL1Job:
    """One call of the sorted-L1 kernel: ``sum_k |p_(k) - q_(k)|`` of each row, both in descending order, the
    shorter filled up with zeros; and, where a side's rows have a ``grad``, the gradient of the raw logits.

    Equal probabilities stand in the order of their ids, and sign(0) = 0. A row whose max or logz is not
    finite on either side has NaN for loss, sums and gradients.
    """

    n: int
    student: SortedSide
    teacher: SortedSide
    soft_weight: Tensor  # [n] float64: of both gradients; 0 silences them, whatever the row holds
    loss: Tensor  # [n] float64, out: unweighted
    # hard_weight times the gradient of the student's cross-entropy at temperature 1 is added.
    hard_weight: Optional[Tensor] = None  # [n] float64; 0 silences it; None: none
    hard_logz: Optional[Tensor] = None  # [n] float64: log sum exp(z - max)
    labels: Optional[Tensor] = None  # [n] int64; never read where out of range


@dataclass
class AngleJob:
    """One call of the angle kernel: all angles between n points, student's against teacher's.

    With s the squared distances and r the inverse ones, the cosine at the vertex i of the edges to j and k is
    ``(s_ij + s_ik - s_jk) r_ij r_ik / 2``, and ``h`` the smooth L1 of the two models' difference. An edge
    without length has r = 0, which makes its cosines 0 and silences its gradients.

    The matrices are ``[n, ld]`` float64 with unit stride, ld a multiple of ``ANGLE_PADDING``; columns from n
    on are 0. A gradient is of the sum of all h with respect to s, as if ``s_ij`` and ``s_ji`` were two
    variables (only the sum of the two counts); its columns from n on may hold anything.
    """

    n: int
    beta: float
    student: Tensor
    student_inverse: Tensor
    teacher: Tensor
    teacher_inverse: Tensor
    sums: Tensor  # [n] float64: over all i and k of h(i; j, k)
    student_grad: Optional[Tensor] = None
    teacher_grad: Optional[Tensor] = None


ANGLE_PADDING = 8  # numbers: the widest vector

# What stands in a distance's ``numbers`` [6] float64: both means and both shifts the student's first.
BETA, EPS = 0, 1
MEANS, SHIFTS = slice(2, 4), slice(4, 6)


@dataclass
class DistanceJob:
    """One call of the distance kernel: distances between n points relative to their mean, student's against
    teacher's.

    The matrices are ``[n, ld]`` float64 of squared distances s with unit stride, ld a multiple of
    ``DISTANCE_PADDING``. The distance d is 0 where s < 0, which says that there is no pair (columns from n on
    are such), ``sqrt(eps)`` where 0 <= s <= eps, and ``sqrt(s)`` elsewhere, also where s is NaN. With
    ``x = d / mean``, ``h`` the smooth L1 of the student's x less the teacher's and ``slope`` its derivative:

    STATISTICS writes of each row sum d and how many d != 0, of the student, then the teacher.
    TERMS writes of each row sum h, sum slope x of the student and sum slope x of the teacher.
    GRADIENT writes the derivatives of the sum of all h with respect to s, through the means, as if ``s_ij``
    and ``s_ji`` were two variables: of the student ``(slope - shift) / (2 mean d)`` where d is ``sqrt(s)``,
    else 0, of the teacher less the same; columns from n on may hold anything.

    Between two phases the driver fills in the means, 1 for one that is 0, and the shifts,
    sum(slope x) / (how many x != 0).
    """

    n: int
    numbers: Tensor
    student: Tensor
    teacher: Tensor
    statistics: Tensor  # [4, n] float64
    terms: Tensor  # [3, n] float64
    student_grad: Optional[Tensor] = None
    teacher_grad: Optional[Tensor] = None


DISTANCE_PADDING = 8  # numbers: the widest vector


# Columns of a topk's ``statistics`` [n, 1 + 3 M] float64: the largest logit, then for each temperature
# log sum exp(z / temperature), entropy, and the log of the probability that is not among the k largest.
TOPK_MAX = 0
TOPK_LSE, TOPK_ENTROPY, TOPK_LOG_TAIL = range(3)


def topk_column(which: int, temperature: int = 0) -> int:
    """Where TOPK_LSE, TOPK_ENTROPY or TOPK_LOG_TAIL of the i-th temperature stands."""
    return 1 + 3 * temperature + which


@dataclass
class TopkJob:
    """One call of the topk kernel over ``n`` rows, forward only; z is the logit after scale and softcap.

    The order is by z descending, then by id ascending. A logit of -inf is never among the k largest: where a
    row has fewer, ``ids`` is -1 and ``values`` -inf. A row with NaN, with +inf, or without a finite logit has
    NaN statistics (its ids and samples are in range or -1, and otherwise unspecified).
    """

    n: int
    vocab: int
    side: Rows  # row-major; temperature and grad are not read
    temperatures: Tensor  # [M] float64, M >= 1
    ids: Tensor  # [n, k] int32; k may be 0
    values: Tensor  # [n, k] float64: z of the k largest
    statistics: Tensor  # [n, 1 + 3 M] float64
    targets: Tensor  # [n, R] int64, R may be 0; out of [0, vocab): value NaN, rank 0
    target_values: Tensor  # [n, R] float64: z
    target_ranks: Tensor  # [n, R] int32: 1 + how many entries come before the target in the order
    # Draws from softmax(z / temperatures[0]) by inversion, in the order of the vocabulary:
    uniforms: Tensor  # [n, N] float64 in [0, 1), N may be 0
    samples: Tensor  # [n, N] int32: the first id whose cumulated probability exceeds the uniform

    @classmethod
    def empty(
        cls,
        side: Rows,
        n: int,
        vocab: int,
        k: int,
        temperatures: Tensor,
        targets: Optional[Tensor] = None,
        samples: int = 0,
    ) -> TopkJob:
        """With memory for its results; the uniforms of its draws are still to be given."""
        device = temperatures.device

        def of(columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.empty(n, columns, dtype=dtype, device=device)

        targets = of(0, torch.int64) if targets is None else targets
        looked_up = targets.shape[1]
        return cls(
            n=n,
            vocab=vocab,
            side=side,
            temperatures=temperatures,
            ids=of(k, torch.int32),
            values=of(k),
            statistics=of(topk_column(0, temperatures.numel())),
            targets=targets,
            target_values=of(looked_up),
            target_ranks=of(looked_up, torch.int32),
            uniforms=of(0),
            samples=of(samples, torch.int32),
        )

    def part(self, rows: slice, side: Rows, uniforms: Tensor) -> TopkJob:
        """The job of some of the rows, in the memory of the whole."""
        of_rows = ("ids", "values", "statistics", "targets", "target_values", "target_ranks", "samples")
        slices = {name: getattr(self, name)[rows] for name in of_rows}
        return replace(self, n=rows.stop - rows.start, side=side, uniforms=uniforms, **slices)


# Columns of a pairwise_l1's statistics [n, 2] float64 of a model: the row's largest z, and log sum exp(x)
# with x = (z - max z) / temperature. A row with NaN, with +inf or without a finite logit has NaN.
PAIRWISE_MAX, PAIRWISE_LOGZ = range(2)
PAIRWISE_COLUMNS = 2


@dataclass
class PairwiseL1Job:
    """One call of the pairwise_l1 kernel over a slab of the vocabulary, for ``n`` rows of two models in
    groups: those of group g are ``starts[g] .. starts[g + 1]``. p and q are the student's and the teacher's
    probabilities, from the statistics over the whole vocabulary; i is a student's and j a teacher's row of
    the same group, counted from the group's first.

    TERMS adds to ``cost[g, i, j]`` ``sum_v |p_iv - q_jv|`` over the slab, and to ``signs[g, i, j]``
    ``sum_v p_iv sign(p_iv - q_jv)``; what lies beyond a group's rows is left as it is.

    GRADIENT writes, where a side has ``grad``, the gradient with respect to the raw logit. With G =
    ``d_cost``, of the student ``p_iv (sum_j G_ij sign(p_iv - q_jv) - student_means_i) / T``, of the teacher
    ``q_jv (sum_i G_ij sign(q_jv - p_iv) - teacher_means_j) / T``, chained through softcap and scale. A G of 0
    silences its pair, a row whose pairs are all silent gets 0, whatever the rows hold.
    """

    n: int
    vocab: int  # entries of the slab
    student: Rows  # both row-major, from the slab's first entry
    teacher: Rows
    starts: Tensor  # [groups + 1] int64
    student_statistics: Tensor  # [n, 2] float64
    teacher_statistics: Tensor  # [n, 2] float64
    cost: Optional[Tensor] = None  # [groups, L, L] float64, L no less than the longest group
    signs: Optional[Tensor] = None  # [groups, L, L] float64; None: not wanted
    d_cost: Optional[Tensor] = None  # [groups, L, L] float64
    student_means: Optional[Tensor] = None  # [n] float64: sum_j G_ij sum_v p_iv sign(p_iv - q_jv)
    teacher_means: Optional[Tensor] = None  # [n] float64: likewise of the teacher's


def _flat(tensor: Tensor) -> Tensor:
    """All of the tensor's memory from its first element on, as one dimension."""
    length = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return tensor.as_strided((length,), (1,), tensor.storage_offset())


def _entries(offsets: Tensor, vocab: int) -> Tensor:
    return offsets[:, None] + torch.arange(vocab, device=offsets.device)
