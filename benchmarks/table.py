"""The tables of the README and of ``benchmarks/RESULTS.md``, from the result files only.

``python benchmarks/table.py`` writes the main table and its memory between the README's two markers, all
others into RESULTS.md; ``--check`` writes nothing and exits with 1 when one of them differs from what the
files give. Nothing is left out: cases that miss their target or lose to a peer stand in the same rows as the
rest.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Optional

import gpu_runs
from benches import BENCHES
from record import RESULTS, ROOT, Row, read_all
from registry import Bench
from report import (
    OURS,
    SCALING_HEADER,
    absence,
    best_peer,
    cases,
    mebibytes,
    median,
    provenance,
    ratio,
    row_verdict,
    scaling_lines,
    seconds,
    shape_of,
    verdicts,
    when,
)
from workloads import FLOOR, Shape

README, PAGE = ROOT.parent / "README.md", ROOT / "RESULTS.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PEERS = ("torch", "torch.compile", "liger", "liger compiled", "liger fused", "trl")


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    bars = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell or " " for cell in line) + " |" for line in bars)


def of_each_shape(make: Callable[[list[Row]], str], rows: Sequence[Row]) -> str:
    """A table of each shape of the rows, the first one's first."""
    shapes: dict[Shape, list[Row]] = {}
    for row in rows:
        shapes.setdefault(shape_of(row), []).append(row)
    return "\n\n".join(text for some in shapes.values() if (text := make(some)))


def present(rows: Iterable[Row], names: Iterable[str]) -> list[str]:
    """Those of the providers that were there to be measured."""
    found = {row["provider"] for row in rows}
    return [name for name in names if name in found]


def head_markdown(rows: Sequence[Row]) -> str:
    """Ours, one line per dtype and objective, against the floor and every peer."""
    peers = present(rows, PEERS)
    header = (
        "inputs",
        "objective",
        "kd",
        "x floor (p20 .. p80)",
        "x floor [V, C]",
        *peers,
        "best peer / kd",
        "targets",
    )
    lines = []
    for case in cases(rows).values():
        times = [seconds(median(case.get(name))) or absence(case.get(name)) for name in peers]
        best = best_peer(case)
        for name in present(case.values(), OURS):
            row = case[name]
            mine, over = median(row), row.get("ratio_floor")
            lines.append(
                (
                    row["case"]["dtype"] + OURS[name],
                    row["case"]["label"],
                    ("~" if row.get("noisy") else "") + seconds(mine) if mine else absence(row),
                    f"**{ratio(over['median'])}** ({ratio(over['p20'])} .. {ratio(over['p80'])})"
                    if over
                    else "",
                    ratio(median(row, "ratio_floor_vocab_major")),
                    *times,
                    ratio(best[1] / mine) if best and mine else "",
                    "<br>".join(verdicts(row, case)),
                )
            )
    floors = [
        f"{row['case']['dtype']} {seconds(median(row))} ({row['gflops']:.0f} GFLOP/s)"
        for row in first_by_dtype(rows, FLOOR)
        if row.get("gflops")
    ]
    shape = rows[0]["case"]
    text = (
        f"One step, forward and backward: {shape['tokens']} tokens, V = {shape['vocab']}, hidden "
        f"{shape['d_student']} (student) and {shape['d_teacher']} (teacher). The floor is the four bare "
        f"GEMMs with outputs preallocated, timed in the same rounds: {'; '.join(floors)}. Ratios to "
        f"it are formed within a round, so they are not quotients of the medians."
    )
    return text + "\n\n" + markdown(header, lines)


def first_by_dtype(rows: Iterable[Row], provider: str) -> list[Row]:
    found: dict[str, Row] = {}
    for row in rows:
        if row["provider"] == provider:
            found.setdefault(row["case"]["dtype"], row)
    return list(found.values())


def memory_markdown(rows: Sequence[Row]) -> str:
    shown = present(rows, (*OURS, *PEERS))
    header = ("inputs", "objective", "kd above gradients", *shown)
    lines = []
    for case in cases(rows).values():
        peaks = {name: row["peak"] for name, row in case.items() if row.get("peak")}
        if not peaks:
            continue
        some = next(iter(case.values()))["case"]
        above = [mebibytes(peaks[name].get("above_gradients")) for name in OURS if name in peaks]
        cells = [
            mebibytes(peaks[name].get("above_inputs")) or "failed"
            if name in peaks
            else ("" if name not in case else absence(case[name]))
            for name in shown
        ]
        lines.append((some["dtype"], some["label"], " / ".join(above), *cells))
    if not lines:
        return ""
    shape, alone = rows[0]["case"], "" if "gpu" in rows[0]["machine"] else ", each in a process of its own"
    return (
        f"Peak memory of such a step above its inputs, MiB{alone}, {shape['tokens']} tokens, V = "
        f"{shape['vocab']}. The first column is above the gradients too (`d hidden`, and `d weight` twice: "
        "accumulator and result).\n\n" + markdown(header, lines)
    )


