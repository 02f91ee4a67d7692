"""The loop over the steps of one stage: reuse or train it, evaluate it at its points, leave an artifact.

Everything random is keyed by the number of images seen, and the training state is saved before an evaluation
begins. A stage that is killed at any moment and started again therefore ends with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from stbench.config.build import build_backbone, build_objective
from stbench.config.init_from import load_start
from stbench.config.plan import PlannedStage, PreparedRun
from stbench.core.backbone import Backbone, Weights
from stbench.core.errors import UserError
from stbench.core.recipe import Artifact, Cost
from stbench.core.rng import key, seeded_globals
from stbench.data.dataset import Dataset
from stbench.evaluate.points import PointEvaluator
from stbench.models.weights import load_weights, require_finite, save_weights
from stbench.runs.folder import OutputFolder, RunFolder
from stbench.runs.records import StageRecord
from stbench.train.divergence import LossMonitor, diverged, first_bad_tensor
from stbench.train.hooks import Hook
from stbench.train.interrupt import Interrupt
from stbench.train.state import TrainingState, load_state, publish_artifact, reuse_artifact, save_state
from stbench.train.step import StageModel, make_optimizer, training_step

Keep = Literal["all", "last"]

CHECK_EVERY = 50
"""Steps between checks that the losses are finite, besides every save; each synchronises the device."""


class Interrupted(Exception):
    """Training was stopped by Ctrl-C or SIGTERM. Everything is saved; the same command resumes."""


@dataclass(frozen=True)
class RunOptions:
    """Where and on what a run is made. None of this enters a hash."""

    output: Path
    device: torch.device = torch.device("cpu")
    keep: Keep = "all"
    """EMA weights to keep: of all evaluation points, or of the last one."""
    reuse: bool = True
    """Whether finished stages of other runs are reused."""
    plugins: Mapping[str, str] = field(default_factory=dict)
    """Plug-in file -> its sha256."""


class StageTrainer:
    """Trains one stage of one run, or reuses an equal one."""

    def __init__(
        self,
        prepared: PreparedRun,
        stage: PlannedStage,
        *,
        dataset: Dataset,
        folder: RunFolder,
        options: RunOptions,
        hooks: Sequence[Hook],
        interrupt: Interrupt,
        earlier: Mapping[str, Artifact],
    ) -> None:
        """`dataset` is the run's data set on the device; `earlier` are the artifacts of earlier stages."""
        self._spec, self._stage, self._dataset = prepared.spec, stage, dataset
        self._run_folder, self._folder = folder, folder.stage(stage.index, stage.name)
        self._output = OutputFolder(options.output)
        self._options, self._hooks, self._interrupt = options, hooks, interrupt
        self._earlier = earlier
        self._evaluator = PointEvaluator(prepared, stage, folder, dataset=dataset, device=options.device)
        self._state, self._losses = TrainingState(), LossMonitor()

    def execute(self) -> Artifact:
        """Return the stage's artifact: already recorded, reused from another run, or trained now."""
        records = {record.index: record for record in self._run_folder.stages()}
        record = records.get(self._stage.index)
        if record is None or record.fingerprint != self._stage.fingerprint:
            record = self._reuse() or self._train()
            self._run_folder.add_stage(record)
        for hook in self._hooks:
            hook.on_stage_end(self._stage, record)
        return self._artifact(record)

    def _reuse(self) -> StageRecord | None:
        """Reuse an equal stage that another run has finished, and evaluate it here; None if there is none.

        The last stage is always trained: its curve needs the weights of every point, and continuing it needs
        its training state.
        """
        if self._stage.is_last or self._folder.states() or not self._options.reuse:
            return None
        record = reuse_artifact(self._output, self._folder, self._stage.fingerprint)
        if record is None:
            return None
        for kind, sha256 in record.sha256.items():
            self._folder.record_weights(kind, record.steps, sha256)
        for hook in self._hooks:
            hook.on_stage(self._stage, self._stage.steps)
        ema = self._load("ema", record.sha256["ema"]).to(self._options.device)
        self._evaluate(ema, self._stage.steps, seconds=record.seconds, flops=record.flops)
        return replace(record, name=self._stage.name, index=self._stage.index, reused=True)

    def _artifact(self, record: StageRecord) -> Artifact:
        return Artifact(
            name=self._stage.name,
            fingerprint=self._stage.fingerprint,
            checkpoint=str(self._folder.path),
            sha256=record.sha256,
            steps=record.steps,
            images_seen=record.images,
            seconds=record.seconds,
            flops=record.flops,
            loader=lambda weights: self._load(weights, record.sha256[weights]),
        )

    def _load(self, weights: Weights, sha256: str) -> Backbone:
        """The network with the final weights of this stage, on the host."""
        network = build_backbone(self._spec.backbone, self._spec.objective, self._dataset)
        file = self._folder.weights(weights, self._stage.steps)
        state = load_weights(file, sha256)
        require_finite(state, str(file), "delete the run folder and train it with a smaller learning rate")
        network.load_state_dict(state)
        return network

    def _train(self) -> StageRecord:
        """Train from the last saved state to the last step of the stage."""
        # Build, and restore the last saved state.
        stage, train, device = self._stage, self._spec.train, self._options.device
        with seeded_globals(self._spec.seed, "setup", device=device):  # for plug-ins that draw in `setup`
            model = self._build()
        optimizer = make_optimizer(model.trained_parameters(), train, device)
        self._folder.path.mkdir(parents=True, exist_ok=True)
        self._state = load_state(self._folder, _networks(model), optimizer) or TrainingState()
        model.cost = Cost(**self._state.cost)
        for hook in self._hooks:
            hook.on_stage(stage, self._state.step)
        if self._state.step in stage.points:  # the process may have died during this evaluation
            self._evaluate_point(model)

        # Train.
        while self._state.step < stage.steps:
            started = time.perf_counter()
            losses = training_step(
                model,
                optimizer,
                self._dataset,
                train,
                seed=self._spec.seed,
                step=self._state.step,
                device=device,
            )
            self._count_step(model, started, losses)
            self._after_step(model, optimizer)

        # Leave the final weights, and offer them to other runs.
        record = self._record(model)
        publish_artifact(self._output, self._folder, record)
        return record

    def _build(self) -> StageModel:
        """The networks of the stage with their initial weights, on the device."""
        spec, stage = self._spec, self._stage
        seed = key(spec.seed, "backbone")
        student = build_backbone(spec.backbone, spec.objective, self._dataset, seed=seed)
        if stage.definition.init == "previous":
            assert self._earlier, "the first stage has no previous one"
            previous = list(self._earlier.values())[-1]
            student.load_state_dict(previous.load("ema").state_dict())
        elif spec.init is not None and stage.index == 0:
            load_start(student, spec.init, spec.objective)
        model = StageModel(
            student,
            stage.definition.supervision(self._earlier),
            build_objective(spec.objective),
            seed=spec.seed,
            dataset_size=self._dataset.size,
        )
        model.prepare(self._options.device, spec.train.compile)
        return model

    def _count_step(self, model: StageModel, started: float, losses: Mapping[str, torch.Tensor]) -> None:
        """Advance the counters. Reading losses synchronises the device, so it is done only where needed."""
        step = self._state.step + 1
        norm = {} if model.gradient_norm is None else {"gradient norm": model.gradient_norm}
        self._losses.add(step, {**losses, **norm})
        wanted = [hook for hook in self._hooks if hook.wants(step, self._stage)]
        if wanted or step % CHECK_EVERY == 0:
            self._require_finite_losses()
            values = {name: float(value) for name, value in losses.items()}
            for hook in self._hooks:
                hook.on_step(self._stage, step, values)
        took = time.perf_counter() - started
        self._state = replace(
            self._state,
            step=step,
            seconds=self._state.seconds + took,
            warmup_seconds=self._state.warmup_seconds + (took if step == 1 else 0.0),
            cost=asdict(model.cost),
        )

    def _require_finite_losses(self) -> None:
        """Raise UserError if a loss or a gradient since the last call was not finite."""
        bad = self._losses.first_bad()
        if bad is not None:
            values = ", ".join(f"{name}={value:g}" for name, value in bad[1].items())
            raise self._diverged(f"loss or gradient is not finite at step {bad[0]} ({values})")

    def _require_finite_state(self, model: StageModel, optimizer: torch.optim.Optimizer) -> None:
        """Raise UserError if weights or optimiser contain values that are not finite."""
        bad = first_bad_tensor(_networks(model), optimizer)
        if bad is not None:
            raise self._diverged(f"the weights are not finite after step {self._state.step} ({bad})")

    def _diverged(self, reason: str) -> UserError:
        return diverged(
            f"{reason} of stage '{self._stage.name}'",
            run=self._run_folder.path,
            folder=self._folder,
            is_last=self._stage.is_last,
            lr=self._spec.train.lr,
        )

    def _after_step(self, model: StageModel, optimizer: torch.optim.Optimizer) -> None:
        """Save, stop and evaluate where these are due, in this order."""
        step = self._state.step
        at_point, stop = step in self._stage.points, self._interrupt.requested
        if at_point or stop or step % self._spec.train.save_every == 0 or step == self._stage.steps:
            self._synchronise()
            self._require_finite_losses()
            self._require_finite_state(model, optimizer)
            save_state(self._folder, self._state, _networks(model), optimizer)
        if stop:
            raise Interrupted(str(self._run_folder.path))
        if at_point:
            self._evaluate_point(model)

    def _synchronise(self) -> None:
        """Wait for the device and count the time, so that seconds include all launched work."""
        if self._options.device.type == "cuda":
            started = time.perf_counter()
            torch.cuda.synchronize()
            self._state = replace(self._state, seconds=self._state.seconds + time.perf_counter() - started)

    def _evaluate_point(self, model: StageModel) -> None:
        """Store the EMA weights of this point and evaluate them."""
        step = self._state.step
        self._store("ema", step, model.ema)
        if self._options.keep == "last":
            for other, file in self._folder.weight_files("ema").items():
                if other != step:
                    file.unlink()
            self._folder.forget_missing()
        self._evaluate(model.ema, step, seconds=self._state.seconds, flops=model.cost.total)

    def _evaluate(self, ema: Backbone, step: int, *, seconds: float, flops: float) -> None:
        for point in self._evaluator.evaluate(ema, step, seconds=seconds, flops=flops):
            for hook in self._hooks:
                hook.on_point(self._stage, point)

    def _store(self, kind: Weights, step: int, network: torch.nn.Module) -> str:
        """Write the weights of a step and record their sha256, which is returned."""
        sha256 = save_weights(network.state_dict(), self._folder.weights(kind, step))
        self._folder.record_weights(kind, step, sha256)
        return sha256

    def _record(self, model: StageModel) -> StageRecord:
        """Store the final weights and describe the finished stage."""
        steps = self._stage.steps
        sha256 = {
            "raw": self._store("raw", steps, model.student),
            "ema": self._store("ema", steps, model.ema),
        }
        return StageRecord(
            name=self._stage.name,
            index=self._stage.index,
            steps=steps,
            images=self._stage.images,
            seconds=self._state.seconds,
            warmup_seconds=self._state.warmup_seconds,
            flops_student=model.cost.student,
            flops_heads=model.cost.heads,
            flops_teachers=model.cost.teachers,
            fingerprint=self._stage.fingerprint,
            sha256=sha256,
            reused=False,
        )


def _networks(model: StageModel) -> dict[str, torch.nn.Module]:
    return {"student": model.student, "heads": model.heads, "ema": model.ema}
