"""`stbench export`: write a run's weights for other codebases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stbench.config.build import build_backbone
from stbench.core.backbone import Backbone, Weights
from stbench.core.errors import UserError
from stbench.core.registry import BACKBONES, lookup
from stbench.evaluate.past_run import PastRun, open_run
from stbench.models.export import Kind, _require_native, _write_diffusers, _write_official
from stbench.models.weights import load_weights


def export_run(path: Path, kind: Kind, output: Path, weights: Weights) -> list[str]:
    """Write a run's final weights; returns lines that say what was written and whose code loads it.

    Raises UserError for what the other code has no place for, and for an output that exists.
    """
    run = open_run(path)
    if output.exists():
        raise UserError(f"{output} exists; choose another --output")
    network = final_network(run, weights)
    options = _options(run)
    _require_native(network, run.spec.objective)
    if kind == "diffusers":
        return _write_diffusers(network, options, output)
    return _write_official(network, options, output, run.spec.objective)


def final_network(run: PastRun, weights: Weights) -> Backbone:
    """The last stage's network at its last kept step, in eval mode, on the host."""
    job = run.jobs[-1]
    place = run.folder.path / "checkpoints" / f"{job.index}-{job.name}"
    files = sorted(place.glob(f"{weights}-*.safetensors"))
    if not files:
        raise UserError(f"{run.folder.path} has no {weights} weights yet; finish it with `stbench run` first")
    network = build_backbone(run.spec.backbone, run.spec.objective, run.dataset)
    network.load_state_dict(load_weights(files[-1]))
    return network.eval().requires_grad_(False)


def _options(run: PastRun) -> dict[str, Any]:
    spec = run.spec.backbone
    return {**lookup(BACKBONES, spec.name).presets[spec.size], **spec.options}
