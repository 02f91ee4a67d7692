"""Open a finished or unfinished run folder: its specification, its plan and its stored weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stbench.config.build import build_backbone
from stbench.config.plan import PlannedStage, PreparedRun, prepare
from stbench.config.spec import stored_spec
from stbench.core.backbone import Backbone, Weights
from stbench.core.registry import load_plugins
from stbench.models.weights import load_weights
from stbench.runs.folder import RunFolder


@dataclass(frozen=True)
class PastRun:
    """A run folder that has been opened for reading."""

    folder: RunFolder
    prepared: PreparedRun

    @property
    def last_stage(self) -> PlannedStage:
        """The stage whose network is evaluated."""
        return self.prepared.stages[-1]

    def weight_files(self, kind: Weights) -> dict[int, Path]:
        """The stored weights of the last stage by step."""
        stage = self.last_stage
        return self.folder.stage(stage.index, stage.name).weight_files(kind)

    def load(self, file: Path) -> Backbone:
        """The run's network with the weights of a file: on the host, frozen and in eval mode."""
        spec = self.prepared.spec
        network = build_backbone(spec.backbone, spec.objective, self.prepared.dataset)
        network.load_state_dict(load_weights(file))
        return network.eval().requires_grad_(False)


def open_run(path: Path) -> PastRun:
    """Open a run folder.

    Raises:
        UserError: If `path` is not a run folder, if it is damaged, or if a plug-in it needs is missing.
    """
    folder = RunFolder(path)
    folder.require()
    stored = folder.spec()
    load_plugins([Path(file) for file in stored["plugins"] if file.endswith(".py")])
    spec = stored_spec(stored, path)
    if spec.data is not None:  # nothing is trained here, so the training set stays on disk
        spec = spec.model_copy(update={"data": spec.data.model_copy(update={"resident": "no"})})
    return PastRun(folder, prepare(spec))
