"""The loop of the published training scripts, to compare with: same networks, weights, data and noise.

It differs from the engine's step as the released code of REPA, SRA and Self-Transcendence does:

- a teacher runs on the whole batch, through all of its blocks, in float32 (TF32 on a GPU), and
  Self-Transcendence's conditional and unconditional branch run one after the other;
- the mask of a recipe multiplies the losses of the whole batch;
- REPA's cosine is computed sample by sample;
- AdamW is torch's default, not fused, and the EMA is updated parameter by parameter;
- reduced precision on a GPU is float16 autocast with a gradient scaler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stbench.bench.workload import Workload
from stbench.core.backbone import Backbone, Features
from stbench.core.device import tf32
from stbench.core.errors import UserError
from stbench.core.objective import Batch, Noised
from stbench.core.recipe import NoSupervision, Supervision
from stbench.models import align, encoders
from stbench.recipes.deep_supervision import VaeAlign
from stbench.recipes.repa import Repa
from stbench.recipes.self_transcendence import SelfTranscendence
from stbench.recipes.sra import Sra
from stbench.train.batches import draw_batches
from stbench.train.step import ema_decay, learning_rate

Term = tuple[str, Tensor, float]
Terms = Callable[["PlainLoop", Batch, Noised, Features], Term]
"""Returns the name of the auxiliary loss, its mean over the batch, and its weight."""


class PlainLoop:
    """Takes the steps of a workload in the published way. The workload itself must not take any."""

    def __init__(self, workload: Workload) -> None:
        """Raises UserError if no plain loop of the recipe is known."""
        model, spec = workload.model, workload.prepared.spec
        self.supervision = model.supervision
        self.terms = _terms_of(self.supervision)
        self.student, self.heads, self.ema = model.student, model.heads, model.ema
        self.objective, self.info = model.objective, model.student.info
        self.dataset, self.spec, self.device = workload.dataset, spec, workload.device
        self.half = {"cuda": torch.float16, "cpu": torch.bfloat16}.get(self.device.type, torch.bfloat16)
        self.reduced = spec.train.precision == "bf16"
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.reduced and self.half is torch.float16
        )
        self.parameters = [
            parameter
            for module in (self.student, self.heads)
            for parameter in module.parameters()
            if parameter.requires_grad
        ]
        train = spec.train
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=train.lr,
            betas=train.betas,
            eps=train.adam_eps,
            weight_decay=train.weight_decay,
        )
        self.steps = 0

    def step(self) -> dict[str, Tensor]:
        """Take the next optimiser step; returns the mean of each loss, unweighted."""
        train, spec = self.spec.train, self.spec
        (batch,) = draw_batches(
            self.dataset,
            train.model_copy(update={"accumulate": 1}),
            self.supervision,
            seed=spec.seed,
            step=self.steps,
        )
        noised = self.objective.draw(batch)
        with tf32(train.precision in ("tf32", "bf16")):
            with torch.autocast(self.device.type, self.half, enabled=self.reduced):
                found = self.student.run(noised.x_t, noised.t, batch.y, indices=tuple(self.supervision.taps))
            assert found.prediction is not None
            denoise = self.objective.loss(found.prediction, noised).mean()
            name, term, weight = self.terms(self, batch, noised, found.features)
            self.optimizer.zero_grad()
            scaled: Tensor = self.scaler.scale(denoise + weight * term)
            scaled.backward()  # type: ignore[no-untyped-call]
        self._update(train)
        return {"denoise": denoise.detach()} | ({name: term.detach()} if weight else {})

    def _update(self, train: Any) -> None:
        """Clip, step, and average the weights one parameter at a time."""
        self.scaler.unscale_(self.optimizer)
        if train.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, train.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(train, self.steps)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        decay = ema_decay(train, self.steps)
        with torch.no_grad():
            averaged = dict(self.ema.named_parameters())
            for name, parameter in self.student.named_parameters():
                averaged[name].mul_(decay).add_(parameter.data, alpha=1.0 - decay)
        self.steps += 1

    @torch.no_grad()
    def teach(self, teacher: Backbone, x: Tensor, t: Tensor, y: Tensor, block: int) -> Tensor:
        """Features (B,N,D) of a block, from a forward pass through the whole network in float32."""
        return teacher.run(x, t, y, indices=(block,)).features[block].float()

    def project(self, head: str, tokens: Tensor) -> Tensor:
        """Apply a trained head under the student's autocast."""
        with torch.autocast(self.device.type, self.half, enabled=self.reduced):
            output: Tensor = self.heads[head](tokens)
        return output

    def inside(self, noised: Noised, interval: tuple[float, float], native: bool) -> Tensor:
        """1.0 for every sample whose time is in the interval, otherwise 0.0; (B,)."""
        return (
            align.in_interval(self.objective, noised.t_host, interval, native=native).float().to(self.device)
        )


