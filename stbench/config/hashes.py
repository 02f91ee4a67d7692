"""The hashes that decide which runs may share a leaderboard row or table (see docs/protocol.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stbench.config.spec import RunSpec
from stbench.core.registry import BACKBONES, OBJECTIVES, RECIPES, lookup, plugin_hash


def fingerprint(value: Any) -> str:
    """The sha256 of the canonical JSON of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Hashes:
    """The hashes of a run, 8 hexadecimal digits each."""

    train: str
    """Everything that changes a weight except the length of the last stage."""
    row: str
    """Everything that changes a weight except the seed: equal for the seeds of one row."""
    setting: str
    """Everything that changes a weight except recipe, its options, seed and steps: equal in a table."""


def hashes(
    spec: RunSpec, earlier_steps: Sequence[int], dataset_fingerprint: str, contents: Mapping[str, Any]
) -> Hashes:
    """Compute the hashes of a run.

    Args:
        spec: The resolved specification.
        earlier_steps: Steps of the stages before the last one.
        dataset_fingerprint: Hash of the training data.
        contents: For recipe options that name files, the value that replaces the path in the hashes.
    """
    setting = setting_fields(spec, dataset_fingerprint)
    options = spec.recipe.effective
    recipe = {
        "name": spec.recipe.name,
        "options": {k: v if v is None else contents.get(k, v) for k, v in options.items()},
        "plugin": plugin_hash(lookup(RECIPES, spec.recipe.name)),
        "earlier_steps": list(earlier_steps),
    }
    return Hashes(
        train=fingerprint([setting, recipe, spec.seed])[:8],
        row=fingerprint([setting, recipe, spec.train.steps])[:8],
        setting=fingerprint(setting)[:8],
    )


def setting_fields(spec: RunSpec, dataset_fingerprint: str) -> dict[str, Any]:
    """Everything besides the recipe, the seed and the steps that changes a weight."""
    # Keys that most runs lack are added only where they apply, so that other hashes stay.
    init = {} if spec.init is None else {"init": spec.init.sha256}
    objective = plugin_hash(lookup(OBJECTIVES, spec.objective))
    plugin = {"objective_plugin": objective} if objective else {}
    return (
        init
        | plugin
        | {
            "dataset": dataset_fingerprint,
            "backbone": spec.backbone.model_dump(include={"name", "size", "effective"}),
            "backbone_plugin": plugin_hash(lookup(BACKBONES, spec.backbone.name)),
            "objective": spec.objective,
            "train": spec.train.model_dump(exclude={"steps", "save_every"}),
        }
    )
