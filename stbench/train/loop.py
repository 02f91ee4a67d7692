"""One stage of one run: reuse it, or resume and train it, evaluate it at its points, leave an artifact.

Everything random is keyed by images seen, and the training state is saved before an evaluation begins, so a
stage that is killed anywhere and started again ends with the same bits.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from stbench.config import init_from as initial
from stbench.config.build import build_backbone, build_objective
from stbench.config.plan import StageJob, stage_fingerprint
from stbench.config.spec import RunSpec
from stbench.core.backbone import Backbone, Weights
from stbench.core.errors import UserError
from stbench.core.recipe import Artifact, Cost
from stbench.core.rng import Rng, key
from stbench.data.dataset import Dataset
from stbench.evaluate.points import Evaluation
from stbench.models.weights import load_weights, save_weights
from stbench.runs.folder import RunFolder
from stbench.runs.records import StageRecord
from stbench.train import step as stages
from stbench.train.interrupt import Interrupt
from stbench.train.progress import Hook
from stbench.train.state import TrainingState, load_state, read_artifact, save_state, write_artifact

Keep = Literal["all", "last"]


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: everything is saved, and the same command goes on."""


@dataclass(frozen=True)
class Options:
    """Where and on what a run is made: in no hash."""

    output: Path
    device: torch.device = torch.device("cpu")
    keep: Keep = "all"
    reuse: bool = True
    plugins: Mapping[str, str] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        """Finished stages by fingerprint, shared by the runs under one output folder."""
        return self.output / ".artifacts"

    @property
    def cache(self) -> Path:
        """Reference statistics."""
        return self.output / ".cache"


