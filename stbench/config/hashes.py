"""The hashes that decide which runs may share a leaderboard row or table (see docs/protocol.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stbench.config.spec import RunSpec, TrainSpec
from stbench.core.registry import BACKBONES, DATASETS, OBJECTIVES, RECIPES, lookup, plugin_hash


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
    spec: RunSpec,
    earlier_steps: Sequence[int],
    dataset_fingerprint: str,
    contents: Mapping[str, Any],
    unset: Collection[str] = (),
) -> Hashes:
    """Compute the hashes of a run.

    Args:
        spec: The resolved specification.
        earlier_steps: Steps of the stages before the last one.
        dataset_fingerprint: Hash of the training data.
        contents: For recipe options that name files, the value that replaces the path in the hashes.
        unset: Recipe options that are left out, because earlier versions lacked them and they change nothing.
    """
    setting = setting_fields(spec, dataset_fingerprint)
    options = {name: value for name, value in spec.recipe.effective.items() if name not in unset}
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
    plugins = {
        "objective_plugin": plugin_hash(lookup(OBJECTIVES, spec.objective)),
        "dataset_plugin": plugin_hash(lookup(DATASETS, spec.dataset)),
    }
    options = {"objective_options": spec.objective_options} if spec.objective_options else {}
    return (
        init
        | {name: sha256 for name, sha256 in plugins.items() if sha256}
        | options
        | {
            "dataset": dataset_fingerprint,
            "backbone": spec.backbone.model_dump(include={"name", "size", "effective"}),
            "backbone_plugin": plugin_hash(lookup(BACKBONES, spec.backbone.name)),
            "objective": spec.objective,
            "train": _train_fields(spec.train),
        }
    )


def _train_fields(train: TrainSpec) -> dict[str, Any]:
    """The training settings that change a weight, with the values that earlier versions hashed.

    "auto" counts as "off": like the device that it depends on, it changes the last bits only. Checkpointing
    and the second average change nothing.
    """
    fields = train.model_dump(exclude={"steps", "save_every", "checkpointing", "posthoc_ema"})
    fields["compile"] = train.compile == "on"
    if train.teacher_precision == "fp32":
        del fields["teacher_precision"]
    return fields
