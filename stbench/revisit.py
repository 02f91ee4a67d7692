"""Going back to a run: its specification, its kept weights, and more evaluations. Trains nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stbench.checkpoints import load_weights
from stbench.config import EvalSpec, RunSpec, build_backbone, revalidate
from stbench.contracts import Backbone
from stbench.data import Dataset
from stbench.engine import prepare
from stbench.errors import UserError
from stbench.hooks import Evaluation
from stbench.plan import StageJob
from stbench.records import CurvePoint
from stbench.registry import load_plugins
from stbench.results import RunFolder


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


def evaluate_again(run: PastRun, settings: EvalSpec, device: torch.device) -> list[CurvePoint]:
    """Evaluate the last stage's kept weights under changed evaluation settings; returns the rows added."""
    spec = run.spec.model_copy(update={"eval": settings})
    job, known = run.jobs[-1], {(p.stage_index, p.step): p for p in run.folder.points()}
    added = []
    with run.folder.lock():
        evaluation = Evaluation(job, spec, run.dataset.to(device), run.folder, _cache(run), device)
        for step, file in run.weights_at(job).items():
            before = known.get((job.index, step))
            if before is not None:
                added += evaluation.run(run.network(file).to(device), step, before.seconds, before.flops)
    return added


def _cache(run: PastRun) -> Path:
    return run.folder.path.parent / ".cache"
