"""Load the guides that a run is sampled with, among them other networks, and what those cost to train."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from stbench.config.build import build_backbone, build_objective
from stbench.config.guides import build_guide, complete_guides
from stbench.config.plan import PlannedStage, PreparedRun
from stbench.core.backbone import sampling_view
from stbench.core.errors import UserError
from stbench.core.files import hash_file
from stbench.core.guides import Guide
from stbench.core.objective import Objective
from stbench.diffusion.guides import NetworkGuide, require_fit
from stbench.evaluate.past_run import PastRun, open_run
from stbench.models.official import load_official
from stbench.runs.folder import RunFolder
from stbench.runs.guide_text import GuideTerm, format_guides, parse_guides
from stbench.runs.stage_folder import CHECKPOINTS

COSTS = ("images", "seconds", "flops")
"""What `CurvePoint.guide_cost` contains."""


@dataclass(frozen=True)
class LoadedGuides:
    """Guides on one device, ready to sample with."""

    guides: tuple[Guide, ...] = ()
    text: str = ""
    """Their text form for records, which names another network instead of its path."""
    cost: Mapping[str, float] = field(default_factory=dict)
    """Training cost of another network, as in `CurvePoint.guide_cost`."""


def load_guides(
    text: str,
    declared: Mapping[str, Guide],
    objective: Objective,
    device: torch.device | str = "cpu",
    *,
    guided: Path | None = None,
) -> LoadedGuides:
    """Load the guides in `text` onto a device.

    Args:
        text: The guides; see docs/guidance.md.
        declared: The guides of the stage whose network is guided, by name.
        objective: Its objective, which another network must share.
        device: Device of the guided network.
        guided: Run folder of the guided network, which pays for its own earlier weights.

    Raises:
        UserError: If a guide is unknown, or a network cannot be loaded or predicts something else.
    """
    guides: list[Guide] = []
    recorded: list[GuideTerm] = []
    cost: Mapping[str, float] = {}
    for term in parse_guides(complete_guides(text, declared)):
        if not term.network:
            guides.append(build_guide(term, declared[term.name]))
        else:
            guide, cost = _load_network(Path(term.network), objective, guided)
            guide = replace(guide, network=guide.network.to(device))
            guides.append(build_guide(term, guide))
            term = replace(term, network=f"{guide.name}#{guide.sha256[:8]}")
        recorded.append(term)
    return LoadedGuides(tuple(guides), format_guides(recorded), cost)


def stage_guides(
    prepared: PreparedRun, stage: PlannedStage, device: torch.device | str, folder: Path | None = None
) -> LoadedGuides:
    """Load the guides with which a stage of a run is evaluated: none but for the last stage.

    Raises UserError as `load_guides` does, and if a guide does not fit the network.
    """
    spec = prepared.spec
    if not stage.is_last or not spec.eval.guides:
        return LoadedGuides()
    objective = build_objective(spec.objective, spec.objective_options)
    loaded = load_guides(spec.eval.guides, stage.definition.guides, objective, device, guided=folder)
    heads = stage.definition.heads
    network = build_backbone(spec.backbone, spec.objective, prepared.dataset, "meta", heads=heads)
    require_fit(loaded.guides, sampling_view(network), objective)
    return loaded


def _load_network(
    path: Path, objective: Objective, guided: Path | None
) -> tuple[NetworkGuide, Mapping[str, float]]:
    """Load the network of a run folder, of weights in one, or of an official checkpoint; with its cost."""
    folder = _run_of(path)
    if folder is None:
        if not path.is_file():
            raise UserError(
                f"network={path} must be a run folder or a file of weights, found neither; "
                f"for example network=results/runs/RUN:1.5"
            )
        official = load_official(path)
        _require_same_meaning(objective, build_objective(official.objective), path)
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-")[:60] or "weights"
        return NetworkGuide(official.backbone, f"{stem}-{official.sha256[:8]}", official.sha256), {}

    run = open_run(folder)
    file = run.final_file("ema") if path.is_dir() else _file_of(run, path)
    step = next(step for step, stored in run.weight_files("ema").items() if stored == file)
    spec = run.prepared.spec
    _require_same_meaning(objective, build_objective(spec.objective, spec.objective_options), path)
    size = spec.backbone.size_name.replace("/", "-")
    name = f"{spec.backbone.name}-{size}-{spec.recipe.name}-{step}-{run.prepared.hashes.row}"
    guide = NetworkGuide(run.load(file), name, run.folder.weights_sha256(file) or hash_file(file))
    own = guided is not None and folder.resolve() == guided.resolve()
    return guide, dict.fromkeys(COSTS, 0.0) if own else _cost(run, step)


def _run_of(path: Path) -> Path | None:
    """Return the run folder at a path, or the one that contains the weights there; None for other files."""
    absolute = path.absolute()
    if absolute.is_file() and absolute.parent.parent.name == CHECKPOINTS:
        absolute = absolute.parents[2]
    return absolute if RunFolder(absolute).exists() else None


def _file_of(run: PastRun, path: Path) -> Path:
    """Return the weights of the last stage of a run at a path."""
    for file in run.weight_files("ema").values():
        if file.resolve() == path.resolve():
            return file
    raise UserError(
        f"network={path} must be EMA weights of the last stage of {run.folder.path}, found another file; "
        f"name the run folder for its final weights"
    )


def _cost(run: PastRun, step: int) -> dict[str, float]:
    """Return the training cost of all stages of a run up to a step of its last one."""
    record = run.folder.record()
    spent: list[object] = [stage for stage in record.stages if stage.index < record.final_stage]
    spent += [point for point in record.final_points if point.step == step][:1]
    return {what: float(sum(getattr(part, what) for part in spent)) for what in COSTS}


def _require_same_meaning(one: Objective, other: Objective, path: Path) -> None:
    """Raise UserError unless a prediction at a time means the same under two objectives."""
    t = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    t, x = one.snap(t), torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 1, 2, 2)
    prediction = x.flip(0)
    means = [(*each.alpha_sigma(t), *each.denoise(prediction, x, t)) for each in (one, other)]
    same = one.out_channels(1) == other.out_channels(1)
    if not same or not all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*means, strict=True)):
        raise UserError(
            f"the network at {path} was trained with {type(other).__name__}, expected the prediction and "
            f"noise of {type(one).__name__}; use a network of the same objective"
        )
