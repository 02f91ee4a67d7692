"""One stage's networks behind one training step: student, trained heads, EMA, optimiser. Knows no recipe by
name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from stbench.config.spec import TrainSpec
from stbench.core.backbone import Backbone
from stbench.core.objective import Batch, Objective
from stbench.core.recipe import Cost, Step, Supervision
from stbench.core.rng import Rng, key


@dataclass(frozen=True)
class Losses:
    """One step's scalars, still on the device."""

    total: Tensor
    parts: dict[str, Tensor]
    """Unweighted means: "denoise" and one a term."""


class StageModule(nn.Module):
    """Student and heads as one module, so that DDP, the optimiser and the state dict see these and nothing
    else.

    The EMA and the recipe (with its teachers) are kept out of the module tree on purpose.
    """

    def __init__(
        self, student: Backbone, recipe: Supervision, objective: Objective, seed: int, dataset_size: int
    ) -> None:
        super().__init__()
        self.student = student
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, "heads"))
            self.heads = recipe.heads(student.info)
        ema = copy.deepcopy(student).eval().requires_grad_(False)
        self._unregistered: tuple[Backbone, Supervision] = (ema, recipe)
        self.objective, self.dataset_size = objective, dataset_size
        self.cost = Cost()
        self._student_flops = float(student.flops())

    @property
    def ema(self) -> Backbone:
        """The averaged student, frozen and in eval mode."""
        return self._unregistered[0]

    @property
    def recipe(self) -> Supervision:
        """What the stage adds to plain denoising."""
        return self._unregistered[1]

    def prepare(self, device: torch.device, compile_student: bool = False) -> None:
        """Move everything to the device and load the recipe's teachers."""
        self.to(device)
        self.ema.to(device)
        self.recipe.setup(device)
        if compile_student:
            self.student.forward_intermediates = torch.compile(self.student.forward_intermediates)  # type: ignore[method-assign]

    def forward(self, batch: Batch) -> Losses:
        """The loss of one (micro-)batch: mean denoising loss plus weighted means of the recipe's terms."""
        noised = self.objective.draw(batch)
        prediction, features = self.student.forward_intermediates(
            noised.x_t, noised.t, batch.y, indices=tuple(self.recipe.taps)
        )
        assert prediction is not None
        self.cost.student += 3.0 * self._student_flops * len(batch.y)
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
        total = denoise = self.objective.loss(prediction, noised).mean()
        parts = {"denoise": denoise.detach()}
        for name, term in self.recipe.terms(step).items():
            mean = term.value.mean()
            total = total + term.weight * mean
            parts[name] = mean.detach()
        return Losses(total, parts)

    def trained(self) -> list[nn.Parameter]:
        """Parameters the optimiser owns: student and heads, fixed position tables left out."""
        return [p for p in self.parameters() if p.requires_grad]


def make_batch(
    x0: Tensor,
    y_true: Tensor,
    index: Tensor,
    rng: Rng,
    label_drop: float,
    null: int,
    extras: Mapping[str, Tensor] = MappingProxyType({}),
) -> Batch:
    """Drop labels once, for everyone: with probability `label_drop` per sample y becomes the null label."""
    dropped = (rng.uniform("label-drop") < label_drop).to(y_true.device, non_blocking=True)
    return Batch(x0, torch.where(dropped, null, y_true), y_true, index, rng, extras)


def make_optimizer(
    parameters: Iterable[nn.Parameter], train: TrainSpec, device: torch.device
) -> torch.optim.AdamW:
    """Fused AdamW with the spec's constants."""
    return torch.optim.AdamW(
        list(parameters),
        lr=train.lr,
        betas=train.betas,
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def learning_rate(train: TrainSpec, step: int) -> float:
    """Constant after a linear warm-up; `step` counts finished steps."""
    return train.lr * min(1.0, (step + 1) / train.warmup) if train.warmup else train.lr


def ema_decay(train: TrainSpec, step: int) -> float:
    """Decay of update n, n = finished steps: constant, or min(decay, (1+n)/(10+n)) while warming up."""
    return min(train.ema_decay, (1 + step) / (10 + step)) if train.ema_warmup else train.ema_decay


@torch.no_grad()
def update_ema(ema: nn.Module, student: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * student, over every parameter."""
    averaged = [p.data for p in ema.parameters()]
    torch._foreach_lerp_(averaged, [p.data for p in student.parameters()], 1.0 - decay)
