"""The README's GPU table while ``gpu_check.py`` has left no result files: from the record of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

OBJECTIVES = {"fkl": "forward KL", "rkl": "reverse KL", "js": "Jensen-Shannon"}
WORKSPACES = {"None": "default", str(1 << 30): "1 GiB"}
HEADER = ("what", "workspace", "objective", "ms", "x products")


def latest(results: Path) -> Optional[tuple[Path, dict[str, Any]]]:
    """The last record whose steps stand beside their bare products."""
    records = [(path, json.loads(path.read_text())) for path in results.glob("*/*_run.json")]
    records = [(path, record) for path, record in records if any(_steps(record))]
    return max(records, key=lambda record: record[1]["date"], default=None)


def _steps(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(key, value) for key, value in record.items() if key.startswith("head ") and "floor sum" in value]


def provenance(path: Path, record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    machine = record["machine"][0].upper() + record["machine"][1:]
    return (
        f"{machine}; {versions}; commit {record['commit']}; {record['date']}; "
        f"`benchmarks/results/{path.parent.name}/{path.name}`. Heads, forward and backward: tokens x "
        "vocabulary, widths of student and teacher. What changed since that commit, and peers on this "
        "machine: not measured."
    )


def lines(record: dict[str, Any]) -> list[tuple[str, ...]]:
    found = []
    for key, step in _steps(record):
        what, floor = key.removeprefix("head ").removesuffix(", ms"), step["floor sum"]
        found.append((what, "", "four products", f"{floor:.1f}", "1.00"))
        for workspace, shown in WORKSPACES.items():
            for name, objective in OBJECTIVES.items():
                ms = step[f"{name} {workspace}"]
                found.append((what, shown, objective, f"{ms:.1f}", f"{ms / floor:.2f}"))
    return found
