"""Commands that must not outlive their time."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parent.parent


def within(seconds: float, command: list[str], **options: Any) -> Optional[int]:
    """The exit status of a command run in the repository; None where time ran out: what it has started is
    stopped too, or it would be on the GPU during the next measurement."""
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options) as process:
        try:
            return process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None
