"""`stbench export`: write a run's weights for other codebases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stbench.core.backbone import Backbone, Weights
from stbench.core.errors import UserError
from stbench.evaluate.past_run import PastRun, open_run
from stbench.models.export import Kind, _require_native, _write_diffusers, _write_official


def export_run(path: Path, kind: Kind, output: Path, weights: Weights) -> list[str]:
    """Write a run's final weights; returns lines that say what was written and whose code loads it.

    Raises UserError for what the other code has no place for, and for an output that exists.
    """
    run = open_run(path)
    if output.exists():
        raise UserError(f"{output} exists; choose another --output")
    network = final_network(run, weights)
    options = _options(run)
    _require_native(network, run.prepared.spec.objective)
    if kind == "diffusers":
        return _write_diffusers(network, options, output)
    return _write_official(network, options, output, run.prepared.spec.objective)


def final_network(run: PastRun, weights: Weights) -> Backbone:
    """The network of the last stage at its last stored step: in eval mode, on the host.

    Raises:
        UserError: If the run has no such weights yet.
    """
    files = run.weight_files(weights)
    if not files:
        raise UserError(f"{run.folder.path} has no {weights} weights yet; finish it with `stbench run` first")
    return run.load(files[max(files)])


def _options(run: PastRun) -> dict[str, Any]:
    return dict(run.prepared.spec.backbone.effective)
