"""The benchmarks beside the main table, in the order in which their tables are shown."""

from __future__ import annotations

import bench_cache
import bench_relational
import bench_sinkhorn
import bench_sinkhorn_batch
import bench_sorted
import bench_sparse
from registry import Bench

# Over the tables in the terminal, by result file.
TITLES = {
    "head": "Distillation step from hidden states, forward and backward",
    "rows": "Row kernel alone: logits in, loss and gradient out",
}

BENCHES: tuple[Bench, ...] = (
    bench_sparse.BENCH,
    bench_cache.BENCH,
    bench_sorted.BENCH,
    bench_relational.BENCH,
    bench_sinkhorn.BENCH,
    bench_sinkhorn_batch.BENCH,
)
TITLES.update((bench.name, bench.title) for bench in BENCHES)
