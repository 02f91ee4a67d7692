"""One training step, in execution order: draw, corrupt, forward, losses, backward, clip, optimiser, EMA."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stbench.config.spec import TrainSpec
from stbench.core.backbone import Backbone, kept_heads
from stbench.core.device import autocast, tf32
from stbench.core.errors import UserError
from stbench.core.memory import keep_freed_memory
from stbench.core.objective import Batch, Noised, Objective
from stbench.core.phases import phase
from stbench.core.recipe import Cost, Step, Supervision, Term
from stbench.core.rng import key, seeded_globals
from stbench.core.safe_load import shown
from stbench.core.world import ALONE, World
from stbench.data.dataset import Dataset
from stbench.evaluate.posthoc_ema import power_decay
from stbench.train import sharding
from stbench.train.batches import draw_batches
from stbench.train.blocks import checkpoint_blocks, compile_blocks, should_compile, teachers
from stbench.train.replica import average_gradients, local_gradients


@dataclass(frozen=True)
class Losses:
    """The losses of one (micro-)batch: scalars on the device."""

    total: Tensor
    parts: dict[str, Tensor]
    """Unweighted means by name: "denoise" and one for each term."""


class StageModel(nn.Module):
    """The networks of one stage.

    Student and heads are submodules, so DDP, the optimiser and the state dict see exactly these. The EMA
    network and the supervision, with its teachers, are deliberately not registered.
    """

    ema: Backbone
    posthoc: Backbone | None
    """Power-function average of the student; None if the stage keeps none."""
    supervision: Supervision
    gradient_norm: Tensor | None
    """Norm of the last gradient before clipping, on the device; None without clipping."""

    def __init__(
        self,
        student: Backbone,
        supervision: Supervision,
        objective: Objective,
        *,
        seed: int,
        dataset_size: int,
        world: World = ALONE,
        posthoc: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, "heads"))
            self.heads = supervision.heads(student.info)
        if twice := sorted(self.heads.keys() & kept_heads(student).keys()):
            raise UserError(f"Stage.heads and Supervision.heads both name a head '{twice[0]}'; rename one")
        # object.__setattr__ keeps these out of nn.Module's registry.
        object.__setattr__(self, "ema", copy.deepcopy(student).eval().requires_grad_(False))
        second = copy.deepcopy(self.ema) if posthoc else None
        object.__setattr__(self, "posthoc", second)
        object.__setattr__(self, "supervision", supervision)
        self.objective, self.dataset_size, self.world = objective, dataset_size, world
        self.cost = Cost()
        self.gradient_norm: Tensor | None = None
        self.teacher_precision, self.compiled = "fp32", False
        self._student_flops = float(student.flops())

    def prepare(
        self, device: torch.device, train: TrainSpec | None = None, steps: int = 0, *, sharded: bool = False
    ) -> None:
        """Move all networks to the device, load the teachers, and apply `train` to a stage of `steps` steps.

        Of `train`, these are the precision of the teachers, checkpointing and compilation. With `sharded`,
        student, heads and averages are split over the ranks.
        """
        if not sharded:
            self.to(device)
            for average in self.averages():
                average.to(device)
        self.supervision.setup(device)
        if train is not None:
            self._apply_settings(train, device, steps)
        if sharded:
            sharding.shard([self.student, *self.averages()], self.heads, device, self.world)

    def averages(self) -> list[Backbone]:
        """The averages of the student."""
        return [self.ema] if self.posthoc is None else [self.ema, self.posthoc]

    def _apply_settings(self, train: TrainSpec, device: torch.device, steps: int) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        self.teacher_precision = train.teacher_precision
        # A supervision may be a frozen dataclass.
        object.__setattr__(self.supervision, "teacher_precision", train.teacher_precision)
        if train.checkpointing:
            checkpoint_blocks(self.student)
        self.compiled = should_compile(train, device, 3.0 * self._student_flops * train.batch * steps)
        if self.compiled:
            for network in (self.student, self.ema, *teachers(self.supervision)):
                compile_blocks(network)

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters of student and heads, without fixed position embeddings."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def forward(self, batch: Batch) -> Losses:
        """The mean denoising loss plus the weighted mean of each auxiliary term."""
        # Corrupt: draw times and noise.
        noised = self.supervision.corrupt(self.objective, batch)

        # Forward: prediction and the tapped blocks.
        taps, inputs = tuple(self.supervision.taps), self.supervision.inputs(batch, noised)
        with phase("student"):
            found = self.student.run(noised.x_t, noised.t, batch.y, indices=taps, **inputs)
        assert found.prediction is not None
        one = self._flops_of(noised, inputs)
        self.cost.student += 3.0 * one * len(batch.y)  # backward costs twice the forward

        # Denoising loss.
        total = denoise = self.objective.loss(found.prediction, noised).mean()
        parts = {"denoise": denoise.detach()}

        # Auxiliary terms.
        step = Step(
            batch=batch,
            noised=noised,
            prediction=found.prediction,
            features=found.features,
            condition=found.condition,
            attention=found.attention,
            kept=found.kept,
            prefix=found.prefix,
            prefix_out=found.prefix_out,
            heads=self.trained_heads(),
            ema=self.ema,
            objective=self.objective,
            teacher_precision=self.teacher_precision,
            padded=self.compiled,
            info=self.student.info,
            images_seen=batch.rng.images_seen,
            dataset_size=self.dataset_size,
            global_batch=batch.rng.global_batch,
            cost=self.cost,
            world=self.world,
        )
        for name, term in _terms(self.supervision, step).items():
            mean = term.value.mean()
            total = total + term.weight * mean
            parts[name] = mean.detach()
        return Losses(total, parts)

    def _flops_of(self, noised: Noised, inputs: Mapping[str, Any]) -> float:
        """FLOPs of the student's forward pass for one image, with the optional inputs of this step."""
        if noised.t.ndim == 1 and not inputs:
            return self._student_flops
        return float(self.student.flops(token_times=noised.t.ndim == 2, **inputs))

    def trained_heads(self) -> dict[str, nn.Module]:
        """The heads by name: those that are discarded, and those that stay with the student."""
        return {**self.heads, **kept_heads(self.student)}


