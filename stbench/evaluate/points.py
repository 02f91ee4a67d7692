"""The evaluation protocol: what must agree before two numbers may stand in one table."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from stbench.config.build import build_objective
from stbench.config.plan import StageJob
from stbench.config.spec import EvalSpec, RunSpec
from stbench.core.backbone import Backbone
from stbench.data.dataset import Dataset
from stbench.diffusion.sample import Guidance
from stbench.evaluate.extractors import extractor_hash, get_extractor, tensors_hash
from stbench.evaluate.generate import generate, save_grid, validation_loss
from stbench.evaluate.metrics import BASIC_METRICS, EXTRA_METRICS, compute_metrics
from stbench.evaluate.past_run import PastRun, _cache
from stbench.models.autoencoder import ROUNDING
from stbench.runs.folder import RunFolder
from stbench.runs.records import CurvePoint


@dataclass(frozen=True)
class Protocol:
    """Every choice that moves a metric and is not the network; guidance is a column of the tables instead."""

    reference: str
    """Main reference set: data set, name and hash of its images."""
    extractor: str
    """Name and hash of its weights."""
    samples: int
    labels: str
    """ "balanced" or "random"."""
    seed: int
    sampler: str
    steps: int
    channels: int | None
    """Leading latent channels that guidance acts on; None for all."""
    decoder: str
    """Hash of the decoder's weights."""
    rounding: str
    weights: str
    """ "ema" or "raw"."""

    def fields(self) -> dict[str, Any]:
        """All fields as plain data."""
        return asdict(self)

    @property
    def hash(self) -> str:
        """8 hex digits over all fields."""
        return hashlib.sha256(json.dumps(self.fields(), sort_keys=True).encode()).hexdigest()[:8]


def protocol_of(
    dataset: Dataset,
    *,
    samples: int,
    labels: str,
    seed: int,
    sampler: str,
    steps: int,
    channels: int | None = None,
    weights: str = "ema",
) -> Protocol:
    """The protocol of these settings on a data set, with its reference, extractor and decoder filled in."""
    images = dataset.references["train"]()
    return Protocol(
        reference=f"{dataset.name}/train {tensors_hash([images])[:16]}",
        extractor=f"{dataset.extractor} {extractor_hash(get_extractor(dataset.extractor))[:16]}",
        samples=samples,
        labels=labels,
        seed=seed,
        sampler=sampler,
        steps=steps,
        channels=channels,
        decoder=dataset.decoder[:16],
        rounding=ROUNDING,
        weights=weights,
    )


def evaluate_again(run: PastRun, settings: EvalSpec, device: torch.device) -> list[CurvePoint]:
    """Evaluate the last stage's kept weights under changed evaluation settings; returns the rows added."""
    spec = run.spec.model_copy(update={"eval": settings})
    job, known = run.jobs[-1], {(p.stage_index, p.step): p for p in run.folder.points()}
    added = []
    with run.folder.lock():
        evaluation = Evaluation(job, spec, run.dataset.to(device), run.folder, _cache(run), device)
        for step, file in run.weights_at(job).items():
            before = known.get((job.index, step))
            if before is not None:
                added += evaluation.run(run.network(file).to(device), step, before.seconds, before.flops)
    return added


class Evaluation:
    """Evaluates the EMA at a point of a stage and writes the rows that the curve does not hold yet."""

    def __init__(
        self,
        job: StageJob,
        spec: RunSpec,
        dataset: Dataset,
        folder: RunFolder,
        cache: Path,
        device: torch.device,
    ) -> None:
        self._job, self._spec, self._dataset = job, spec, dataset
        self._folder, self._cache, self._device = folder, cache, device
        self._objective = build_objective(spec.objective)
        settings = spec.eval
        self.protocol = protocol_of(
            dataset,
            samples=settings.samples,
            labels=settings.labels,
            seed=settings.seed,
            sampler=settings.sampler,
            steps=settings.steps,
            channels=settings.channels,
        )

    def run(self, ema: Backbone, step: int, seconds: float, flops: float) -> list[CurvePoint]:
        """Evaluate at every scale due here; returns the new rows, none if all were there."""
        have = {
            (p.stage_index, p.step, p.guidance, tuple(p.interval), p.protocol) for p in self._folder.points()
        }
        settings = self._spec.eval
        last = self._job.last and step == self._job.steps
        named = isinstance(settings.extras, list) and self._job.last and step in settings.extras
        full = settings.extras == "all" or last or named
        scales = settings.guidance if full else [1.0]
        place = (self._job.index, step)
        due = [s for s in scales if (*place, s, tuple(settings.interval), self.protocol.hash) not in have]
        if not due:
            return []
        val_loss = validation_loss(
            ema, self._objective, self._dataset, seed=settings.seed, device=self._device
        )
        points = [self._point(ema, step, s, full, val_loss, seconds, flops) for s in due]
        self._folder.add_protocol(self.protocol.hash, self.protocol.fields())
        self._folder.append_points(points)
        return points

    def _point(
        self,
        ema: Backbone,
        step: int,
        scale: float,
        full: bool,
        val_loss: list[float],
        seconds: float,
        flops: float,
    ) -> CurvePoint:
        settings = self._spec.eval
        guidance = Guidance(scale, *settings.interval, channels=settings.channels)
        images, labels = generate(
            ema,
            self._objective,
            self._dataset,
            n=settings.samples,
            labels=settings.labels,
            seed=settings.seed,
            sampler=settings.sampler,
            steps=settings.steps,
            guidance=guidance,
            device=self._device,
        )
        name = f"{self._job.index}-{self._job.name}-{step:08d}-g{scale:g}.png"
        columns = self._dataset.classes if settings.labels == "balanced" else 10
        save_grid(images[: 10 * columns], self._folder.path / "samples" / name, columns)
        names = BASIC_METRICS + (EXTRA_METRICS if full else ())
        metrics = compute_metrics(
            images, self._dataset, names, cache_dir=self._cache, labels=labels, device=self._device
        )
        return CurvePoint(
            stage=self._job.name,
            stage_index=self._job.index,
            step=step,
            images=step * self._spec.train.batch,
            guidance=scale,
            interval=settings.interval,
            protocol=self.protocol.hash,
            metrics=metrics,
            val_loss=val_loss,
            seconds=seconds,
            flops=flops,
        )
