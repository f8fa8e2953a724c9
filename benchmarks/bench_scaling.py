"""Cost against tokens and against vocabulary: ours beside the floor, time and memory.

Linear means a constant cost per token and vocabulary entry; the table shows that cost and its ratio to
the cheapest size of the sweep. The floor is shown alike, since a GEMM's own rate depends on its shape.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch
from bench_head import run_case
from providers import selected
from record import Row, Writer
from workloads import Shape, objectives

TOKENS = (512, 1024, 2048, 4096, 8192)
VOCABS = (8192, 16384, 32768, 65536, 131072, 262144)
TOKEN_SWEEP_VOCAB = 32000
VOCAB_SWEEP_TOKENS = 1024

QUICK_SWEEPS = {
    "tokens": [Shape(n, 384, 32, 48) for n in (16, 32)],
    "vocab": [Shape(32, v, 32, 48) for v in (128, 256)],
}


def sweeps(only: Optional[str] = None, quick: bool = False) -> dict[str, list[Shape]]:
    full = {
        "tokens": [Shape(n, TOKEN_SWEEP_VOCAB) for n in TOKENS],
        "vocab": [Shape(VOCAB_SWEEP_TOKENS, v) for v in VOCABS],
    }
    chosen = QUICK_SWEEPS if quick else full
    return {name: shapes for name, shapes in chosen.items() if only in (None, name)}


def run(
    results: Optional[Path],
    *,
    shapes: Optional[dict[str, list[Shape]]] = None,
    rounds: int = 5,
    threads: int = 2,
    dtypes: Sequence[str] = ("fp32", "bf16"),
    only: Optional[Sequence[str]] = None,
    provider_names: Optional[Sequence[str]] = None,
    with_memory: bool = True,
    reject: bool = True,
) -> list[Row]:
    """``provider_names`` adds peers; by default ours only, since a peer may not fit at the largest sizes."""
    torch.set_num_threads(threads)
    writer = Writer("scaling", results)
    for sweep, sizes in (shapes or sweeps()).items():
        for dtype in dtypes:
            chosen = [p for p in selected(dtype, "cpu", provider_names) if p.ours or provider_names]
            for objective in objectives(only or ("forward_kl",)):
                for shape in sizes:
                    print(f"  {sweep} {dtype} {objective.label} {shape.label}", file=sys.stderr, flush=True)
                    rows = run_case(
                        f"scaling-{sweep}",
                        objective,
                        shape,
                        dtype,
                        chosen,
                        rounds=rounds,
                        threads=threads,
                        with_memory=with_memory,
                        reject=reject,
                    )
                    for row in rows:
                        if row.get("seconds"):
                            entries = shape.tokens * shape.vocab
                            row["ns_per_entry"] = float(f"{row['seconds']['median'] / entries * 1e9:.5g}")
                        writer.add(row)
    return writer.rows
