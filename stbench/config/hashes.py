"""The hashes that identify a run, a leaderboard row and a setting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stbench.config.spec import RunSpec
from stbench.core.registry import BACKBONES, RECIPES, lookup, plugin_hash


def fingerprint(value: Any) -> str:
    """sha256 of a plain value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Hashes:
    """8 hex digits each; docs/protocol.md lists the fields."""

    train: str
    """All that changes a weight but the length of the last stage."""
    row: str
    """`train` without the seed, with the length: what the seeds of one leaderboard row share."""
    setting: str
    """`train` without recipe, recipe options, earlier stages and seed: what the rows of one table share."""


def hashes(
    spec: RunSpec, earlier_steps: Sequence[int], dataset_fingerprint: str, contents: Mapping[str, Any]
) -> Hashes:
    """The run's hashes; `earlier_steps` are the lengths of the stages before the last, `contents` what stands
    for recipe options that name files.
    """
    resolved = spec.recipe.resolved
    setting = setting_fields(spec, dataset_fingerprint)
    recipe = {
        "name": spec.recipe.name,
        "options": {k: v if v is None else contents.get(k, v) for k, v in resolved.items()},
        "plugin": plugin_hash(lookup(RECIPES, spec.recipe.name)),
        "earlier_steps": list(earlier_steps),
    }
    return Hashes(
        train=fingerprint([setting, recipe, spec.seed])[:8],
        row=fingerprint([setting, recipe, spec.train.steps])[:8],
        setting=fingerprint(setting)[:8],
    )


def setting_fields(spec: RunSpec, dataset_fingerprint: str) -> dict[str, Any]:
    """What decides a weight besides the recipe and the seed."""
    train = spec.train.model_dump(exclude={"steps", "save_every"})
    started = {} if spec.init is None else {"init": spec.init.sha256}
    return started | {
        "dataset": dataset_fingerprint,
        "backbone": spec.backbone.model_dump(),
        "backbone_preset": dict(lookup(BACKBONES, spec.backbone.name).presets[spec.backbone.size]),
        "backbone_plugin": plugin_hash(lookup(BACKBONES, spec.backbone.name)),
        "objective": spec.objective,
        "train": train,
    }
