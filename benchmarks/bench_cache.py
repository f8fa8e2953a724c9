"""Teachers on disk: bytes per token, reading against the raw file, and what a loader adds to a training step.

``read`` cases: every sequence of a cache, in random order, each into memory of its own, with checksums and
form verified before ("kd") or by the same pass ("kd, first"). The yardstick reads the same files whole and in
order into one buffer, again and again, which asks the system for no memory; beside it stand reads into fresh
memory (``read_bytes``) and a copy of the mapped files. All from a warm page cache: what a disk takes comes on
top for all.

``loader`` cases: a batch from a DataLoader without workers, so that nothing of it is hidden behind the step;
the yardstick is the step, with its teacher in memory.
"""

from __future__ import annotations

import mmap
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from bench_head import spread_row
from contest import run_cases
from harness import Timed, run_rounds
from providers import Unavailable, need
from record import Row, rounded
from registry import Bench
from report import failure, judged, median, seconds, spread
from workloads import CACHE, CACHE_OVER_YARDSTICK, CacheSize

YARDSTICK = {"read": "raw read", "loader": "step"}
BATCH = 2
# (providers, the yardstick's first; whether everything read is right; runs in one timing, by provider)
Case = tuple[dict[str, Callable[[], object]], bool, dict[str, int]]


def saved(size: CacheSize, count: int) -> list[Any]:
    """What a teacher says of ``count`` sequences. Of logits this far apart fifty draws are a dozen ids."""
    import kd_kernels as kd

    generator = torch.Generator().manual_seed(0)
    found = []
    for seed in range(count):
        logits = torch.randn(size.length, size.vocab, generator=generator) * 6
        found.append(kd.linear_topk(logits, size.k, samples=size.samples, seed=seed))
    return found


def written(size: CacheSize, path: Path) -> tuple[Any, list[Any]]:
    """A cache, and the records that it holds in turn."""
    import kd_kernels as kd

    records = saved(size, 2)
    with kd.TeacherCache.create(
        path, model="bench", vocab_size=size.vocab, k=size.k, samples=size.samples, dtype=size.dtype
    ) as writer:
        for index in range(size.sequences):
            writer.append(index, records[index % 2])
    return kd.TeacherCache.open(path), records


def right(found: Any, record: Any, dtype: str) -> bool:
    """Bit for bit; of float16 logits, to what it keeps."""
    for name in ("ids", "logits", "lse", "log_tail_mass", "sample_ids", "sample_counts"):
        x, y = getattr(found, name), getattr(record, name)
        if x is None or dtype == "float16" and name in ("logits", "lse"):
            continue
        if not torch.equal(x, y):
            return False
    if dtype != "float16" or found.ids is None:
        return True
    return torch.allclose(found.target().logprobs, record.target().logprobs, rtol=1e-3, atol=1e-4)


# --- reading ------------------------------------------------------------------------------------------


def read_case(size: CacheSize, path: Path) -> Case:
    import kd_kernels as kd

    cache, records = written(size, path)
    order = random.Random(0).sample(range(size.sequences), size.sequences)
    files = [path / shard.name for shard in cache.shards]
    view = memoryview(bytearray(max(file.stat().st_size for file in files)))

    def into_fresh_memory() -> None:
        for file in files:
            file.read_bytes()

    def raw() -> None:
        for file in files:
            with open(file, "rb", buffering=0) as stream:
                stream.readinto(view)

    def mapped() -> None:
        for file in files:
            with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as pages:
                bytes(pages)

    def ours(cache: Any) -> None:
        for index in order:
            cache[index]

    steps = {
        YARDSTICK["read"]: raw,
        "raw, fresh memory": into_fresh_memory,
        "raw, mapped": mapped,
        "kd": lambda: ours(cache),
        "kd, first": lambda: ours(kd.TeacherCache.open(path)),
    }
    good = all(right(cache[index], records[index % 2], size.dtype) for index in order)
    return steps, good, dict.fromkeys(steps, 1)


# --- training -----------------------------------------------------------------------------------------


def loader_case(size: CacheSize, path: Path) -> Case:
    import kd_kernels as kd
    from kd_kernels.cache.dataset import PadTogether, ResumableSampler, TeacherDataset

    cache, records = written(size, path)
    tokens = [
        {"sequence_id": index, "input_ids": torch.randint(size.vocab, (size.length,))}
        for index in range(size.sequences)
    ]

    def loader(cache: Any) -> torch.utils.data.DataLoader:
        sampler = ResumableSampler(size.sequences, rank=0, world_size=1, shuffle=False)
        data = TeacherDataset(tokens, cache)
        return torch.utils.data.DataLoader(data, BATCH, sampler=sampler, collate_fn=PadTogether())

    def target(record: Any) -> Any:
        return record.target() if size.k else record.sampled()

    def epoch(cache: Any) -> None:
        for batch in loader(cache):
            target(batch["teacher"])

    hidden = torch.randn(BATCH, size.length, size.width, requires_grad=True)
    weight = torch.randn(size.vocab, size.width).mul_(3 / size.width**0.5).requires_grad_()
    batch = next(iter(loader(cache)))
    labels = kd.next_token_labels(batch["labels"])

    def step(teacher: Any) -> torch.Tensor:
        loss = kd.distill(kd.Head(hidden, weight), teacher, kd.ForwardKL(), labels=labels)
        torch.autograd.grad(loss, (hidden, weight))
        return loss.detach()

    there = target(batch["teacher"])
    direct = [target(record) for record in records[:BATCH]]
    apart = [
        kd.distill(kd.Head(hidden[row], weight), teacher, kd.ForwardKL(), labels=labels[row], reduction="sum")
        for row, teacher in enumerate(direct)
    ]
    good = torch.allclose(step(there) * (labels >= 0).sum(), sum(apart).detach(), rtol=1e-5)
    batches = size.sequences // BATCH
    steps = {
        YARDSTICK["loader"]: lambda: step(there),
        "kd": lambda: epoch(cache),
        "kd, first": lambda: epoch(path),
    }
    return steps, good, {YARDSTICK["loader"]: 1, "kd": batches, "kd, first": batches}


