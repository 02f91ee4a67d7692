"""Evaluation points: the evaluation protocol, and the curve rows of a network at one step."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from stbench.config.build import build_objective
from stbench.config.plan import PlannedStage, PreparedRun
from stbench.config.spec import EvalSpec
from stbench.core.backbone import Backbone
from stbench.core.registry import SAMPLERS, lookup, plugin_hash
from stbench.core.world import ALONE, World
from stbench.data.dataset import Dataset
from stbench.diffusion.guidance import Guidance
from stbench.evaluate.extractors import extractor_hash, ratio_extractors, run_extractor, tensors_hash
from stbench.evaluate.fdr import frechet_ratio
from stbench.evaluate.generate import generate, save_grid, validation_loss
from stbench.evaluate.guides import LoadedGuides, stage_guides
from stbench.evaluate.metrics import BASIC_METRICS, EXTRA_METRICS, compute_metrics, try_metrics
from stbench.evaluate.registered_metrics import metric_hashes
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
    """ "ema", or "ema DECAY (post hoc)" for a decay that was reconstructed after training."""
    plugins: Mapping[str, str] = field(default_factory=dict)
    """Code of plug-ins that the run's own hashes do not cover: what it provides -> sha256."""
    fdr: Mapping[str, str] = field(default_factory=dict)
    """Extractors of FDr -> hash of their weights."""

    def fields(self) -> dict[str, Any]:
        """All fields as plain data; `plugins` and `fdr` only if there are any."""
        optional = ("plugins", "fdr")
        return {name: value for name, value in asdict(self).items() if name not in optional or value}

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
        plugins={**changed, **({"sampler": sampler} if sampler else {}), **metric_hashes(settings.metrics)},
        fdr={name: extractor_hash(e)[:16] for name, e in ratio_extractors(dataset, settings).items()},
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
        world: World = ALONE,
        changed: Mapping[str, str] = MappingProxyType({}),
        weights: str = "ema",
    ) -> None:
        """Prepare the evaluation of weights that the protocol calls `weights`.

        `changed` are parts of the run from plug-ins that differ from the recorded ones: kind -> sha256.
        """
        self._spec, self._stage, self._folder = prepared.spec, stage, folder
        self._dataset, self._device, self._world = dataset, device, world
        self._cache = OutputFolder(folder.path.parent).reference_statistics
        self._objective = build_objective(prepared.spec.objective, prepared.spec.objective_options)
        self.protocol = protocol_of(dataset, prepared.spec.eval, weights, changed=changed)
        self._guides = stage_guides(prepared, stage, device, folder.path)
        self._extractor = run_extractor(dataset, prepared.spec.eval)
        self._ratio_extractors = ratio_extractors(dataset, prepared.spec.eval)
        world.from_main(
            lambda: try_metrics(dataset, prepared.spec.eval, self._extractor, self._cache, device)
        )

    def evaluate(self, ema: Backbone, step: int, *, seconds: float, flops: float) -> list[CurvePoint]:
        """Evaluate at every setting of guidance that is due at this step.

        Args:
            ema: The network, in eval mode on the device.
            step: Optimiser steps of the stage.
            seconds: Training seconds of the stage so far.
            flops: Training FLOPs of the stage so far.

        Returns:
            The rows that were added to the curve; none if all were there already.
        """
        settings, extras = self._spec.eval, self._extras_due(step)
        due = [(scale, LoadedGuides()) for scale in (settings.guidance if extras else [1.0])]
        if extras and self._guides.text:
            due += [(scale, self._guides) for scale in settings.guidance]
        evaluated = self._world.from_main(lambda: self._evaluated(step))
        missing = [(scale, guides) for scale, guides in due if (scale, guides.text) not in evaluated]
        if not missing:
            return []
        val_loss = validation_loss(
            ema, self._objective, self._dataset, seed=settings.seed, device=self._device, world=self._world
        )
        points = []
        for scale, guides in missing:
            points.append(
                CurvePoint(
                    stage=self._stage.name,
                    stage_index=self._stage.index,
                    step=step,
                    images=step * self._spec.train.batch,
                    guidance=scale,
                    interval=settings.interval,
                    protocol=self.protocol.hash,
                    metrics=self._measure(ema, step, scale, guides, extras),
                    val_loss=val_loss,
                    seconds=seconds,
                    flops=flops,
                    guides=guides.text,
                    guide_cost=guides.cost,
                )
            )
        self._world.from_main(lambda: self._append(points))
        return points

    def _append(self, points: Sequence[CurvePoint]) -> None:
        """Write the rows to the run folder."""
        self._folder.add_protocol(self.protocol.hash, self.protocol.fields())
        self._folder.append_points(points)

    def _extras_due(self, step: int) -> bool:
        """Whether the guidance grid and the slow metrics are evaluated at this step."""
        extras, is_last = self._spec.eval.extras, self._stage.is_last
        named = isinstance(extras, list) and is_last and step in extras
        return extras == "all" or named or (is_last and step == self._stage.steps)

    def _evaluated(self, step: int) -> set[tuple[float, str]]:
        """Guidance scales and guides that the curve already contains for this step, interval and protocol."""
        where = (self._stage.index, step, tuple(self._spec.eval.interval), self.protocol.hash)
        return {
            (point.guidance, point.guides)
            for point in self._folder.points()
            if (point.stage_index, point.step, tuple(point.interval), point.protocol) == where
        }

    def _measure(
        self, ema: Backbone, step: int, scale: float, guides: LoadedGuides, extras: bool
    ) -> dict[str, float]:
        """Generate images with one setting of guidance, store a grid of them, and compute the metrics."""
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
            guidance=Guidance(scale, *settings.interval, channels=settings.channels, guides=guides.guides),
            device=self._device,
            world=self._world,
        )
        return self._world.from_main(
            lambda: self._measure_images(images, labels, finite, step, scale, guides.text, extras)
        )

    def _measure_images(
        self,
        images: Tensor,
        labels: Tensor,
        finite: bool,
        step: int,
        scale: float,
        guides: str,
        extras: bool,
    ) -> dict[str, float]:
        """Store a grid of the images and compute their metrics, on rank 0."""
        settings = self._spec.eval
        columns = self._dataset.classes if settings.labels == "balanced" else 10
        if self.protocol.weights == "ema":  # a step has one picture per setting of guidance
            stage = self._stage
            picture = self._folder.sample_file(stage.index, stage.name, step, scale, guides)
            save_grid(images[: 10 * columns], picture, columns)
        names = (*BASIC_METRICS, *(EXTRA_METRICS if extras else ()), *settings.metrics)
        metrics = compute_metrics(
            images,
            self._dataset,
            names,
            cache_dir=self._cache,
            labels=labels,
            device=self._device,
            extractor=self._extractor,
            batch=settings.extractor_batch,
            seed=settings.seed,
        )
        if extras and self._ratio_extractors:
            metrics |= frechet_ratio(
                images,
                self._dataset,
                self._ratio_extractors,
                cache_dir=self._cache,
                device=self._device,
                batch=settings.extractor_batch,
            )
        # Metrics of images that were decoded from NaN would look like numbers.
        return metrics if finite else dict.fromkeys(metrics, math.nan)
