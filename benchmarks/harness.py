"""Timing in interleaved rounds, and what counts as a clean sample.

Every round runs every provider once, in an order that turns round each time, so that a machine that
gets slower hits all alike. Ratios to the floor are formed within a round and then summarised: drift
cancels in them where it would not in a ratio of medians.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Optional

import torch

# A sample during which other processes used more than this share of the machine is run again.
FOREIGN_LIMIT = 0.06
RETRIES = 2
# A provider more than this many times slower than the fastest sits out every second round, or two of
# three: its spread matters less than the time it takes.
SLOW = 3.0
MAX_STRIDE = 3


@dataclass(frozen=True)
class Spread:
    """Median with the 20th and 80th percentile of ``count`` samples."""

    median: float
    p20: float
    p80: float
    count: int

    @staticmethod
    def of(samples: Sequence[float]) -> Optional[Spread]:
        if not samples:
            return None
        values = torch.tensor(samples, dtype=torch.float64)
        low, middle, high = torch.quantile(
            values, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        ).tolist()
        return Spread(middle, low, high, len(samples))


@dataclass
class Timed:
    """Samples of one provider, by round; None where it sat out or where no clean sample was had."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], None] = lambda: None
    samples: list[Optional[float]] = field(default_factory=list)
    rejected: int = 0
    noisy: bool = False  # no clean sample at all: the disturbed ones are reported instead
    failure: str = ""
    stride: int = 1
    disturbed: list[Optional[float]] = field(default_factory=list)

    def spread(self) -> Optional[Spread]:
        return Spread.of([s for s in self.samples if s is not None])

    def ratio_to(self, other: Timed) -> Optional[Spread]:
        pairs = zip(self.samples, other.samples)
        return Spread.of([mine / theirs for mine, theirs in pairs if mine is not None and theirs is not None])


class ForeignLoad:
    """Share of the machine that other processes used (time stolen by the hypervisor included)."""

    def __init__(self) -> None:
        self.tick = os.sysconf("SC_CLK_TCK")
        self.available = os.path.exists("/proc/stat")
        self.start()

    def _busy(self) -> float:
        if not self.available:
            return 0.0
        with open("/proc/stat") as stat:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.readline().split()[1:9])
        return (user + nice + system + irq + softirq + steal) / self.tick

    def start(self) -> None:
        self.busy, self.own, self.wall = self._busy(), time.process_time(), time.perf_counter()

    def clean(self) -> bool:
        """Whether the span since ``start`` was quiet. Three ticks of the clock are never held against it."""
        if not self.available:
            return True
        wall = time.perf_counter() - self.wall
        foreign = self._busy() - self.busy - (time.process_time() - self.own)
        return foreign <= max(FOREIGN_LIMIT * wall * (os.cpu_count() or 1), 3 / self.tick)


def _sample(timed: Timed, sync: Callable[[], None], load: ForeignLoad) -> tuple[float, bool]:
    timed.prepare()
    sync()
    load.start()
    begin = time.perf_counter()
    timed.run()
    sync()
    seconds = time.perf_counter() - begin
    return seconds, load.clean()


def run_rounds(
    providers: Sequence[Timed], *, rounds: int, warmup: int = 1, device: str = "cpu", reject: bool = True
) -> None:
    """Fills ``samples`` of every provider. One that raises is dropped and says why in ``failure``."""
    load = ForeignLoad()

    def sync() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    def guarded(timed: Timed) -> Optional[tuple[float, bool]]:
        try:
            return _sample(timed, sync, load)
        except Exception as error:  # a peer may fail in any way; its row says how and the rest go on
            timed.failure = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            return None

    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        estimates: dict[str, float] = {}
        for timed in providers:
            for _ in range(warmup):
                outcome = guarded(timed)
                if outcome is None:
                    break
                estimates[timed.name] = outcome[0]
        fastest = min(estimates.values(), default=0.0)
        for timed in providers:
            slower = estimates.get(timed.name, 0.0) / (SLOW * fastest) if fastest else 1.0
            timed.stride = min(MAX_STRIDE, max(1, round(slower)))
        for index in range(rounds):
            gc.collect()
            for timed in providers if index % 2 == 0 else reversed(providers):
                if timed.failure:
                    continue
                sample: Optional[float] = None
                dirty: Optional[float] = None
                tries = 1 if timed.rejected >= rounds else 1 + RETRIES  # a busy machine is not waited for
                for _ in range(tries if index % timed.stride == 0 else 0):
                    outcome = guarded(timed)
                    if outcome is None:
                        break
                    seconds, clean = outcome
                    if clean or not reject:
                        sample = seconds
                        break
                    timed.rejected += 1
                    dirty = seconds if dirty is None else min(dirty, seconds)
                timed.samples.append(sample)
                timed.disturbed.append(sample if sample is not None else dirty)
    finally:
        if enabled:
            gc.enable()
    # On a machine that is never quiet a disturbed figure, marked as such, says more than an empty row.
    for timed in providers:
        if not timed.failure and timed.spread() is None:
            timed.noisy = True
            timed.samples = timed.disturbed
