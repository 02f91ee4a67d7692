"""Evaluation points: the evaluation protocol, and the curve rows of a network at one step."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from stbench.config.build import build_objective
from stbench.config.plan import PlannedStage, PreparedRun
from stbench.config.spec import EvalSpec
from stbench.core.backbone import Backbone
from stbench.core.registry import SAMPLERS, lookup, plugin_hash
from stbench.data.dataset import Dataset
from stbench.diffusion.guidance import Guidance
from stbench.evaluate.extractors import extractor_hash, run_extractor, tensors_hash
from stbench.evaluate.generate import generate, save_grid, validation_loss
from stbench.evaluate.metrics import BASIC_METRICS, EXTRA_METRICS, compute_metrics
from stbench.evaluate.past_run import PastRun
from stbench.models.autoencoder import ROUNDING
from stbench.runs.folder import OutputFolder, RunFolder
from stbench.runs.records import CurvePoint


@dataclass(frozen=True)
class Protocol:
    """Everything besides the network that changes a metric. Guidance is not part of it: it is a column."""

    reference: str
    """Main reference set: data set, name and hash of its images."""
    extractor: str
    """Name of the feature extractor and hash of its weights."""
    samples: int
    labels: str
    """ "balanced" or "random"."""
    seed: int
    sampler: str
    steps: int
    channels: int | None
    """Number of leading latent channels that are guided; None for all."""
    decoder: str
    """Hash of the decoder's weights."""
    rounding: str
    weights: str
    """ "ema" or "raw"."""
    plugins: Mapping[str, str] = field(default_factory=dict)
    """Code of plug-ins that the run's own hashes do not cover: what it provides -> sha256."""

    def fields(self) -> dict[str, Any]:
        """All fields as plain data; `plugins` only if there are any."""
        return {name: value for name, value in asdict(self).items() if name != "plugins" or value}

    @property
    def hash(self) -> str:
        """Hash of all fields, 8 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.fields(), sort_keys=True).encode()).hexdigest()[:8]


def protocol_of(
    dataset: Dataset,
    settings: EvalSpec,
    weights: str = "ema",
    *,
    changed: Mapping[str, str] = MappingProxyType({}),
) -> Protocol:
    """The protocol of evaluation settings on a data set.

    `changed` are parts of the run from plug-ins that differ from the recorded ones: kind -> sha256.
    """
    extractor = run_extractor(dataset, settings)
    images = dataset.references["train"]()
    sampler = plugin_hash(lookup(SAMPLERS, settings.sampler))[:16]
    return Protocol(
        reference=f"{dataset.name}/train {tensors_hash([images])[:16]}",
        extractor=f"{settings.extractor or dataset.extractor} {extractor_hash(extractor)[:16]}",
        samples=settings.samples,
        labels=settings.labels,
        seed=settings.seed,
        sampler=settings.sampler,
        steps=settings.steps,
        channels=settings.channels,
        decoder=dataset.decoder[:16],
        rounding=ROUNDING,
        weights=weights,
        plugins={**changed, **({"sampler": sampler} if sampler else {})},
    )


class PointEvaluator:
    """Evaluates the EMA network of a stage at its points and appends the missing rows to the curve."""

    def __init__(
        self,
        prepared: PreparedRun,
        stage: PlannedStage,
        folder: RunFolder,
        *,
        dataset: Dataset,
        device: torch.device,
        changed: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`changed` are parts of the run from plug-ins that differ from the recorded ones: kind -> sha256."""
        self._spec, self._stage, self._folder = prepared.spec, stage, folder
        self._dataset, self._device = dataset, device
        self._cache = OutputFolder(folder.path.parent).reference_statistics
        self._objective = build_objective(prepared.spec.objective)
        self.protocol = protocol_of(dataset, prepared.spec.eval, changed=changed)
        self._extractor = run_extractor(dataset, prepared.spec.eval)

    def evaluate(self, ema: Backbone, step: int, *, seconds: float, flops: float) -> list[CurvePoint]:
        """Evaluate at every guidance scale that is due at this step.

        Args:
            ema: The network, in eval mode on the device.
            step: Optimiser steps of the stage.
            seconds: Training seconds of the stage so far.
            flops: Training FLOPs of the stage so far.

        Returns:
            The rows that were added to the curve; none if all were there already.
        """
        settings, extras = self._spec.eval, self._extras_due(step)
        scales = settings.guidance if extras else [1.0]
        missing = [scale for scale in scales if scale not in self._evaluated_scales(step)]
        if not missing:
            return []
        val_loss = validation_loss(
            ema, self._objective, self._dataset, seed=settings.seed, device=self._device
        )
        points = []
        for scale in missing:
            points.append(
                CurvePoint(
                    stage=self._stage.name,
                    stage_index=self._stage.index,
                    step=step,
                    images=step * self._spec.train.batch,
                    guidance=scale,
                    interval=settings.interval,
                    protocol=self.protocol.hash,
                    metrics=self._measure(ema, step, scale, extras),
                    val_loss=val_loss,
                    seconds=seconds,
                    flops=flops,
                )
            )
        self._folder.add_protocol(self.protocol.hash, self.protocol.fields())
        self._folder.append_points(points)
        return points

    def _extras_due(self, step: int) -> bool:
        """Whether the guidance grid and the slow metrics are evaluated at this step."""
        extras, is_last = self._spec.eval.extras, self._stage.is_last
        named = isinstance(extras, list) and is_last and step in extras
        return extras == "all" or named or (is_last and step == self._stage.steps)

    def _evaluated_scales(self, step: int) -> set[float]:
        """Guidance scales that the curve already contains for this step, interval and protocol."""
        where = (self._stage.index, step, tuple(self._spec.eval.interval), self.protocol.hash)
        return {
            point.guidance
            for point in self._folder.points()
            if (point.stage_index, point.step, tuple(point.interval), point.protocol) == where
        }

    def _measure(self, ema: Backbone, step: int, scale: float, extras: bool) -> dict[str, float]:
        """Generate images at one guidance scale, store a grid of them, and compute the metrics."""
        settings = self._spec.eval
        images, labels, finite = generate(
            ema,
            self._objective,
            self._dataset,
            n=settings.samples,
            labels=settings.labels,
            seed=settings.seed,
            sampler=settings.sampler,
            steps=settings.steps,
            guidance=Guidance(scale, *settings.interval, channels=settings.channels),
            device=self._device,
        )
        columns = self._dataset.classes if settings.labels == "balanced" else 10
        picture = self._folder.sample_file(self._stage.index, self._stage.name, step, scale)
        save_grid(images[: 10 * columns], picture, columns)
        names = BASIC_METRICS + (EXTRA_METRICS if extras else ())
        metrics = compute_metrics(
            images,
            self._dataset,
            names,
            cache_dir=self._cache,
            labels=labels,
            device=self._device,
            extractor=self._extractor,
            batch=settings.extractor_batch,
        )
        # Metrics of images that were decoded from NaN would look like numbers.
        return metrics if finite else dict.fromkeys(metrics, math.nan)


def evaluate_again(run: PastRun, settings: EvalSpec, device: torch.device) -> Sequence[CurvePoint]:
    """Evaluate the stored weights of a run's last stage under other settings; returns the added rows."""
    spec = run.prepared.spec.model_copy(update={"eval": settings})
    prepared, stage = replace(run.prepared, spec=spec), run.last_stage
    known = {(p.stage_index, p.step): p for p in run.folder.record().curve}
    added: list[CurvePoint] = []
    with run.folder.lock():
        dataset = prepared.dataset.to(device)
        evaluator = PointEvaluator(
            prepared, stage, run.folder, dataset=dataset, device=device, changed=run.changed
        )
        for step, file in run.point_files().items():
            before = known.get((stage.index, step))
            if before is not None:  # only points that training has reached have a cost
                network = run.load(file).to(device)
                added += evaluator.evaluate(network, step, seconds=before.seconds, flops=before.flops)
    return added
