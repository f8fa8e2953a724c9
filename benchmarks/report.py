"""Result rows as text: what ``make bench`` prints, and the judgements both it and the README show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Optional

from record import Row
from workloads import FLOOR, FLOOR_VOCAB_MAJOR, OVERHEAD_BYTES, PROMISES, SHARE_OF_COPY, Shape

# Providers of ours, and what their rows say beside the inputs' dtype.
OURS = {"kd": "", "kd bf16 logits": ", bf16 logits", "kd 1 GiB": ", 1 GiB", "kd cuda": ", CUDA kernels"}
CPU_WORKSPACE = 256 << 20  # of rows that do not say
Cases = dict[str, dict[str, Row]]


def cases(rows: Iterable[Row]) -> Cases:
    """Rows by case, then by provider, in file order."""
    found: Cases = {}
    for row in rows:
        found.setdefault(row["case_id"], {})[row["provider"]] = row
    return found


def median(row: Optional[Row], key: str = "seconds") -> Optional[float]:
    value = (row or {}).get(key)
    return value["median"] if value else None


def seconds(value: Optional[float]) -> str:
    if value is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if value * scale >= 0.1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def mebibytes(value: Optional[float]) -> str:
    return "" if value is None else f"{value / 2**20:.0f}"


def ratio(value: Optional[float]) -> str:
    return "" if value is None else f"{value:.2f}"


def spread(row: Row, key: str, show: Any) -> str:
    value = row.get(key)
    if not value:
        return ""
    mark = "~" if row.get("noisy") else ""
    return f"{mark}{show(value['median'])} [{show(value['p20'])} .. {show(value['p80'])}]"


def failure(row: Row) -> str:
    """Why a row was not timed."""
    return f"{row['status']}: {row['reason']}" if row["status"] != "ok" else ""


def worst_error(row: Row) -> str:
    error = row.get("error")
    return f"{error['worst']:.1e}" if error else ""


def shape_of(row: Row) -> Shape:
    case = row["case"]
    return Shape(case["tokens"], case["vocab"], case["d_student"], case["d_teacher"])


def on_gpu(row: Row) -> bool:
    """Promises about a CPU say nothing of such a row, nor the other way round."""
    return "gpu" in row["machine"]


def judged(kept: bool, promise: str) -> str:
    return f"{'pass' if kept else 'FAIL'} {promise}"


def absence(row: Optional[Row]) -> str:
    """Why a cell has no figure."""
    if row is None:
        return "not run"
    return row["status"] if row["status"] != "ok" else ""


def verdicts(row: Row, case: dict[str, Row]) -> list[str]:
    """The promises about a row of ours, each with pass or FAIL; there are none about a quick run's shapes."""
    found: list[str] = []
    if row.get("backend") == "reference":
        found.append("backend reference")  # the fallback's figures must not pass for the kernels'
    promise = PROMISES.get(shape_of(row))
    if promise is None:
        return found
    provider, dtype, objective = row["provider"], row["case"]["dtype"], row["case"]["objective"]
    mine, over = median(row), median(row, "ratio_floor")
    limit = promise.limit(provider, dtype, objective)
    if limit is not None and over is not None:
        found.append(judged(over <= limit, f"floor <= {limit:g}"))
    speedup = promise.speedup.get((dtype, objective)) if provider == "kd" else None
    plain = median(case.get("torch"))
    if speedup is not None and plain is not None and mine is not None:
        found.append(judged(plain / mine >= speedup, f"torch >= {speedup:g}x"))
    best = best_peer(case)
    if best is not None and mine is not None:
        peer, fastest = best
        found.append("pass peers" if mine < fastest else f"FAIL peers ({peer})")
    peak = row.get("peak") or {}
    above = peak.get("above_gradients")
    if above is not None:
        most = peak.get("workspace", CPU_WORKSPACE) + OVERHEAD_BYTES[peak.get("device", "cpu")]
        found.append(judged(above <= most, f"memory <= {mebibytes(most)} MiB"))
    return found


def row_verdict(row: Row) -> str:
    """The same of the row kernel alone."""
    share, over = None, median(row, "ratio_copy")
    if over is not None:
        share = SHARE_OF_COPY.get((shape_of(row), row["provider"], row["case"]["dtype"]))
    return "" if share is None else judged(1 / over >= share, f"copy >= {100 * share:g} %")


def best_peer(case: dict[str, Row]) -> Optional[tuple[str, float]]:
    times = [
        (value, name)
        for name, row in case.items()
        if name not in (*OURS, FLOOR, FLOOR_VOCAB_MAJOR) and (value := median(row)) is not None
    ]
    return (min(times)[1], min(times)[0]) if times else None


def aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    shown = [header, rule, *lines]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in shown)


