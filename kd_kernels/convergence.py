"""Whether an iteration may end, asked between its steps."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


class Convergence:
    """``converged(done)``: whether all of ``done`` (bool, any shape, once True always True) is.

    On the CPU it looks. On a GPU a look would wait for all that is queued there, so one is sent after the
    work and its answer taken when it has come: late, so steps must change nothing of what is done. While a
    graph is captured, and on other devices, it is False.
    """

    def __init__(self) -> None:
        self._answer: Optional[Tensor] = None  # in memory that the device writes to by itself
        self._answered: Optional[torch.cuda.Event] = None  # of the look that is on its way

    def __call__(self, done: Tensor) -> bool:
        if done.device.type == "cpu":
            return bool(done.all())
        if done.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return False
        if self._answered is None:
            self._send(done)
        elif self._answered.query():
            self._answered = None
            return bool(self._answer)
        return False

    def _send(self, done: Tensor) -> None:
        if self._answer is None:
            self._answer = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._answer.copy_(done.all(), non_blocking=True)
        self._answered = torch.cuda.Event()
        self._answered.record(torch.cuda.current_stream(done.device))
