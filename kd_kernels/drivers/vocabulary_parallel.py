"""A vocabulary split over the ranks of a process group: each runs the row kernel on its own entries, and
between two phases the ranks join what belongs to whole rows, some numbers a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kd_kernels import rows as R
from kd_kernels.drivers.sides import accumulate_dtype

_INF = float("inf")


@dataclass(frozen=True)
class Shards:
    """This rank's part of the vocabulary: the entries from ``start`` on."""

    group: dist.ProcessGroup
    start: int
    total: int  # entries of all ranks
    largest: int  # part: chunks are cut for it, so that all ranks have room or none has

    @classmethod
    def exchanged(cls, name: str, vocab: int, device: torch.device, alike: dict[str, int]) -> Shards:
        """Of the group called ``name``, this rank holding ``vocab`` entries. What must be ``alike`` on all
        ranks, or they would add up what does not belong together, is compared. Waits for the device."""
        group = dist.distributed_c10d._resolve_process_group(name)
        mine = torch.tensor([vocab, *alike.values()], device=device)
        found = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(found, mine, group=group)
        sizes, *others = torch.stack(found).t().tolist()
        for what, values in zip(alike, others):
            if len(set(values)) > 1:
                raise ValueError(f"vocab_group: {what} must be the same on every rank, got {values}")
        return cls(group, sum(sizes[: group.rank()]), sum(sizes), max(sizes))

    def least(self, number: int, device: torch.device) -> int:
        """Of all ranks; waits for the device."""
        found = torch.tensor(number, device=device)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
        return int(found)

    def summed(self, x: Tensor) -> Tensor:
        """The sum over the ranks of what each has in float32 at least."""
        assert x.dtype == accumulate_dtype(x.dtype)
        dist.all_reduce(x, group=self.group)
        return x

    def join_statistics(self, job: R.RowJob) -> None:
        stats = job.statistics
        largest = torch.stack([stats[:, R.MAX_STUDENT], stats[:, R.MAX_TEACHER]])
        top = largest.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)

        def moved(column: int, side: int, temperature: Tensor | float) -> Tensor:
            """The rank's sum of exponentials, relative to the row's largest logit."""
            x = stats[:, column] + (largest[side] - top[side]) / temperature
            return torch.where(largest[side] == -_INF, 0.0, x.exp())

        columns = [R.LOGZ_STUDENT, R.LOGZ_TEACHER]
        sums = [moved(R.LOGZ_STUDENT, 0, job.student.temperature)]
        sums.append(moved(R.LOGZ_TEACHER, 1, job.teacher.temperature))
        if job.labels is not None:
            columns.append(R.LOGZ_HARD)
            own = (job.labels >= 0) & (job.labels < job.vocab)
            sums += [moved(R.LOGZ_HARD, 0, 1.0), torch.where(own, stats[:, R.LABEL_LOGIT], 0.0)]
        sums = torch.stack(sums)
        dist.all_reduce(sums, group=self.group)
        stats[:, R.MAX_STUDENT], stats[:, R.MAX_TEACHER] = top
        for column, x in zip(columns, sums):  # without a finite logit -inf, which is less than its largest
            stats[:, column] = x.log()
        if job.labels is not None:
            ids = job.labels + self.start
            known = (ids >= 0) & (ids < self.total)
            stats[:, R.LABEL_LOGIT] = torch.where(known, sums[-1], torch.nan)

    def join_terms(self, job: R.RowJob) -> None:
        sums = [job.statistics[:, i] for i in (R.SUM_STUDENT, R.SUM_TEACHER, R.MASS_STUDENT, R.MASS_TEACHER)]
        sums += [job.terms[:, i] for i in (R.SOFT, R.STUDENT_ENTROPY, R.TEACHER_ENTROPY)]
        joined = torch.stack(sums)
        dist.all_reduce(joined, group=self.group)
        for column, x in zip(sums, joined):
            column.copy_(x)


def vocabulary_parallel_divergence(
    job: R.RowJob, phases: int, divergence: Callable[[R.RowJob, int], None], shards: Shards
) -> None:
    """The row kernel's contract for rows of which this rank holds a part; ``job.labels`` count from its first
    entry."""
    joins = ((R.STATISTICS, shards.join_statistics), (R.TERMS, shards.join_terms), (R.GRADIENT, None))
    for phase, join in joins:
        if phases & phase:
            divergence(job, phase)
            if join is not None:
                join(job)
