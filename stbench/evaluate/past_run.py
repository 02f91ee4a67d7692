"""Going back to a run: its specification, its kept weights, and more evaluations. Trains nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stbench.config.build import build_backbone
from stbench.config.plan import StageJob, prepare
from stbench.config.spec import RunSpec, revalidate
from stbench.core.backbone import Backbone
from stbench.core.errors import UserError
from stbench.core.registry import load_plugins
from stbench.data.dataset import Dataset
from stbench.models.weights import load_weights
from stbench.runs.folder import RunFolder


@dataclass(frozen=True)
class PastRun:
    """A run folder, opened for reading."""

    folder: RunFolder
    spec: RunSpec
    dataset: Dataset
    jobs: Sequence[StageJob]

    def weights_at(self, job: StageJob) -> dict[int, Path]:
        """Step -> the EMA weights kept there."""
        place = self.folder.path / "checkpoints" / f"{job.index}-{job.name}"
        return {int(file.stem.rsplit("-", 1)[1]): file for file in sorted(place.glob("ema-*.safetensors"))}

    def network(self, file: Path) -> Backbone:
        """The run's network with the weights of a file, frozen and in eval mode, on the host."""
        network = build_backbone(self.spec.backbone, self.spec.objective, self.dataset)
        network.load_state_dict(load_weights(file))
        return network.eval().requires_grad_(False)


def open_run(path: Path) -> PastRun:
    """Read a run folder. Raises UserError if it is none, is damaged, or needs a plug-in that is gone."""
    folder = RunFolder(path)
    if not folder.exists():
        raise UserError(
            f"{path} is no run folder (it has no spec.json); `stbench compare` lists those there are"
        )
    stored = folder.spec()
    load_plugins([Path(file) for file in stored["plugins"] if file.endswith(".py")])
    spec = revalidate({name: stored[name] for name in RunSpec.model_fields if name in stored}, path)
    opened = spec
    if spec.data is not None:  # nobody trains here, so the training set is not loaded onto the device
        opened = spec.model_copy(update={"data": spec.data.model_copy(update={"resident": "no"})})
    dataset, jobs, _ = prepare(opened)
    return PastRun(folder, spec, dataset, jobs)


def _cache(run: PastRun) -> Path:
    return run.folder.path.parent / ".cache"
