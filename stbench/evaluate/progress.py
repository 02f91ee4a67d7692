"""Progress callbacks, by which long computations report to a caller that knows the terminal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Report = Callable[[int], None]
"""Called with the number of images done so far."""
ProgressBar = Callable[[str, int | None], AbstractContextManager[Report]]
"""Opens a progress bar with a label and a total, None if it is not known."""


def ignore(done: int) -> None:
    """Report nothing."""


def no_progress(label: str, total: int | None) -> AbstractContextManager[Report]:
    """Show no progress bar."""
    return nullcontext(ignore)
