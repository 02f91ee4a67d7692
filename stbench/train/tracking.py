"""Experiment tracking: curves, samples, settings and cost of a run, through mmengine's Visualizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from stbench.config.plan import PlannedStage, PreparedRun
from stbench.core.errors import UserError
from stbench.core.text import print_line
from stbench.runs.folder import RunFolder
from stbench.runs.guide_text import file_name
from stbench.runs.records import CurvePoint, StageRecord
from stbench.train.hooks import Hook
from stbench.train.trackers import SERVICES, Service, reason


class Tracker(Hook):
    """Sends losses, metrics, samples, settings and cost of a run to one service.

    Tracking starts before the first step, and an error there stops the run. A later error, such as a lost
    connection, stops the tracking only.
    """

    every = 10

    def __init__(self, service: Service) -> None:
        self._service = service
        self._visualizer: Any = None
        self._failed = False

    def on_start(self) -> None:
        """Start tracking. Raises UserError if the service cannot be reached."""
        from mmengine.visualization import Visualizer  # imports matplotlib and cv2, so only when tracking

        service = self._service
        try:
            backend = {"type": service.backend, **service.options()}
            visualizer = Visualizer(vis_backends=[backend], save_dir=str(service.path))
            where = service.begin(visualizer)
        except Exception as error:
            raise UserError(
                f"--track {service.package} cannot start: {reason(error)}; check the connection and the "
                f"login, or drop --track {service.package}"
            ) from error
        self._visualizer = visualizer
        print_line(f"tracking: {where}", error=True)

    def on_step(self, stage: PlannedStage, step: int, losses: Mapping[str, float]) -> None:
        """Send the losses of the stage."""
        self._add(stage, step, {f"loss/{name}": value for name, value in losses.items()})

    def on_point(self, stage: PlannedStage, point: CurvePoint) -> None:
        """Send the metrics and the samples of this setting of guidance, and the cost so far."""
        guidance = f"g{point.guidance:g}" + (f"+{file_name(point.guides)}" if point.guides else "")
        metrics = {f"{guidance}/{name}": value for name, value in point.metrics.items()}
        cost = {"cost/images": point.images, "cost/seconds": point.seconds, "cost/TFLOPs": point.flops / 1e12}
        self._add(stage, point.step, {**metrics, **cost})
        picture = self._service.folder.sample_file(
            stage.index, stage.name, point.step, point.guidance, point.guides
        )
        if picture.is_file():
            name = self._service.image(stage.name, point.step, guidance)
            self._send(lambda: self._visualizer.add_image(name, _pixels(picture), step=point.step))

    def on_stage_end(self, stage: PlannedStage, record: StageRecord) -> None:
        """Send the cost of the stage, also if it was finished before or reused."""
        self._add(stage, record.steps, {"cost/seconds": record.seconds, "cost/TFLOPs": record.flops / 1e12})

    def close(self) -> None:
        """Send what is left."""
        if self._visualizer is not None:
            self._send(self._visualizer.close)

    def _add(self, stage: PlannedStage, step: int, values: Mapping[str, float]) -> None:
        scalars = self._service.scalars(stage.name, step, values)
        self._send(lambda: self._visualizer.add_scalars(scalars, step=step))

    def _send(self, send: Callable[[], None]) -> None:
        """Call `send`; after an error, print a line and send nothing more."""
        if self._failed:
            return
        try:
            send()
        except Exception as error:
            self._failed = True
            package = self._service.package
            print_line(f"warning: tracking with {package} stopped: {reason(error)}", error=True)


def open_trackers(names: list[str], prepared: PreparedRun, folder: RunFolder) -> list[Hook]:
    """The trackers of a run, one for each different name in `names`.

    Raises:
        UserError: If a package or a login is missing.
    """
    config = flat(prepared.spec.model_dump(mode="json")) | {
        "run_id": prepared.run_id,
        "train_hash": prepared.hashes.train,
        "setting_hash": prepared.hashes.setting,
    }
    stages = tuple(stage.name for stage in prepared.stages)
    services = [SERVICES[name](folder, stages, config) for name in dict.fromkeys(names)]
    for service in services:
        service.require()
    return [Tracker(service) for service in services]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted name, without empty mappings."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _pixels(picture: Any) -> np.ndarray:
    """The pixels (H,W,3) of an image file, uint8."""
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))