class StageRun:
    """One stage of one run: reuse it, or resume and train it, evaluate at its points, leave an artifact."""

    def __init__(
        self,
        job: StageJob,
        spec: RunSpec,
        dataset: Dataset,
        folder: RunFolder,
        options: Options,
        hooks: Sequence[Hook],
        interrupt: Interrupt,
        earlier: Mapping[str, Artifact],
    ) -> None:
        self.job, self.spec, self.dataset, self.folder = job, spec, dataset, folder
        self.options, self.hooks, self.interrupt = options, hooks, interrupt
        self.recipe = job.stage.supervision(earlier)
        self.previous = list(earlier.values())[-1] if earlier else None
        self.fingerprint = stage_fingerprint(job, self.recipe, spec, dataset.fingerprint, self.previous)
        self.place = folder.path / "checkpoints" / f"{job.index}-{job.name}"
        self.evaluation = Evaluation(job, spec, dataset, folder, options.cache, options.device)
        self.state = TrainingState()

    def execute(self) -> Artifact:
        """The stage's artifact, by the shortest way that gives the same bits."""
        record = next((r for r in self.folder.stages() if r.index == self.job.index), None)
        if record is None or record.fingerprint != self.fingerprint:
            record = self._reuse() or self._train()
            self.folder.add_stage(record)
        for hook in self.hooks:
            hook.on_stage_end(self.job, record)
        return self._artifact(record)

    def _reuse(self) -> StageRecord | None:
        """The record of an equal stage that another run has finished, its weights linked into this folder.

        Not for the last stage: its curve needs the weights of every point, and going on needs its state.
        """
        source = self.options.store / self.fingerprint[:16]
        begun = any(self.place.glob("state-*"))
        if self.job.last or begun or not self.options.reuse or not source.is_dir():
            return None
        record = read_artifact(source)
        self.place.mkdir(parents=True, exist_ok=True)
        for weights in ("raw", "ema"):
            load_weights(source / f"{weights}.safetensors", record.sha256[weights])
            _link(source / f"{weights}.safetensors", self._weights_file(weights, self.job.steps))
        ema = self._load(self._weights_file("ema", self.job.steps), record.sha256["ema"])
        for hook in self.hooks:
            hook.on_stage(self.job, self.job.steps)
        self._evaluate(ema.to(self.options.device), self.job.steps, record.seconds, record.flops)
        return replace(record, name=self.job.name, index=self.job.index, reused=True)

    def _publish(self, record: StageRecord) -> None:
        """Offer the finished stage to later runs: a whole folder appears in the store, or none."""
        target = self.options.store / self.fingerprint[:16]
        if target.is_dir():
            return
        self.options.store.mkdir(exist_ok=True)
        draft = self.place / "artifact"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        for weights in ("raw", "ema"):
            _link(self._weights_file(weights, self.job.steps), draft / f"{weights}.safetensors")
        write_artifact(draft, record)
        try:
            draft.rename(target)
        except OSError:  # another process published the same stage first; its bits are the same
            shutil.rmtree(draft, ignore_errors=True)

    def _artifact(self, record: StageRecord) -> Artifact:
        def loader(weights: Weights) -> Backbone:
            return self._load(self._weights_file(weights, self.job.steps), record.sha256[weights])

        return Artifact(
            name=self.job.name,
            fingerprint=self.fingerprint,
            checkpoint=str(self.place),
            sha256=record.sha256,
            steps=record.steps,
            images_seen=record.images,
            seconds=record.seconds,
            flops=record.flops,
            loader=loader,
        )

    def _load(self, file: Path, sha256: str) -> Backbone:
        network = build_backbone(self.spec.backbone, self.spec.objective, self.dataset)
        network.load_state_dict(load_weights(file, sha256))
        return network

    def _weights_file(self, weights: str, step: int) -> Path:
        return self.place / f"{weights}-{step:08d}.safetensors"

    def _train(self) -> StageRecord:
        """Train from the last saved state to the stage's last step."""
        module, optimizer = self._build()
        self.place.mkdir(parents=True, exist_ok=True)
        self.state = load_state(self.place, _networks(module), optimizer) or TrainingState()
        module.cost = Cost(**self.state.cost)
        for hook in self.hooks:
            hook.on_stage(self.job, self.state.step)
        if self.state.step in self.job.points:  # killed between the checkpoint and the end of its evaluation
            self._point(module)
        while self.state.step < self.job.steps:
            self._step(module, optimizer)
            self._after_step(module, optimizer)
        sha256 = {
            "raw": save_weights(module.student.state_dict(), self._weights_file("raw", self.job.steps)),
            "ema": save_weights(module.ema.state_dict(), self._weights_file("ema", self.job.steps)),
        }
        record = self._record(module, sha256)
        self._publish(record)
        return record

    def _build(self) -> tuple[stages.StageModule, torch.optim.AdamW]:
        spec, device = self.spec, self.options.device
        student = build_backbone(spec.backbone, spec.objective, self.dataset, seed=key(spec.seed, "backbone"))
        if self.job.stage.init == "previous":
            assert self.previous is not None, "the first stage has no previous one"
            student.load_state_dict(self.previous.load("ema").state_dict())
        elif spec.init is not None and self.job.index == 0:
            initial.start_from(student, spec.init)
        objective = build_objective(spec.objective)
        module = stages.StageModule(student, self.recipe, objective, spec.seed, self.dataset.size)
        module.prepare(device, spec.train.compile)
        return module, stages.make_optimizer(module.trained(), spec.train, device)

    def _step(self, module: stages.StageModule, optimizer: torch.optim.Optimizer) -> None:
        """One optimiser step over the global batch, its micro-batches in order."""
        train, started = self.spec.train, time.perf_counter()
        step = self.state.step
        index = self.dataset.order(self.spec.seed, step * train.batch, train.batch)
        shape = (self.dataset.channels, self.dataset.input_size, self.dataset.input_size)
        size = train.batch // train.accumulate
        bounds = [
            (k * size, train.batch if k == train.accumulate - 1 else (k + 1) * size)
            for k in range(train.accumulate)
        ]
        optimizer.zero_grad(set_to_none=True)
        parts: dict[str, torch.Tensor] = {}
        for start, stop in bounds:
            rng = Rng(self.spec.seed, step * train.batch, train.batch, start, stop)
            rows = index[start:stop]
            latents = self.dataset.latents(rows, rng.normal("posterior", shape))
            labels = self.dataset.labels(rows)
            extras = {"images": self.dataset.images(rows)} if self.recipe.images else {}
            batch = stages.make_batch(
                latents, labels, rows, rng, train.label_drop, self.dataset.classes, extras
            )
            share = (stop - start) / train.batch
            with self._autocast():
                losses = module(batch)
            (losses.total * share).backward()
            for name, value in losses.parts.items():
                parts[name] = parts.get(name, torch.zeros_like(value)) + value * share
        if train.clip is not None:
            torch.nn.utils.clip_grad_norm_(module.trained(), train.clip)
        for group in optimizer.param_groups:
            group["lr"] = stages.learning_rate(train, step)
        optimizer.step()
        stages.update_ema(module.ema, module.student, stages.ema_decay(train, step))
        self._clock(module, started, parts)

    def _clock(self, module: stages.StageModule, started: float, parts: dict[str, torch.Tensor]) -> None:
        """Count the step; at log points read the scalars, which is the one synchronisation."""
        step = self.state.step + 1
        if any(hook.wants(step, self.job) for hook in self.hooks) or step % 50 == 0:
            values = {name: float(value) for name, value in parts.items()}
            if not all(abs(v) < float("inf") for v in values.values()):
                raise UserError(
                    f"loss is not finite at step {step} of stage '{self.job.name}' ({values}); "
                    f"try a smaller learning rate, --set train.lr={self.spec.train.lr / 2}"
                )
            for hook in self.hooks:
                hook.on_step(self.job, step, values)
        took = time.perf_counter() - started
        warmup = self.state.warmup_seconds + (took if step == 1 else 0.0)
        self.state = replace(
            self.state,
            step=step,
            seconds=self.state.seconds + took,
            warmup_seconds=warmup,
            cost=asdict(module.cost),
        )

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        device, precision = self.options.device, self.spec.train.precision
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def _after_step(self, module: stages.StageModule, optimizer: torch.optim.Optimizer) -> None:
        step, due = self.state.step, self.state.step in self.job.points
        stop = self.interrupt.asked
        if due or stop or step % self.spec.train.save_every == 0 or step == self.job.steps:
            self._synchronise()
            save_state(self.place, self.state, _networks(module), optimizer)
        if stop:
            raise Interrupted(str(self.folder.path))
        if due:
            self._point(module)

    def _synchronise(self) -> None:
        if self.options.device.type == "cuda":
            started = time.perf_counter()
            torch.cuda.synchronize()
            self.state = replace(self.state, seconds=self.state.seconds + time.perf_counter() - started)

    def _point(self, module: stages.StageModule) -> None:
        """Keep the EMA weights of this point and evaluate them."""
        step = self.state.step
        save_weights(module.ema.state_dict(), self._weights_file("ema", step))
        if self.options.keep == "last":
            for old in self.place.glob("ema-*.safetensors"):
                if old != self._weights_file("ema", step):
                    old.unlink()
        self._evaluate(module.ema, step, self.state.seconds, module.cost.total)

    def _evaluate(self, ema: Backbone, step: int, seconds: float, flops: float) -> None:
        for point in self.evaluation.run(ema, step, seconds, flops):
            for hook in self.hooks:
                hook.on_point(self.job, point)

    def _record(self, module: stages.StageModule, sha256: Mapping[str, str]) -> StageRecord:
        return StageRecord(
            name=self.job.name,
            index=self.job.index,
            steps=self.job.steps,
            images=self.job.images,
            seconds=self.state.seconds,
            warmup_seconds=self.state.warmup_seconds,
            flops_student=module.cost.student,
            flops_heads=module.cost.heads,
            flops_teachers=module.cost.teachers,
            fingerprint=self.fingerprint,
            sha256=sha256,
            reused=False,
        )


def _networks(module: stages.StageModule) -> dict[str, torch.nn.Module]:
    return {"student": module.student, "heads": module.heads, "ema": module.ema}


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none; whatever was there is replaced."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
