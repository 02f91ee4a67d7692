"""Hooks: what observers of a run can do at its named moments."""

from __future__ import annotations

from collections.abc import Mapping

from stbench.config.plan import PlannedStage
from stbench.runs.records import CurvePoint, StageRecord


class Hook:
    """Observes a run. Subclasses override the moments they need; by default nothing happens."""

    every = 0
    """Steps between calls of `on_step`; 0 for none."""

    def wants(self, step: int, stage: PlannedStage) -> bool:
        """Whether `on_step` should be called now. Reading the losses synchronises the device."""
        return bool(self.every) and (step % self.every == 0 or step == stage.steps)

    def on_notice(self, text: str) -> None:
        """The run resumes, and the user should know `text`, one line."""

    def on_start(self) -> None:
        """The run is locked, and something is left to do. An error here stops the run on every rank."""

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
