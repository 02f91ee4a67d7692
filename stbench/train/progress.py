"""Hooks: what happens at the named moments of a run, and the progress display."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from stbench.config.plan import PlannedStage
from stbench.runs.records import CurvePoint, StageRecord


class Hook:
    """Observes a run. Subclasses override the moments they need; by default nothing happens."""

    every = 0
    """Steps between calls of `on_step`; 0 for none."""

    def wants(self, step: int, stage: PlannedStage) -> bool:
        """Whether `on_step` should be called now. Reading the losses synchronises the device."""
        return bool(self.every) and (step % self.every == 0 or step == stage.steps)

    def on_stage(self, stage: PlannedStage, step: int) -> None:
        """A stage begins, or resumes after `step` steps."""

    def on_step(self, stage: PlannedStage, step: int, losses: Mapping[str, float]) -> None:
        """The losses were read after a step."""

    def on_point(self, stage: PlannedStage, point: CurvePoint) -> None:
        """An evaluation was appended to the curve."""

    def on_stage_end(self, stage: PlannedStage, record: StageRecord) -> None:
        """A stage is finished, or was already finished."""

    def close(self) -> None:
        """The run has ended, with or without an error."""


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
    values = "  ".join(f"{name} {point.metrics[name]:.3f}" for name in ("fid", "is") if name in point.metrics)
    return f"{point.stage} step {point.step}: {values}{guided}"


class Bar(Hook):
    """A progress bar with stage, loss, images/s and remaining time, for a terminal."""

    every = 10

    def __init__(self, batch: int, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} images/s"),
            TimeRemainingColumn(),
        )
        self._progress, self._speed, self._task = Progress(*columns, console=console), Speed(batch), TaskID(0)
        self._progress.start()

    def on_stage(self, stage: PlannedStage, step: int) -> None:
        """Start a new bar."""
        self._speed.reset(step)
        self._task = self._progress.add_task(
            stage.name, total=stage.steps, completed=step, loss="-", rate="-"
        )

    def on_step(self, stage: PlannedStage, step: int, losses: Mapping[str, float]) -> None:
        """Advance the bar."""
        rate = f"{self._speed.rate(step):.0f}"
        self._progress.update(self._task, completed=step, loss=f"{losses['denoise']:.3f}", rate=rate)

    def on_point(self, stage: PlannedStage, point: CurvePoint) -> None:
        """Print the evaluation above the bar."""
        self._progress.console.print(point_line(point), highlight=False, markup=False)
        self._speed.reset(point.step)

    def close(self) -> None:
        """Release the terminal."""
        self._progress.stop()


class Lines(Hook):
    """Plain lines, for a log file."""

    every = 100

    def __init__(self, batch: int, console: Console) -> None:
        self._console, self._speed = console, Speed(batch)

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

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


def progress_hook(batch: int) -> Hook:
    """A progress bar on a terminal, lines elsewhere; both on standard error."""
    console = Console(stderr=True)
    return Bar(batch, console) if sys.stderr.isatty() else Lines(batch, console)
