"""Experiment tracking: losses and metrics to TensorBoard through mmengine's Visualizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stbench.config.plan import PlannedStage
from stbench.core.text import visible
from stbench.runs.records import CurvePoint
from stbench.train.hooks import Hook


class Tracker(Hook):
    """Writes losses and metrics to TensorBoard event files in a folder."""

    every = 10

    def __init__(self, folder: Path) -> None:
        from mmengine.visualization import Visualizer  # imports matplotlib and cv2, so only when tracking

        backend = {"type": "TensorboardVisBackend"}
        self._visualizer = Visualizer(vis_backends=[backend], save_dir=str(folder))

    def on_step(self, stage: PlannedStage, step: int, losses: Mapping[str, float]) -> None:
        """Write the losses of the stage."""
        self._add({f"{stage.name}/loss/{name}": value for name, value in losses.items()}, step)

    def on_point(self, stage: PlannedStage, point: CurvePoint) -> None:
        """Write the metrics of the stage at this guidance scale."""
        scalars = {f"{stage.name}/g{point.guidance:g}/{k}": v for k, v in point.metrics.items()}
        self._add(scalars, point.step)

    def _add(self, scalars: dict[str, Any], step: int) -> None:
        self._visualizer.add_scalars({visible(tag): value for tag, value in scalars.items()}, step=step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._visualizer.close()
