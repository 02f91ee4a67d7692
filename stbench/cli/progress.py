"""The progress bar that all commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(
    label: str, total: int | None = None, *, transient: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error, if that is a terminal; yields a function of the items done.

    `transient` removes the bar at the end. None as `total` shows a bar without an end.
    """
    console = Console(stderr=True)
    columns = (TextColumn(label), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=transient) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)
