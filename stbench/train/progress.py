"""The few named moments of a run: progress, evaluation and curve, tracking, and Ctrl-C."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from stbench.config.plan import StageJob
from stbench.runs.records import CurvePoint, StageRecord


class Hook:
    """Watches a run. Every moment does nothing until a subclass says otherwise."""

    every = 0
    """Steps between log points; 0 for none."""

    def wants(self, step: int, job: StageJob) -> bool:
        """Whether `on_step` is wanted now: reading the losses synchronises the device."""
        return bool(self.every) and (step % self.every == 0 or step == job.steps)

    def on_stage(self, job: StageJob, step: int) -> None:
        """A stage begins, or goes on from `step`."""

    def on_step(self, job: StageJob, step: int, losses: Mapping[str, float]) -> None:
        """A log point was reached."""

    def on_point(self, job: StageJob, point: CurvePoint) -> None:
        """An evaluation was written to the curve."""

    def on_stage_end(self, job: StageJob, record: StageRecord) -> None:
        """A stage is finished, or was found finished."""

    def close(self) -> None:
        """The run is over, well or badly."""


class Speed:
    """Images per second since the last look."""

    def __init__(self, batch: int) -> None:
        self._batch, self._step, self._time = batch, 0, time.perf_counter()

    def reset(self, step: int) -> None:
        """Begin to count here."""
        self._step, self._time = step, time.perf_counter()

    def rate(self, step: int) -> float:
        """Images per second since the last call."""
        now = time.perf_counter()
        rate = (step - self._step) * self._batch / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return rate


def point_line(job: StageJob, point: CurvePoint) -> str:
    """One evaluation in one line."""
    guided = "" if point.guidance == 1.0 else f"  guidance {point.guidance:g}"
    figures = "  ".join(
        f"{name} {point.metrics[name]:.3f}" for name in ("fid", "is") if name in point.metrics
    )
    return f"{job.name} step {point.step}: {figures}{guided}"


class Bar(Hook):
    """A rich progress bar with stage, loss, images a second and time left, for a terminal."""

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

    def on_stage(self, job: StageJob, step: int) -> None:
        """A bar of its own for each stage."""
        self._speed.reset(step)
        self._task = self._progress.add_task(job.name, total=job.steps, completed=step, loss="-", rate="-")

    def on_step(self, job: StageJob, step: int, losses: Mapping[str, float]) -> None:
        """Move the bar."""
        rate = f"{self._speed.rate(step):.0f}"
        self._progress.update(self._task, completed=step, loss=f"{losses['denoise']:.3f}", rate=rate)

    def on_point(self, job: StageJob, point: CurvePoint) -> None:
        """Print the evaluation above the bar."""
        self._progress.console.print(point_line(job, point), highlight=False)
        self._speed.reset(point.step)

    def close(self) -> None:
        """Give the terminal back."""
        self._progress.stop()


class Lines(Hook):
    """Plain lines, for a log file."""

    every = 100

    def __init__(self, batch: int, console: Console) -> None:
        self._console, self._speed = console, Speed(batch)

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def on_stage(self, job: StageJob, step: int) -> None:
        """Say which stage begins."""
        self._speed.reset(step)
        self._print(f"{job.name}: {job.steps} steps" + (f", from step {step}" if step else ""))

    def on_step(self, job: StageJob, step: int, losses: Mapping[str, float]) -> None:
        """Loss and speed."""
        text = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        self._print(f"{job.name} step {step}/{job.steps}: {text}  {self._speed.rate(step):.0f} images/s")

    def on_point(self, job: StageJob, point: CurvePoint) -> None:
        """The evaluation."""
        self._print(point_line(job, point))
        self._speed.reset(point.step)

    def on_stage_end(self, job: StageJob, record: StageRecord) -> None:
        """What the stage cost."""
        how = "reused" if record.reused else "done"
        self._print(
            f"{job.name}: {how}, {record.seconds:.1f} s of training, {record.flops / 1e12:.2f} TFLOPs"
        )


class Tracker(Hook):
    """Losses and metrics to TensorBoard through mmengine's Visualizer."""

    every = 10

    def __init__(self, folder: Path) -> None:
        from mmengine.visualization import Visualizer  # imports matplotlib and cv2: only when tracking is on

        backend = {"type": "TensorboardVisBackend"}
        self._visualizer = Visualizer(vis_backends=[backend], save_dir=str(folder))

    def on_step(self, job: StageJob, step: int, losses: Mapping[str, float]) -> None:
        """Losses by stage."""
        self._add({f"{job.name}/loss/{name}": value for name, value in losses.items()}, step)

    def on_point(self, job: StageJob, point: CurvePoint) -> None:
        """Metrics by stage and guidance."""
        self._add({f"{job.name}/g{point.guidance:g}/{k}": v for k, v in point.metrics.items()}, point.step)

    def _add(self, scalars: dict[str, Any], step: int) -> None:
        self._visualizer.add_scalars(scalars, step=step)

    def close(self) -> None:
        """Flush the event file."""
        self._visualizer.close()


def progress_hook(batch: int) -> Hook:
    """A bar on a terminal, lines elsewhere; both on standard error."""
    console = Console(stderr=True)
    return Bar(batch, console) if sys.stderr.isatty() else Lines(batch, console)