def size(row: Row) -> str:
    case = row["case"]
    return f"{case['tokens']} x {case['vocab']}, {case['d_student']}/{case['d_teacher']}"


def head_text(rows: Iterable[Row]) -> str:
    """The long table: every provider of every case on a line of its own."""
    header = (
        "size", "dtype", "objective", "provider", "median [p20 .. p80]", "x floor [p20 .. p80]",
        "x floor [V, C]", "x torch", "MiB above inputs", "above gradients", "err loss / d hidden / d weight",
        "targets",
    )  # fmt: skip
    lines = []
    for case in cases(rows).values():
        plain = median(case.get("torch"))
        for row in case.values():
            mine = median(row)
            error, peak = row.get("error") or {}, row.get("peak") or {}
            faster = (
                plain / mine if plain and mine and row["provider"] not in (FLOOR, FLOOR_VOCAB_MAJOR) else None
            )
            note = failure(row)
            if row["provider"] in OURS and mine is not None:
                note = "; ".join(verdicts(row, case))
            lines.append(
                (
                    size(row),
                    row["case"]["dtype"],
                    row["case"]["label"],
                    row["provider"],
                    spread(row, "seconds", seconds),
                    spread(row, "ratio_floor", ratio),
                    ratio(median(row, "ratio_floor_vocab_major")),
                    ratio(faster),
                    mebibytes(peak.get("above_inputs")) or peak.get("failure", ""),
                    mebibytes(peak.get("above_gradients")),
                    " / ".join(f"{value:.1e}" for value in error.values()),
                    note,
                )
            )
    return aligned(header, lines)


def rows_text(rows: Iterable[Row]) -> str:
    header = (
        "size", "dtype", "objective", "provider", "median [p20 .. p80]", "GB/s", "x copy", "err gradient",
        "targets",
    )  # fmt: skip
    lines = [
        (
            f"{row['case']['tokens']} x {row['case']['vocab']}",
            row["case"]["dtype"],
            row["case"]["label"],
            row["provider"],
            spread(row, "seconds", seconds),
            f"{row['gb_per_s']:.1f}" if "gb_per_s" in row else "",
            ratio(median(row, "ratio_copy")),
            f"{row['error']['gradient']:.1e}" if row.get("error") else "",
            failure(row) or row_verdict(row),
        )
        for row in rows
    ]
    return aligned(header, lines)


def scaling_lines(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """One line per size and provider; cost per entry relative to the cheapest size of the same sweep."""
    rows = list(rows)

    def sweep(row: Row) -> tuple[str, ...]:
        return row["bench"], row["case"]["dtype"], row["case"]["label"], row["provider"]

    cheapest: dict[tuple[str, ...], float] = {}
    for row in rows:
        if "ns_per_entry" in row:
            cheapest[sweep(row)] = min(cheapest.get(sweep(row), float("inf")), row["ns_per_entry"])
    lines = []
    for row in rows:
        cost = row.get("ns_per_entry")
        peak = row.get("peak") or {}
        lines.append(
            (
                row["case"]["dtype"],
                row["case"]["label"],
                str(row["case"]["tokens"]),
                str(row["case"]["vocab"]),
                row["provider"],
                seconds(median(row)) or absence(row),
                ratio(median(row, "ratio_floor")),
                f"{cost:.2f}" if cost is not None else "",
                ratio(cost / cheapest[sweep(row)]) if cost is not None else "",
                mebibytes(peak.get("above_inputs")) or peak.get("failure", ""),
                mebibytes(peak.get("above_gradients")),
            )
        )
    return lines


SCALING_HEADER = (
    "dtype", "objective", "tokens", "V", "provider", "median", "x floor", "ns / entry", "x cheapest",
    "MiB above inputs", "above gradients",
)  # fmt: skip


def scaling_text(rows: Iterable[Row]) -> str:
    return aligned(SCALING_HEADER, scaling_lines(rows))


def when(rows: Sequence[Row]) -> str:
    """Commits and days; a file put together from several says so."""
    commits = sorted(
        {(r["git"]["commit"] or "no commit")[:10] + ("+" if r["git"]["dirty"] else "") for r in rows}
    )
    dates = sorted({row["date"][:10] for row in rows})
    return f"commit {', '.join(commits)}; {' to '.join(sorted({dates[0], dates[-1]}))}"


def provenance(rows: Sequence[Row]) -> str:
    """One line that says what, where and when."""
    machine, versions = rows[-1]["machine"], rows[-1]["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    threads = rows[-1]["case"]["threads"]
    # Of a GPU its driver and clocks, where the processor matters little.
    beside = machine.get("gpu") or f"{machine['cores']} cores ({machine['isa']}), {threads} threads"
    return f"{machine['name']}, {beside}; {packages}; {when(rows)}."
