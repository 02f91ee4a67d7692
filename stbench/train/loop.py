"""The loop over the steps of one stage: reuse or train it, evaluate it at its points, leave an artifact.

Everything random is keyed by the number of images seen, and the training state is saved before an evaluation
begins. A stage that is killed at any moment and started again therefore ends with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch

from stbench.config.build import build_backbone, build_objective
from stbench.config.init_from import load_start
from stbench.config.plan import PlannedStage, PreparedRun
from stbench.core.backbone import Backbone, fit_heads, load_trunk
from stbench.core.errors import UserError
from stbench.core.recipe import Artifact, Cost
from stbench.core.rng import key, seeded_globals
from stbench.core.world import SharedStop
from stbench.data.dataset import Dataset
from stbench.evaluate.points import PointEvaluator
from stbench.evaluate.posthoc_ema import POSTHOC
from stbench.runs.folder import RunFolder
from stbench.runs.records import StageRecord
from stbench.train.blocks import eager
from stbench.train.divergence import LossMonitor, diverged, first_bad_tensor
from stbench.train.hooks import Hook
from stbench.train.interrupt import Interrupt
from stbench.train.options import RunOptions
from stbench.train.replica import has_unused_parameters, replicate
from stbench.train.sharding import is_sharded, whole, whole_network
from stbench.train.state import TrainingState, load_state, save_state, state_tensors
from stbench.train.step import StageModel, make_optimizer, training_step
from stbench.train.store import StageStore

CHECK_EVERY = 50
"""Steps between checks that the losses are finite, besides every save; each synchronises the device."""


class Interrupted(Exception):
    """Training was stopped by Ctrl-C or SIGTERM. Everything is saved; the same command resumes."""


class StageTrainer:
    """Trains one stage of one run, or reuses an equal one."""

    _compiled = False

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
        self._run_folder = folder
        self._store = StageStore(prepared.spec, stage, dataset, folder, options.output)
        self._options, self._hooks, self._interrupt = options, hooks, interrupt
        self._earlier = earlier
        self._world = options.world
        self._evaluator = PointEvaluator(
            prepared, stage, folder, dataset=dataset, device=options.device, world=options.world
        )
        self._state, self._losses, self._stop = TrainingState(), LossMonitor(), SharedStop(options.world)

    def execute(self) -> Artifact:
        """Return the stage's artifact: already recorded, reused from another run, or trained now."""
        record = self._world.from_main(self._store.recorded)
        if record is None:
            record = self._reuse() or self._train()
            if self._world.is_main:
                self._run_folder.add_stage(record)
        for hook in self._hooks:
            hook.on_stage_end(self._stage, record)
        return self._store.artifact(record)

    def _reuse(self) -> StageRecord | None:
        """Reuse an equal stage that another run has finished, and evaluate it here; None if there is none."""
        if not self._options.reuse:
            return None
        record = self._world.from_main(self._store.link_reused)
        if record is None:
            return None
        for hook in self._hooks:
            hook.on_stage(self._stage, self._stage.steps)
        ema = self._store.load("ema", record.sha256["ema"]).to(self._options.device)
        self._evaluate(ema, self._stage.steps, seconds=record.seconds, flops=record.flops)
        return record

    def _train(self) -> StageRecord:
        """Train from the last saved state to the last step of the stage."""
        # Build, and restore the last saved state.
        stage, train, device = self._stage, self._spec.train, self._options.device
        with seeded_globals(self._spec.seed, "setup", device=device):  # for plug-ins that draw in `setup`
            model = self._build()
        optimizer = make_optimizer(model.trained_parameters(), train, device)
        folder = self._store.folder
        self._world.from_main(lambda: folder.path.mkdir(parents=True, exist_ok=True))
        self._state = load_state(folder, _networks(model), optimizer) or TrainingState()
        if self._world.is_main:
            model.cost = Cost(**self._state.cost)
        replica = self._replicate(model)
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
                replica=replica,
            )
            self._count_step(model, started, losses)
            self._after_step(model, optimizer)

        # Leave the final weights, and offer them to other runs.
        raw, ema = (whole(network.state_dict(), self._world) for network in (model.student, model.ema))
        return self._world.from_main(lambda: self._store.finish(self._state, raw, ema))

    def _build(self) -> StageModel:
        """The networks of the stage with their initial weights, on the device."""
        spec, stage = self._spec, self._stage
        seed = key(spec.seed, "backbone")
        heads = stage.definition.heads
        student = build_backbone(spec.backbone, spec.objective, self._dataset, seed=seed, heads=heads)
        if stage.definition.init == "previous":
            assert self._earlier, "the first stage has no previous one"
            load_trunk(student, list(self._earlier.values())[-1].load("ema").state_dict())
        elif spec.init is not None and stage.index == 0:
            load_start(student, spec.init, spec.objective)
        if not self._store.folder.state_index.is_file():  # a saved state contains what was fitted
            fit_heads(student, self._dataset)
        model = StageModel(
            student,
            stage.definition.supervision(self._earlier),
            build_objective(spec.objective, spec.objective_options),
            seed=spec.seed,
            dataset_size=self._dataset.size,
            world=self._world,
            posthoc=spec.train.posthoc_ema and stage.is_last,
        )
        model.prepare(self._options.device, spec.train, stage.steps, sharded=self._options.shard)
        self._compiled = model.compiled
        return model

    def _replicate(self, model: StageModel) -> torch.nn.Module | None:
        """The model as a DDP replica; None for one rank or a sharded model."""
        if self._world.size == 1 or self._options.shard:
            return None
        unused = has_unused_parameters(self._empty_network())
        return replicate(model, model.trained_heads().values(), find_unused=unused)

    def _empty_network(self) -> Backbone:
        """A network like the student on the meta device."""
        return build_backbone(
            self._spec.backbone,
            self._spec.objective,
            self._dataset,
            "meta",
            heads=self._stage.definition.heads,
        )

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
        )

    def _require_finite_losses(self) -> None:
        """Raise UserError if a loss or a gradient since the last call was not finite."""
        bad = self._losses.first_bad()
        if bad is not None:
            values = ", ".join(f"{name}={value:g}" for name, value in bad[1].items())
            raise self._diverged(f"loss or gradient is not finite at step {bad[0]} ({values})")

    def _require_finite_state(self, model: StageModel, optimizer: torch.optim.Optimizer) -> None:
        """Raise UserError if weights or optimiser contain values that are not finite."""
        found = self._world.gather_objects(first_bad_tensor(_networks(model), optimizer))
        bad = next((name for name in found if name is not None), None)
        if bad is not None:
            raise self._diverged(f"the weights are not finite after step {self._state.step} ({bad})")

    def _diverged(self, reason: str) -> UserError:
        return diverged(
            f"{reason} of stage '{self._stage.name}'",
            run=self._run_folder.path,
            folder=self._store.folder,
            is_last=self._stage.is_last,
            lr=self._spec.train.lr,
        )

    def _after_step(self, model: StageModel, optimizer: torch.optim.Optimizer) -> None:
        """Save, stop and evaluate where these are due, in this order."""
        step, is_last = self._state.step, self._state.step == self._stage.steps
        at_point, stop = step in self._stage.points, self._stop(self._interrupt.requested)
        if is_last:
            stop = self._stop.finish() or stop
        if at_point or stop or is_last or step % self._spec.train.save_every == 0:
            self._synchronise()
            self._state = replace(self._state, cost=self._total_cost(model))
            self._require_finite_losses()
            self._require_finite_state(model, optimizer)
            tensors = whole(state_tensors(_networks(model), optimizer), self._world)
            self._world.from_main(lambda: save_state(self._store.folder, self._state, tensors))
        if stop:
            raise Interrupted(str(self._run_folder.path))
        if at_point:
            self._evaluate_point(model)

    def _total_cost(self, model: StageModel) -> dict[str, float]:
        """The FLOPs that all ranks have spent."""
        mine = asdict(model.cost)
        total = self._world.total(torch.tensor(list(mine.values()), dtype=torch.float64))
        return dict(zip(mine, total.tolist(), strict=True))

    def _synchronise(self) -> None:
        """Wait for the device and count the time, so that seconds include all launched work."""
        if self._options.device.type == "cuda":
            started = time.perf_counter()
            torch.cuda.synchronize()
            self._state = replace(self._state, seconds=self._state.seconds + time.perf_counter() - started)

    def _evaluate_point(self, model: StageModel) -> None:
        """Store the averaged weights of this point and evaluate the EMA."""
        step, keep = self._state.step, self._options.keep == "all"
        ema, second = model.ema, model.posthoc
        weights = {"ema": whole(ema.state_dict(), self._world)}
        if second is not None:
            weights[POSTHOC] = whole(second.state_dict(), self._world)
        self._world.from_main(lambda: self._store.store_point(step, weights, keep_others=keep))
        if is_sharded(ema):
            ema = whole_network(ema, self._empty_network())
        flops = Cost(**self._state.cost).total
        self._evaluate(ema, step, seconds=self._state.seconds, flops=flops)

    def _evaluate(self, ema: Backbone, step: int, *, seconds: float, flops: float) -> None:
        with eager(self._compiled):
            for point in self._evaluator.evaluate(ema, step, seconds=seconds, flops=flops):
                for hook in self._hooks:
                    hook.on_point(self._stage, point)


def _networks(model: StageModel) -> dict[str, torch.nn.Module]:
    networks = {"student": model.student, "heads": model.heads, "ema": model.ema}
    return networks if model.posthoc is None else {**networks, POSTHOC: model.posthoc}
