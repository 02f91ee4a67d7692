"""Evaluation settings of a run: the points of a preset, and validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stbench.config.overrides import validate_section
from stbench.config.spec import EvalSpec
from stbench.core.errors import UserError
from stbench.core.files import absolute_path
from stbench.core.objective import Objective
from stbench.core.registry import METRICS, names, suggest
from stbench.core.safe_load import shorten
from stbench.data.spec import ratio_extractors
from stbench.diffusion.sample import check_steps, resolve_sampler


def evaluation_spec(values: dict[str, Any], objective: Objective, steps: int) -> EvalSpec:
    """Check evaluation settings for a last stage of `steps` steps.

    The scale 1.0 and the last step are always added.

    Raises:
        UserError: If a value is invalid, a metric is not registered, or the sampler does not fit the
            objective.
    """
    spec = validate_section(EvalSpec, values, "eval")
    points = sorted({*spec.points, steps})
    resolve_sampler(spec.sampler, objective)
    unknown = next((metric for metric in spec.metrics if metric not in METRICS.module_dict), None)
    if unknown is not None:
        raise UserError(
            f"unknown metric {shorten(unknown)} in eval.metrics{suggest(unknown, names(METRICS))}; "
            f"plug-ins register metrics: add --plugin FILE"
        )
    if points[0] < 1 or points[-1] > steps:
        raise UserError(
            f"eval.points must be steps in 1..{steps}, got {spec.points}; "
            f"for example --set eval.points=[{steps}]"
        )
    if isinstance(spec.extras, list) and not set(spec.extras) <= set(points):
        raise UserError(
            f"eval.extras must be a subset of the evaluation points {points}, got {spec.extras}; "
            f"for example --set eval.extras=[{steps}]"
        )
    if spec.interval[0] > spec.interval[1]:
        raise UserError(
            f"eval.interval must be [low,high] with low <= high, got {spec.interval}; for example [0.0,0.7]"
        )
    check_steps(spec.sampler, objective, spec.steps)
    return spec.model_copy(
        update={
            "guidance": sorted({1.0, *spec.guidance}),
            "points": points,
            "metrics": list(dict.fromkeys(spec.metrics)),
            **_extractor_settings(spec),
        }
    )


def _extractor_settings(spec: EvalSpec) -> dict[str, Any]:
    """Return these settings with absolute paths, and with "fdr6" replaced by the extractors it stands for.

    Raises UserError for a file of an extractor that is not used.
    """
    names = ratio_extractors(spec.fdr)
    for name in spec.fdr_files:
        if name not in names:
            raise UserError(
                f"eval.fdr_files names '{name}', which is not in eval.fdr={spec.fdr}{suggest(name, names)}"
            )
    return {
        "extractor_file": spec.extractor_file and str(absolute_path(spec.extractor_file)),
        "fdr": names,
        "fdr_files": {name: str(absolute_path(file)) for name, file in spec.fdr_files.items()},
    }


def evaluation_points(preset: Sequence[int], steps: int) -> list[int]:
    """The evaluation points of a preset, continued by doubling, up to and including `steps`."""
    points = list(preset)
    while points[-1] * 2 <= steps:
        points.append(points[-1] * 2)
    return sorted({p for p in points if p < steps} | {steps})
