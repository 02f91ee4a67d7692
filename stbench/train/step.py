"""One training step, in execution order: draw, corrupt, forward, losses, backward, clip, optimiser, EMA."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from stbench.config.spec import TrainSpec
from stbench.core.backbone import Backbone
from stbench.core.device import autocast, tf32
from stbench.core.errors import UserError
from stbench.core.objective import Batch, Objective
from stbench.core.phases import phase
from stbench.core.recipe import Cost, Step, Supervision, Term
from stbench.core.rng import Rng, key, seeded_globals
from stbench.core.safe_load import shown
from stbench.data.dataset import Dataset


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
    ) -> None:
        super().__init__()
        self.student = student
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, "heads"))
            self.heads = supervision.heads(student.info)
        # object.__setattr__ keeps these out of nn.Module's registry.
        object.__setattr__(self, "ema", copy.deepcopy(student).eval().requires_grad_(False))
        object.__setattr__(self, "supervision", supervision)
        self.objective, self.dataset_size = objective, dataset_size
        self.cost = Cost()
        self.gradient_norm: Tensor | None = None
        self._student_flops = float(student.flops())

    def prepare(self, device: torch.device, compile_student: bool = False) -> None:
        """Move all networks to the device and load the teachers."""
        self.to(device)
        self.ema.to(device)
        self.supervision.setup(device)
        if compile_student:
            self.student.forward_intermediates = torch.compile(self.student.forward_intermediates)  # type: ignore[method-assign]

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters of student and heads, without fixed position embeddings."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def forward(self, batch: Batch) -> Losses:
        """The mean denoising loss plus the weighted mean of each auxiliary term."""
        # Corrupt: draw times and noise.
        noised = self.objective.draw(batch)

        # Forward: prediction and the tapped blocks.
        with phase("student"):
            prediction, features = self.student.forward_intermediates(
                noised.x_t, noised.t, batch.y, indices=tuple(self.supervision.taps)
            )
        assert prediction is not None
        self.cost.student += 3.0 * self._student_flops * len(batch.y)  # backward costs twice the forward

        # Denoising loss.
        total = denoise = self.objective.loss(prediction, noised).mean()
        parts = {"denoise": denoise.detach()}

        # Auxiliary terms.
        step = Step(
            batch=batch,
            noised=noised,
            prediction=prediction,
            features=features,
            heads=self.heads,
            ema=self.ema,
            objective=self.objective,
            info=self.student.info,
            images_seen=batch.rng.images_seen,
            dataset_size=self.dataset_size,
            global_batch=batch.rng.global_batch,
            cost=self.cost,
        )
        for name, term in _terms(self.supervision, step).items():
            mean = term.value.mean()
            total = total + term.weight * mean
            parts[name] = mean.detach()
        return Losses(total, parts)


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

    Returns:
        The unweighted mean of each loss over the global batch, still on the device.
    """
    losses: dict[str, Tensor] = {}
    optimizer.zero_grad(set_to_none=True)
    globals_seeded = seeded_globals(seed, "global", step * train.batch, device)
    with tf32(train.precision == "tf32"), globals_seeded:
        for batch in draw_batches(dataset, train, model.supervision, seed=seed, step=step):
            # Corrupt, forward, denoising loss and terms. Autocast must not cover the backward pass, which
            # runs in the types that the forward pass chose.
            with autocast(train.precision, device):
                found = model(batch)

            # Backward: each micro-batch counts by its share of the global batch.
            share = len(batch.y) / train.batch
            with phase("backward"):
                (found.total * share).backward()
            for name, value in found.parts.items():
                losses[name] = losses.get(name, torch.zeros_like(value)) + value * share

    # Clip.
    with phase("optimizer"):
        if train.clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.trained_parameters(), train.clip)
            model.gradient_norm = norm.detach()

        # Optimiser.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step)
        optimizer.step()

    # EMA.
    with phase("EMA"):
        update_ema(model.ema, model.student, ema_decay(train, step))
    return losses


def draw_batches(
    dataset: Dataset, train: TrainSpec, supervision: Supervision, *, seed: int, step: int
) -> Iterator[Batch]:
    """Draw the micro-batches of one step: rows, posterior noise and dropped labels.

    All random numbers are those of the global batch, so they do not depend on how it is split.
    """
    seen = step * train.batch
    index = dataset.order(seed, seen, train.batch)
    shape = (dataset.channels, dataset.input_size, dataset.input_size)
    size = train.batch // train.accumulate
    for part in range(train.accumulate):
        is_last = part == train.accumulate - 1  # the last micro-batch takes the remainder
        start, stop = part * size, train.batch if is_last else (part + 1) * size
        rng = Rng(seed, seen, train.batch, start, stop)
        rows = index[start:stop]
        with phase("data"):
            latents = dataset.latents(rows, rng.normal("posterior", shape))
            extras = {"images": dataset.images(rows)} if supervision.images else {}
            labels = dataset.labels(rows)
            batch = make_batch(latents, labels, rows, rng, train.label_drop, dataset.classes, extras)
        yield batch


def make_batch(
    x0: Tensor,
    y_true: Tensor,
    index: Tensor,
    rng: Rng,
    label_drop: float,
    null: int,
    extras: Mapping[str, Tensor] = MappingProxyType({}),
) -> Batch:
    """Build a batch, replacing each label by the null label with probability `label_drop`.

    Labels are dropped here and nowhere else, so student and teachers see the same ones.
    """
    dropped = (rng.uniform("label-drop") < label_drop).to(y_true.device, non_blocking=True)
    return Batch(x0, torch.where(dropped, null, y_true), y_true, index, rng, extras)


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
    averaged = [parameter.data for parameter in ema.parameters()]
    torch._foreach_lerp_(averaged, [parameter.data for parameter in student.parameters()], 1.0 - decay)