def _terms(supervision: Supervision, step: Step) -> Mapping[str, Term]:
    """The terms of a step. Raises UserError if the supervision returns anything else."""
    terms = supervision.terms(step)
    if not isinstance(terms, Mapping) or not all(
        isinstance(name, str) and isinstance(term, Term) and isinstance(term.value, Tensor)
        for name, term in terms.items()
    ):
        raise UserError(
            f"{type(supervision).__name__}.terms must return a mapping of names to Term(tensor, weight), got "
            f"{shown(terms)}; fix the supervision"
        )
    return terms


def training_step(
    model: StageModel,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    train: TrainSpec,
    *,
    seed: int,
    step: int,
    device: torch.device,
    replica: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Run one optimiser step over the global batch.

    Args:
        model: The networks of the stage, on `device`.
        optimizer: The optimiser of `model.trained_parameters()`.
        dataset: The training data, on `device`.
        train: Training settings.
        seed: Seed of the run.
        step: Number of finished steps of this stage.
        device: Where to compute.
        replica: The model as a DDP replica, if there is one.

    Returns:
        The unweighted mean of each loss over the global batch, still on the device.
    """
    world = model.world
    losses: dict[str, Tensor] = {}
    optimizer.zero_grad(set_to_none=True)
    stream = "global" if world.is_main else f"global-{world.rank}"
    globals_seeded = seeded_globals(seed, stream, step * train.batch, device)
    with tf32(train.precision == "tf32"), globals_seeded:
        batches = draw_batches(dataset, train, model.supervision, seed=seed, step=step, world=world)
        for part, batch in enumerate(batches):
            # The gradients of the ranks are averaged in the backward pass of the last micro-batch.
            is_last = part == train.accumulate - 1
            with local_gradients(replica, wanted=not is_last):
                # Corrupt, forward, denoising loss and terms. Autocast must not cover the backward pass, which
                # runs in the types that the forward pass chose.
                with autocast(train.precision, device):
                    found: Losses = (replica or model)(batch)

                # Backward: each micro-batch counts by its share of the global batch.
                share = len(batch.y) / train.batch
                with phase("backward"):
                    (found.total * (share * world.size)).backward()  # type: ignore[no-untyped-call]
            for name, value in found.parts.items():
                losses[name] = losses.get(name, torch.zeros_like(value)) + value * share

    if replica is not None:
        average_gradients(model.trained_heads().values(), world)

    # Clip.
    with phase("optimizer"):
        if train.clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.trained_parameters(), train.clip)
            model.gradient_norm = sharding.whole_value(norm.detach())

        # Optimiser.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step)
        optimizer.step()

    # EMA.
    with phase("EMA"):
        update_ema(model.ema, model.student, ema_decay(train, step))
        if model.posthoc is not None:
            update_ema(model.posthoc, model.student, power_decay(step + 1))
    if world.size == 1:
        return losses
    return dict(zip(losses, world.total(torch.stack(list(losses.values()))).unbind(), strict=True))


def make_optimizer(
    parameters: Iterable[nn.Parameter], train: TrainSpec, device: torch.device
) -> torch.optim.AdamW:
    """AdamW with the constants of the specification, fused where torch supports it."""
    return torch.optim.AdamW(
        list(parameters),
        lr=train.lr,
        betas=train.betas,
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def learning_rate(train: TrainSpec, step: int) -> float:
    """The learning rate of the step after `step` finished ones: linear warm-up, then constant."""
    return train.lr * min(1.0, (step + 1) / train.warmup) if train.warmup else train.lr


def ema_decay(train: TrainSpec, step: int) -> float:
    """The EMA decay after `step` finished steps: constant, or min(decay, (1+n)/(10+n)) while warming up."""
    return min(train.ema_decay, (1 + step) / (10 + step)) if train.ema_warmup else train.ema_decay


@torch.no_grad()
def update_ema(ema: nn.Module, student: nn.Module, decay: float) -> None:
    """Update every parameter: ema <- decay * ema + (1 - decay) * student."""
    averaged = [sharding.own_part(parameter.data) for parameter in ema.parameters()]
    current = [sharding.own_part(parameter.data) for parameter in student.parameters()]
    torch._foreach_lerp_(averaged, current, 1.0 - decay)