def rows_markdown(rows: Sequence[Row]) -> str:
    peers = present(rows, PEERS)
    header = ["logits", "objective", "kd", "GB/s", "x copy", *peers, "targets"]
    lines = []
    for case in cases(rows).values():
        for name in present(case.values(), OURS):
            row = case[name]
            lines.append(
                (
                    row["case"]["dtype"] + OURS[name],
                    row["case"]["label"],
                    seconds(median(row)) or absence(row),
                    f"{row['gb_per_s']:.1f}" if "gb_per_s" in row else "",
                    ratio(median(row, "ratio_copy")),
                    *(seconds(median(case.get(peer))) or absence(case.get(peer)) for peer in peers),
                    row_verdict(row),
                )
            )
    if not any(line[-1] for line in lines):  # nothing was promised
        header, lines = header[:-1], [line[:-1] for line in lines]
    shape = rows[0]["case"]
    return (
        f"The row kernel alone, logits in and gradient out, {shape['tokens']} x {shape['vocab']}. GB/s of "
        "the bytes that must move (both logits read once, the gradient written once); a copy of as many "
        "bytes is 1.00.\n\n" + markdown(header, lines)
    )


def bench_markdown(bench: Bench, rows: Sequence[Row]) -> str:
    return bench.about + "\n\n" + markdown(bench.header, bench.lines(rows))


def scaling_markdown(rows: Sequence[Row]) -> str:
    shown = [line for line in scaling_lines(rows) if line[4] in (*OURS, FLOOR)]
    return (
        "Cost against tokens and vocabulary. A constant cost per entry (token x vocabulary entry) is "
        "linear.\n\n" + markdown(SCALING_HEADER, shown)
    )


def gpu_markdown(results: Path) -> str:
    found = gpu_runs.latest(results)
    if found is None:
        return "Not measured: no result file of a GPU has been committed yet."
    return gpu_runs.provenance(*found) + "\n\n" + markdown(gpu_runs.HEADER, gpu_runs.lines(found[1]))


# From the rows of a result file to a table; in the README what a step costs, in RESULTS.md the rest.
Makers = Sequence[tuple[str, Callable[[list[Row]], str]]]
STEP: Makers = (
    ("head", functools.partial(of_each_shape, head_markdown)),
    ("head", functools.partial(of_each_shape, memory_markdown)),
)
OTHERS: Makers = (
    ("rows", functools.partial(of_each_shape, rows_markdown)),
    *((bench.name, functools.partial(bench_markdown, bench)) for bench in BENCHES),
    ("scaling", scaling_markdown),
)


def of_machine(machine: str, files: dict[str, list[Row]], makers: Makers) -> list[str]:
    """The machine and its tables; nothing where it has none of them."""
    shown = [rows for name, _ in makers if (rows := files.get(name))]
    if not shown:
        return []
    parts = [f"#### `{machine}`", provenance(shown[0])]
    for name, make in makers:
        if files.get(name) and (text := make(files[name])):
            about, table = text.split("\n\n", 1)
            # The line above is the first file's; the others were not all measured with it.
            parts += [about if name == "head" else f"{about} ({when(files[name])})", table]
    return parts


def readme_section(results: Path = RESULTS) -> str:
    machines = read_all(results)
    parts = [part for machine, files in machines.items() for part in of_machine(machine, files, STEP)]
    if not any("cuda" in machine for machine in machines):
        parts.extend(("#### GPU", gpu_markdown(results)))
    return "\n\n".join(parts)


def page(results: Path = RESULTS) -> str:
    """RESULTS.md."""
    parts = [
        "# Results beside the main table",
        "Written by `python benchmarks/table.py` from `results/`; the README has the main table, "
        "[NOTES.md](NOTES.md) how to read both.",
    ]
    for machine, files in read_all(results).items():
        parts += of_machine(machine, files, OTHERS)
    return "\n\n".join(parts).replace("\n#### ", "\n## ") + "\n"


def replaced(readme: str, section: str) -> str:
    """``readme`` with what stands between the markers exchanged."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise SystemExit(f"README.md must hold {BEGIN} and, after it, {END}, each once")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{section}\n{END}{rest.split(END)[1]}"


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 when a page is out of date")
    parser.add_argument("--print", action="store_true", help="print the tables instead of writing them")
    options = parser.parse_args(arguments)
    if options.print:
        print(readme_section(), page(), sep="\n\n")
        return 0
    stale = {
        path: new
        for path, new in ((README, replaced(README.read_text(), readme_section())), (PAGE, page()))
        if not path.exists() or path.read_text() != new
    }
    for path, new in stale.items():
        if options.check:
            name = path.relative_to(ROOT.parent)
            print(f"{name} differs from benchmarks/results; run python benchmarks/table.py", file=sys.stderr)
        else:
            path.write_text(new)
    return int(options.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
