"""The demo's progress bars."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress(items, **options) -> tqdm:
    """A progress bar that redraws often on a terminal and writes seldom into a log."""
    seconds = 0.3 if sys.stderr.isatty() else 15.0
    return tqdm(items, mininterval=seconds, maxinterval=2 * seconds, **options)
