"""The benchmarks beside the main table, in the order in which their tables are shown."""

from __future__ import annotations

import bench_cache
import bench_relational
import bench_sinkhorn
import bench_sinkhorn_batch
import bench_sorted
import bench_sparse
from registry import Bench

BENCHES: tuple[Bench, ...] = (
    bench_sparse.BENCH,
    bench_cache.BENCH,
    bench_sorted.BENCH,
    bench_relational.BENCH,
    bench_sinkhorn.BENCH,
    bench_sinkhorn_batch.BENCH,
)
