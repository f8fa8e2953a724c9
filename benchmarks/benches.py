"""The benchmarks beside the main table, in the order in which their tables are shown."""

from __future__ import annotations

import bench_cache
import bench_relational
import bench_sinkhorn
import bench_sorted
import bench_sparse
from registry import Bench

BENCHES: tuple[Bench, ...] = tuple(
    module.BENCH for module in (bench_sparse, bench_cache, bench_sorted, bench_relational, bench_sinkhorn)
)
