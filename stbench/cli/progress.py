"""The progress bar of all commands. Lower packages get its callback and know nothing about terminals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class RateColumn(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        """Render the speed of the last seconds, "-" before the first image."""
        return Text(f"{'-' if task.speed is None else f'{task.speed:.0f}'} images/s")


@contextmanager
def progress_bar(
    label: str, total: int | None = None, *, transient: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error, if that is a terminal.

    Args:
        label: What is being done to the images, such as "encode".
        total: Number of images; None shows a bar without an end.
        transient: Remove the bar at the end.

    Yields:
        A function to call with the number of images done so far.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=transient) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)
