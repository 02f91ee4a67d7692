"""What a stage leaves in the run folder: weights, its record, and what other runs may reuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from stbench.config.build import build_backbone
from stbench.config.plan import PlannedStage
from stbench.config.spec import RunSpec
from stbench.core.backbone import Backbone, Weights
from stbench.core.recipe import Artifact, Cost
from stbench.data.dataset import Dataset
from stbench.models.weights import load_weights, require_finite, save_weights
from stbench.runs.folder import OutputFolder, RunFolder
from stbench.runs.records import StageRecord
from stbench.train.state import TrainingState, publish_artifact, reuse_artifact


class StageStore:
    """The files of one stage of a run. Rank 0 writes; every rank may load."""

    def __init__(
        self, spec: RunSpec, stage: PlannedStage, dataset: Dataset, run_folder: RunFolder, output: Path
    ) -> None:
        self._spec, self._stage, self._dataset = spec, stage, dataset
        self._run_folder, self._output = run_folder, OutputFolder(output)
        self.folder = run_folder.stage(stage.index, stage.name)

    def recorded(self) -> StageRecord | None:
        """The record of this stage in the run folder; None if it is not finished."""
        for record in self._run_folder.stages():
            if (record.index, record.fingerprint) == (self._stage.index, self._stage.fingerprint):
                return record
        return None

    def link_reused(self) -> StageRecord | None:
        """Link the weights of an equal stage of another run and return this stage's record; None without one.

        The last stage is always trained: its curve needs the weights of every point, and continuing it needs
        its training state.
        """
        if self._stage.is_last or self.folder.states():
            return None
        record = reuse_artifact(self._output, self.folder, self._stage.fingerprint)
        if record is None:
            return None
        for kind, sha256 in record.sha256.items():
            self.folder.record_weights(kind, record.steps, sha256)
        return replace(record, name=self._stage.name, index=self._stage.index, reused=True)

    def store_point(
        self, step: int, averages: Mapping[str, Mapping[str, Tensor]], *, keep_others: bool
    ) -> None:
        """Store the averages of an evaluation point by kind; delete those of others unless they are kept."""
        for kind, weights in averages.items():
            self._store(kind, step, weights)
        if not keep_others:
            for kind in averages:
                for other, file in self.folder.weight_files(kind).items():
                    if other != step:
                        file.unlink()
            self.folder.forget_missing()

    def finish(
        self, state: TrainingState, raw: Mapping[str, Tensor], ema: Mapping[str, Tensor]
    ) -> StageRecord:
        """Store the final weights, offer them to other runs, and describe the finished stage."""
        steps, cost = self._stage.steps, Cost(**state.cost)
        sha256 = {"raw": self._store("raw", steps, raw), "ema": self._store("ema", steps, ema)}
        record = StageRecord(
            name=self._stage.name,
            index=self._stage.index,
            steps=steps,
            images=self._stage.images,
            seconds=state.seconds,
            warmup_seconds=state.warmup_seconds,
            flops_student=cost.student,
            flops_heads=cost.heads,
            flops_teachers=cost.teachers,
            fingerprint=self._stage.fingerprint,
            sha256=sha256,
            reused=False,
        )
        publish_artifact(self._output, self.folder, record)
        return record

    def artifact(self, record: StageRecord) -> Artifact:
        """The artifact of the finished stage, for later stages."""
        return Artifact(
            name=self._stage.name,
            fingerprint=self._stage.fingerprint,
            checkpoint=str(self.folder.path),
            sha256=record.sha256,
            steps=record.steps,
            images_seen=record.images,
            seconds=record.seconds,
            flops=record.flops,
            loader=lambda weights: self.load(weights, record.sha256[weights]),
        )

    def load(self, weights: Weights, sha256: str) -> Backbone:
        """The network with the final weights of this stage, on the host."""
        heads = self._stage.definition.heads
        network = build_backbone(self._spec.backbone, self._spec.objective, self._dataset, heads=heads)
        file = self.folder.weights(weights, self._stage.steps)
        state = load_weights(file, sha256)
        require_finite(state, str(file), "delete the run folder and train it with a smaller learning rate")
        network.load_state_dict(state)
        return network

    def _store(self, kind: str, step: int, weights: Mapping[str, Tensor]) -> str:
        """Write the weights of a step and record their sha256, which is returned."""
        sha256 = save_weights(weights, self.folder.weights(kind, step))
        self.folder.record_weights(kind, step, sha256)
        return sha256
