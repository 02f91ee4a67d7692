"""Progress on standard error: bars for images, and bars or plain lines for training.

Lower packages get callbacks and hooks from here and know nothing of terminals.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from stbench.cli.ranks import is_main
from stbench.config.plan import PlannedStage
from stbench.core.text import visible
from stbench.evaluate.progress import ignore
from stbench.runs.records import CurvePoint, StageRecord
from stbench.train.hooks import Hook

Report = Callable[[int], None]
"""Called with the number of images done so far."""


# --- Images ---


class RateColumn(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        """Render the recent speed, "-" before the first image."""
        return Text(f"{'-' if task.speed is None else f'{task.speed:.0f}'} images/s")


@contextmanager
def progress_bar(label: str, total: int | None = None, *, transient: bool = False) -> Iterator[Report]:
    """Show a progress bar on standard error, if that is a terminal.

    Args:
        label: What is being done to the images, such as "encode".
        total: Number of images; None shows a bar without an end.
        transient: Remove the bar at the end.

    Yields:
        A function to call with the number of images done so far.
    """
    console = Console(stderr=True)
    if not console.is_terminal or not is_main():  # disabled, rich < 15 prints a newline
        yield ignore
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=transient) as bar:
        task = bar.add_task(visible(label), total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def counting_progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar whose function takes the number of images since its last call."""
    done = 0
    with progress_bar(label, total) as report:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            report(done)

        yield advance


def transient_progress_bar(label: str, total: int | None = None) -> AbstractContextManager[Report]:
    """Show a progress bar that disappears at the end."""
    return progress_bar(label, total, transient=True)


# --- Training ---


class Speed:
    """Measures images per second between calls."""

    def __init__(self, batch: int) -> None:
        self._batch, self._step, self._time = batch, 0, time.perf_counter()

    def reset(self, step: int) -> None:
        """Start measuring at this step."""
        self._step, self._time = step, time.perf_counter()

    def rate(self, step: int) -> float:
        """Images per second since the last call of `rate` or `reset`."""
        now = time.perf_counter()
        rate = (step - self._step) * self._batch / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return rate


def point_line(point: CurvePoint) -> str:
    """Describe an evaluation in one line."""
    guided = "" if point.guidance == 1.0 else f"  guidance {point.guidance:g}"
    guided += f"  guides {point.guides}" if point.guides else ""
    values = "  ".join(f"{name} {point.metrics[name]:.3f}" for name in ("fid", "is") if name in point.metrics)
    return f"{point.stage} step {point.step}: {values}{guided}"


class TrainingBar(Hook):
    """A progress bar per stage with loss, images/s and remaining time, for a terminal."""

    every = 10

    def __init__(self, batch: int, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} images/s", markup=False),
            TimeRemainingColumn(),
        )
        self._progress, self._speed, self._task = Progress(*columns, console=console), Speed(batch), TaskID(0)
        self._progress.start()

    def on_notice(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_stage(self, stage: PlannedStage, step: int) -> None:
        """Start a new bar."""
        self._speed.reset(step)
        self._task = self._progress.add_task(
            visible(stage.name), total=stage.steps, completed=step, loss="-", rate="-"
        )

    def on_step(self, stage: PlannedStage, step: int, losses: Mapping[str, float]) -> None:
        """Advance the bar."""
        rate = f"{self._speed.rate(step):.0f}"
        self._progress.update(self._task, completed=step, loss=f"{losses['denoise']:.3f}", rate=rate)

    def on_point(self, stage: PlannedStage, point: CurvePoint) -> None:
        """Print the evaluation above the bar."""
        self._progress.console.print(Text(visible(point_line(point))))
        self._speed.reset(point.step)  # evaluation does not count as training time

    def close(self) -> None:
        """Release the terminal."""
        self._progress.stop()


class TrainingLog(Hook):
    """Plain lines, for a log file."""

    every = 100

    def __init__(self, batch: int, console: Console) -> None:
        self._console, self._speed = console, Speed(batch)

    def _print(self, text: str) -> None:
        self._console.print(Text(visible(text)), soft_wrap=True)

    def on_notice(self, text: str) -> None:
        """Print a line."""
        self._print(text)

    def on_stage(self, stage: PlannedStage, step: int) -> None:
        """Print the stage and where it starts."""
        self._speed.reset(step)
        self._print(f"{stage.name}: {stage.steps} steps" + (f", from step {step}" if step else ""))

    def on_step(self, stage: PlannedStage, step: int, losses: Mapping[str, float]) -> None:
        """Print losses and speed."""
        text = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        self._print(f"{stage.name} step {step}/{stage.steps}: {text}  {self._speed.rate(step):.0f} images/s")

    def on_point(self, stage: PlannedStage, point: CurvePoint) -> None:
        """Print the evaluation."""
        self._print(point_line(point))
        self._speed.reset(point.step)

    def on_stage_end(self, stage: PlannedStage, record: StageRecord) -> None:
        """Print what the stage cost."""
        how = "reused" if record.reused else "done"
        cost = f"{record.seconds:.1f} s of training, {record.flops / 1e12:.2f} TFLOPs"
        self._print(f"{stage.name}: {how}, {cost}")


def training_progress(batch: int) -> TrainingBar | TrainingLog:
    """A progress bar on a terminal, lines elsewhere; both on standard error."""
    console = Console(stderr=True)
    return TrainingBar(batch, console) if sys.stderr.isatty() else TrainingLog(batch, console)
