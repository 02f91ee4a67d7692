"""Ctrl-C and SIGTERM as a flag that the training loop reads between steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into `requested`; a second Ctrl-C raises KeyboardInterrupt.

    A second SIGTERM does not: a cluster sends it to every process of a job, and each parent passes it on.
    """

    def __init__(self, *, patient: bool = False) -> None:
        """With `patient`, later signals change nothing: a rank gets them from several sides."""
        self.requested, self._patient = False, patient
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._request)
            except ValueError:  # not the main thread: the caller handles signals
                return self
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT and not self._patient:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