CASES = {"read": read_case, "loader": loader_case}


def named(size: CacheSize, threads: int) -> Row:
    sizes = f"{size.sequences}x{size.length}x{size.vocab}"
    return {
        "bench": "cache",
        "case_id": f"cache/{size.what}/{size.dtype}/K{size.k}/samples{size.samples}/{sizes}",
        "case": {"threads": threads, **vars(size)},
    }


def run_case(size: CacheSize, *, rounds: int, threads: int, reject: bool, device: str) -> list[Row]:
    try:
        need("pyarrow")
    except Unavailable as reason:
        absent = {"provider": "kd", "status": reason.status, "reason": reason.reason}
        return [{**named(size, threads), **absent}]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        steps, good, runs = CASES[size.what](size, path)
        stored = sum(file.stat().st_size for file in path.glob("*.arrow"))
        beside = sum(file.stat().st_size for file in path.glob("*.json*"))
        entries = [Timed(name, step) for name, step in steps.items()] if good else []
        run_rounds(entries, rounds=rounds, reject=reject)
    for timed in entries:
        timed.samples = [None if s is None else s / runs[timed.name] for s in timed.samples]
    count = size.sequences * size.length
    rows = []
    for timed in entries or [Timed(name, step) for name, step in steps.items()]:
        row: Row = {
            **named(size, threads),
            "provider": timed.name,
            "status": "ok" if good else "wrong",
            "reason": "" if good else "what is read is not what was written",
            "bytes_per_token": rounded(stored / count),
            "bytes_per_token_beside": rounded(beside / count),
        }
        if timed.failure:
            row.update(status="failed", reason=timed.failure)
        elif good:
            row["seconds"] = spread_row(timed.spread())
            row["ratio_floor"] = spread_row(timed.ratio_to(entries[0]))
            row["rejected"], row["noisy"] = timed.rejected, timed.noisy or entries[0].noisy
            if size.what == "read" and row["seconds"]:
                row["gb_per_s"] = rounded(stored / row["seconds"]["median"] / 1e9)
        rows.append(row)
    return rows


def run(results: Optional[Path], *, sizes: str, dtypes: Sequence[str], **timing: Any) -> list[Row]:
    """In the dtypes that caches have, whatever ``dtypes``."""
    cases = [
        (f"{size.what} K = {size.k}, {size.samples} draws, {size.dtype}", run_case, (size,))
        for size in CACHE[sizes]
    ]
    return run_cases("cache", results, cases, **timing)


# --- the table ----------------------------------------------------------------------------------------

CACHE_HEADER = (
    "what", "size", "saved", "bytes / token", "provider", "median [p20 .. p80]", "GB/s", "x yardstick",
    "targets",
)  # fmt: skip


def cache_lines(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """One line per provider; the first of each case is what the others are measured against."""
    lines = []
    for row in rows:
        size = CacheSize(**{name: x for name, x in row["case"].items() if name != "threads"})
        over, limit = median(row, "ratio_floor"), CACHE_OVER_YARDSTICK[size.what]
        note = failure(row)
        if row["provider"] == "kd" and over is not None and size in CACHE["full"]:
            note = judged(over <= limit, f"<= {limit:g}")
        width = f", step of 2 x {size.length}, D = {size.width}" if size.width else ""
        kept = [f"K = {size.k}, {size.dtype}"] if size.k else []
        kept += [f"{size.samples} draws"] if size.samples else []
        lines.append(
            (
                size.what,
                f"{size.sequences} x {size.length} x {size.vocab}{width}",
                ", ".join(kept),
                f"{row['bytes_per_token']:.1f}" if "bytes_per_token" in row else "",
                row["provider"],
                spread(row, "seconds", seconds),
                f"{row['gb_per_s']:.1f}" if "gb_per_s" in row else "",
                "" if over is None else f"{over:.2g}",
                note,
            )
        )
    return lines


BENCH = Bench(
    name="cache",
    title="Teachers on disk: reading, and loading for a step",
    about=(
        "Teachers on disk. `read` takes every sequence of a cache in random order, checked before (`kd`) or "
        "in the same pass (`kd, first`); its yardstick reads the same files whole into one buffer, all from "
        "a warm page cache. `loader` is a batch from a DataLoader without workers; its yardstick is the "
        "training step that it is for."
    ),
    header=CACHE_HEADER,
    lines=cache_lines,
    run=run,
)
