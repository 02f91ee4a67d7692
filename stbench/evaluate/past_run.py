"""Open a finished or unfinished run folder: its specification, its plan and its stored weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stbench.config.build import build_backbone
from stbench.config.plan import PlannedStage, PreparedRun, prepare
from stbench.config.spec import stored_spec
from stbench.core.backbone import Backbone, Weights
from stbench.core.errors import UserError
from stbench.core.text import print_line
from stbench.evaluate.run_plugins import PluginChoice, changed_plugins, load_run_plugins, require_unchanged
from stbench.models.weights import load_weights
from stbench.runs.folder import RunFolder


@dataclass(frozen=True)
class PastRun:
    """A run folder that has been opened for reading."""

    folder: RunFolder
    prepared: PreparedRun
    changed: Mapping[str, str] = field(default_factory=dict)
    """What comes from plug-ins that differ from the recorded ones: kind -> sha256 now."""

    @property
    def last_stage(self) -> PlannedStage:
        """The stage whose network is evaluated."""
        return self.prepared.stages[-1]

    def weight_files(self, kind: Weights) -> dict[int, Path]:
        """The stored weights of the last stage by step."""
        stage = self.last_stage
        return self.folder.stage(stage.index, stage.name).weight_files(kind)

    def point_files(self) -> dict[int, Path]:
        """The stored EMA weights by step; standard error names those that were recorded and are missing."""
        stage, files = self.last_stage, self.weight_files("ema")
        folder = self.folder.stage(stage.index, stage.name)
        for name in sorted(folder.weight_hashes()):
            if name.startswith("ema-") and not (folder.path / name).exists():
                print_line(f"{folder.path / name} is missing; this evaluation point is left out", error=True)
        return files

    def final_file(self, kind: Weights) -> Path:
        """The weights after the last step of a finished run, or the latest ones of an unfinished run.

        For an unfinished run, one line on standard error says which weights are used.

        Raises:
            UserError: If there are none.
        """
        files, path, stage = self.weight_files(kind), self.folder.path, self.last_stage
        if not files:
            raise UserError(f"{path} has no {kind} weights yet; finish it with `stbench run` first")
        state = self.folder.status()["state"]
        if state == "finished":
            if stage.steps not in files:
                file = self.folder.stage(stage.index, stage.name).weights(kind, stage.steps)
                raise UserError(
                    f"{file} is missing; restore it, or delete {path} and run `stbench run` again"
                )
            return files[stage.steps]
        step = max(files)
        print_line(
            f"{path} is not finished ({state}): using its {kind} weights after step {step} of {stage.steps}",
            error=True,
        )
        return files[step]

    def load(self, file: Path) -> Backbone:
        """The run's network with the weights of a file: on the host, frozen and in eval mode.

        Raises:
            UserError: If the file is not the one that was recorded, or does not fit the network.
        """
        spec = self.prepared.spec
        heads = self.last_stage.definition.heads
        network = build_backbone(spec.backbone, spec.objective, self.prepared.dataset, heads=heads)
        state = load_weights(file, self.folder.weights_sha256(file))
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"{file} does not fit the network in spec.json ({reason}); restore both"
            ) from error
        return network.eval().requires_grad_(False)


def open_run(path: Path, plugins: PluginChoice = PluginChoice()) -> PastRun:  # noqa: B008
    """Open a run folder.

    Args:
        path: The run folder.
        plugins: Plug-in files that may be executed; the folder's own record of them is not enough.

    Raises:
        UserError: If `path` is not a run folder, if it is damaged, or if a plug-in it uses was not named or
            has changed.
    """
    folder = RunFolder(path)
    folder.require()
    stored = folder.spec()
    spec = stored_spec(stored, path)
    load_run_plugins(path, stored["plugins"], spec, plugins)
    if spec.data is not None:  # nothing is trained here, so the training set stays on disk
        spec = spec.model_copy(update={"data": spec.data.model_copy(update={"resident": "no"})})
    prepared = prepare(spec)
    changed = changed_plugins(prepared, stored)
    if not plugins.allow_changed:
        require_unchanged(path, changed, stored["plugins"])
    return PastRun(folder, prepared, changed)
