"""What a benchmark beside the main table is to those that run it and show its results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from record import Row


@dataclass(frozen=True)
class Bench:
    name: str  # of ``--bench``, and of the result file
    title: str  # over its table in the terminal
    about: str  # over its table in the README: what is measured and what the yardstick is
    header: tuple[str, ...]
    lines: Callable[[Iterable[Row]], list[tuple[str, ...]]]  # of the table, from result rows
    # (where results go or None, sizes=, rounds=, threads=, dtypes=, reject=, device=): runs it and gives its
    # rows; sizes are "full", "quick" or "gpu"
    run: Callable[..., list[Row]]