def _vanilla(loop: PlainLoop, batch: Batch, noised: Noised, features: Features) -> Term:
    return "", noised.x_t.new_zeros(()), 0.0


def _vae_align(loop: PlainLoop, batch: Batch, noised: Noised, features: Features) -> Term:
    sup: Any = loop.supervision
    velocity = loop.project("velocity", features[sup.block]).float()
    error = (velocity - loop.objective.velocity_target(noised)).square().flatten(1).mean(1)
    return (
        "vae-align",
        (error * loop.inside(noised, sup.interval, sup.time == "native")).mean(),
        sup.coefficient,
    )


def _self_transcendence(loop: PlainLoop, batch: Batch, noised: Noised, features: Features) -> Term:
    sup: Any = loop.supervision
    null = torch.full_like(batch.y_true, loop.info.classes)
    conditional, unconditional = (
        loop.teach(sup._network, noised.x_t, noised.t, y, sup.teacher_block) for y in (batch.y_true, null)
    )
    target = unconditional + sup.guidance * (conditional - unconditional)
    projected = loop.project("projector", features[sup.student_block]).float()
    error = (projected - target).square().flatten(1).mean(1)
    return (
        "self-transcendence",
        (error * loop.inside(noised, sup.interval, sup.time == "native")).mean(),
        sup.coefficient,
    )


def _sra(loop: PlainLoop, batch: Batch, noised: Noised, features: Features) -> Term:
    sup: Any = loop.supervision
    t = sup.teacher_time(loop.objective, noised.t_host, batch.rng.uniform("sra"))
    cleaner = loop.objective.at(noised.x0, noised.noise, t)
    target = loop.teach(loop.ema, cleaner.x_t, cleaner.t, batch.y, sup.teacher_block)
    projected = loop.project("head", features[sup.student_block])
    epoch = batch.rng.images_seen // loop.dataset.size
    return "sra", sup.measure(projected, target).mean(), sup.weight_at(epoch)


def _repa(loop: PlainLoop, batch: Batch, noised: Noised, features: Features) -> Term:
    sup: Any = loop.supervision
    total = noised.x_t.new_zeros(())
    for j, encoder in enumerate(sup._encoders):
        if not isinstance(encoder, encoders.ImageEncoder):
            raise UserError("the plain loop runs the encoder, found cached tokens; drop --against-plain")
        with torch.no_grad():
            target = encoder.tokens(batch.extras["images"]).float()
        projected = loop.project(str(j), features[sup.block]).float()
        for student, teacher in zip(projected, target, strict=True):
            unit = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
            total = total - (unit[0] * unit[1]).sum(-1).mean()
    return "repa", total / (len(sup._encoders) * len(batch.y)), sup.weight


_TERMS: Mapping[type[Supervision], Terms] = {
    NoSupervision: _vanilla,
    VaeAlign: _vae_align,
    SelfTranscendence: _self_transcendence,
    Sra: _sra,
    Repa: _repa,
}
"""Class of a supervision -> its loss in the published loop."""


def _terms_of(supervision: Supervision) -> Terms:
    kind = type(supervision)
    if kind not in _TERMS:
        known = ", ".join(each.__qualname__ for each in _TERMS)
        raise UserError(
            f"no plain loop is known for {kind.__qualname__}, only for {known}; drop --against-plain"
        )
    if vars(supervision).get("mask", "samples") != "samples":
        raise UserError("the plain loop knows no other mask than recipe.mask=samples; drop --against-plain")
    if isinstance(supervision, Repa) and (supervision.alpha is not None or supervision.structure):
        raise UserError(
            "the plain loop has REPA's published loss, without normalisation or structural term; drop "
            "--against-plain"
        )
    return _TERMS[kind]
