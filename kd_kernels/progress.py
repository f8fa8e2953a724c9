"""How far a long piece of work is, on stderr."""

from __future__ import annotations

import sys
import time
from typing import Optional


class Progress:
    """Says on stderr how far a long command is: from two seconds on, often on a terminal, seldom in a log."""

    def __init__(self, what: str, total: Optional[int]) -> None:
        self.what, self.total, self.done = what, total, 0
        self.terminal = sys.stderr.isatty()
        self.start = time.monotonic()
        self.next = self.start + 2

    def step(self, detail: Optional[str] = None) -> None:
        self.done += 1
        now = time.monotonic()
        if now < self.next and not (self.terminal and self.done == self.total and self._shown):
            return
        self.next = now + (0.3 if self.terminal else 10)
        of = "" if self.total is None else f" of {self.total}"
        text = f"{self.what}: {self.done}{of}, {now - self.start:.0f} s"
        text += f" ({detail})" if detail else ""
        print(f"\r{text:<100}" if self.terminal else text, end="" if self.terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    @property
    def _shown(self) -> bool:
        return self.next > self.start + 2

    def close(self) -> None:
        if self.terminal and self._shown:
            print(f"\r{'':<100}\r", end="", file=sys.stderr)
            sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
