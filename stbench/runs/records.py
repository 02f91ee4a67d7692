"""Plain records of a run: what a run folder contains and all that `compare` sees. No torch, no I/O.

Units: progress in images seen, durations in seconds, cost in FLOPs (two per multiply-add).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 3
"""Version of every file in a new run folder."""
READABLE = (2, 3)
"""Versions that can be read. Version 2 has no checksums; a folder keeps the version it was created with."""


SHAPE = ("depth", "width", "heads", "patch")
"""Options of a backbone that the name of a size stands for."""


def size_name(size: str, options: Mapping[str, Any]) -> str:
    """The size of a network: "custom" if `options`, those that differ from the preset, change its shape."""
    return "custom" if any(name in options for name in SHAPE) else size


def network_name(backbone: Mapping[str, Any]) -> str:
    """The name of a network, with its shape if it is not that of a preset: "sit-custom (depth 3, width 96)".

    Args:
        backbone: The field `backbone` of spec.json.
    """
    effective = backbone.get("effective", {})
    size = size_name(backbone["size"], backbone.get("options", {}))
    name = f"{backbone['name']}-{size}"
    if size != "custom":
        return name
    shape = ", ".join(f"{key} {effective[key]}" for key in SHAPE if type(effective.get(key)) is int)
    return f"{name} ({shape})" if shape else name


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation of one stage's EMA weights under one protocol with one setting of guidance."""

    stage: str
    stage_index: int
    """0-based position of the stage in its recipe."""
    step: int
    """Optimiser steps of this stage."""
    images: int
    """Training images this stage has seen."""
    guidance: float
    """Classifier-free guidance scale; 1.0 means no guidance."""
    interval: tuple[float, float]
    """Flow-equivalent times between which guidance is on."""
    protocol: str
    """Hash of the evaluation protocol; its fields are in protocols.json."""
    metrics: Mapping[str, float]
    val_loss: Sequence[float]
    """The EMA's denoising loss on held-out images in 10 equal bins of t."""
    seconds: float
    """Training seconds of this stage so far, without evaluation."""
    flops: float
    """Training FLOPs of this stage so far, teachers included."""
    guides: str = ""
    """Guides besides classifier-free guidance, in the form of stbench.runs.guide_text; "" for none."""
    guide_cost: Mapping[str, float] = field(default_factory=dict)
    """What another network that guides cost to train: "images", "seconds" and "flops"; empty if there is none
    or it is not a run of stbench."""


@dataclass(frozen=True)
class StageRecord:
    """What a finished stage did and cost, including a stage that was reused from another run."""

    name: str
    index: int
    steps: int
    images: int
    seconds: float
    warmup_seconds: float
    """The share of `seconds` spent in the first step (compilation, allocation)."""
    flops_student: float
    flops_heads: float
    flops_teachers: float
    fingerprint: str
    sha256: Mapping[str, str]
    reused: bool

    @property
    def flops(self) -> float:
        """All training FLOPs of the stage."""
        return self.flops_student + self.flops_heads + self.flops_teachers


@dataclass(frozen=True)
class Environment:
    """Where a run was made. Not part of any hash."""

    versions: Mapping[str, str]
    device: str
    hardware: str
    git_revision: str
    git_dirty: bool
    plugins: Mapping[str, str] = field(default_factory=dict)
    """Plug-in file -> sha256."""


@dataclass(frozen=True)
class RunRecord:
    """The content of one run folder."""

    run_id: str
    path: str
    status: str
    """"finished", "running", "stopped" or "failed"."""
    dataset: str
    backbone: str
    """Family and size, such as "sit-ti/2"."""
    objective: str
    """Its name, with the options that differ from its defaults, such as "linear (shift=3.0)"."""
    recipe: str
    options: Mapping[str, Any]
    """Recipe options that differ from the defaults."""
    needs: str
    """What the recipe needs from outside the model; "" for nothing."""
    seed: int
    steps: int
    """Steps of the last stage."""
    batch: int
    precision: str
    setting_hash: str
    train_hash: str
    stages: Sequence[StageRecord]
    curve: Sequence[CurvePoint]
    protocols: Mapping[str, Mapping[str, Any]]
    spec: Mapping[str, Any]
    schema: int = SCHEMA
    """Version of the files in the folder."""

    @property
    def final_stage(self) -> int:
        """Index of the stage whose network is evaluated."""
        return int(self.spec["stage_count"]) - 1

    @property
    def final_points(self) -> list[CurvePoint]:
        """The evaluations of the last stage."""
        return [point for point in self.curve if point.stage_index == self.final_stage]

    @property
    def row_key(self) -> Hashable:
        """Identifies the leaderboard row: the same for two runs that differ only in their seed."""
        # Records without a row hash are grouped by the fields that the hash would cover.
        options = tuple(sorted((name, repr(value)) for name, value in self.options.items()))
        fields = (self.backbone, self.objective, self.recipe, options, self.steps, self.precision)
        return self.setting_hash, self.spec.get("row_hash", fields)

    @property
    def label(self) -> str:
        """Name of the leaderboard row: the recipe and the options that the user set."""
        return row_label(self.recipe, self.options)


def row_label(name: str, options: Mapping[str, Any]) -> str:
    """Return the name of a leaderboard row or an objective with its options: "taught (mask=released)"."""
    extra = ", ".join(f"{option}={value}" for option, value in sorted(options.items()))
    return f"{name} ({extra})" if extra else name
