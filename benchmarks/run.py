"""``make bench``: runs the benchmarks, prints their tables, writes the result files.

    python benchmarks/run.py                      # all but scaling: the main table, the row kernels, ...
    python benchmarks/run.py --full               # also scaling, and the memory of every objective
    python benchmarks/run.py --quick              # tiny shapes in seconds, nothing written: a smoke test
    python benchmarks/run.py --fill-in-memory     # the peak memory that an earlier run left out
    python benchmarks/run.py --only forward_kl --dtype fp32 --provider kd --provider torch

Figures need a quiet machine. Samples that other processes disturbed are taken again (their number is in
the ``rejected`` field); a figure for which no quiet sample was had is marked with ``~``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import bench_head
import bench_rows
import bench_scaling
import report
from benches import BENCHES, TITLES
from record import RESULTS, Row
from workloads import HEAD, QUICK, ROWS

NAMES = ("head", "rows", *(bench.name for bench in BENCHES), "scaling")


def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="tiny shapes, no compilers, no files")
    size.add_argument("--full", action="store_true", help="every benchmark, memory of every objective")
    parser.add_argument("--bench", action="append", choices=NAMES, help="which (repeatable)")
    parser.add_argument("--only", action="append", metavar="OBJECTIVE", help="objectives (repeatable)")
    parser.add_argument("--dtype", action="append", choices=("fp32", "bf16"), help="dtypes (repeatable)")
    parser.add_argument("--provider", action="append", help="providers by name (repeatable)")
    parser.add_argument("--sweep", choices=("tokens", "vocab"), help="this scaling sweep only")
    parser.add_argument("--rounds", type=int, help="rounds of timing (default 7)")
    parser.add_argument("--threads", type=int, help="torch threads (default 2; 1 under --quick)")
    parser.add_argument("--fill-in-memory", action="store_true", help="of rows timed without it; no timing")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory processes")
    parser.add_argument(
        "--no-reject", action="store_true", help="keep samples that other processes disturbed"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where result files go")
    return parser.parse_args(arguments)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    options = parse(arguments)
    if options.fill_in_memory:
        rows = bench_head.fill_in_memory(options.results, options.only)
        show("Peak memory, filled in", report.head_text(rows), rows)
        return 0
    benches = options.bench or (NAMES if options.full or options.quick else NAMES[:-1])
    results = None if options.quick else options.results
    # A second thread that has to share its core waits at every barrier for milliseconds: quick runs, which
    # go beside other work, take one.
    threads = options.threads or (1 if options.quick else 2)
    dtypes = tuple(options.dtype or ("fp32", "bf16"))
    rounds = options.rounds or (2 if options.quick else 7)
    reject = not (options.quick or options.no_reject)
    memory_for: Optional[tuple[str, ...]] = ("forward_kl", "jensen_shannon")
    if options.full:
        memory_for = None
    if options.no_memory or options.quick:
        memory_for = ()

    common = {
        "rounds": rounds,
        "threads": threads,
        "dtypes": dtypes,
        "only": options.only,
        "reject": reject,
    }
    if "head" in benches:
        rows = bench_head.run(
            results,
            shape=QUICK if options.quick else HEAD,
            provider_names=options.provider,
            memory_for=memory_for,
            compiling=not options.quick,
            **common,
        )
        show(TITLES["head"], report.head_text(rows), rows)
    if "rows" in benches:
        shape = QUICK if options.quick else ROWS
        rows = bench_rows.run(results, shape=shape, compiling=not options.quick, **common)
        show(TITLES["rows"], report.rows_text(rows), rows)
    for bench in BENCHES:
        if bench.name in benches:
            timing = {name: common[name] for name in ("rounds", "threads", "dtypes", "reject")}
            sizes = "quick" if options.quick else "full"
            rows = bench.run(results, sizes=sizes, **timing)
            show(bench.title, report.aligned(bench.header, bench.lines(rows)), rows)
    if "scaling" in benches:
        rows = bench_scaling.run(
            results,
            shapes=bench_scaling.sweeps(options.sweep, options.quick),
            provider_names=options.provider,
            with_memory=not (options.quick or options.no_memory),
            **common,
        )
        show("Cost against tokens and vocabulary", report.scaling_text(rows), rows)
    return 0


def show(title: str, text: str, rows: Sequence[Row]) -> None:
    print(f"\n{title}\n{report.provenance(rows)}\n\n{text}\n")
    wrong = [
        f"{r['case_id']} {r['provider']}" for r in rows if r["status"] in ("wrong", "failed", "unchecked")
    ]
    if wrong:
        print(f"not timed, see the last column: {', '.join(wrong)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
