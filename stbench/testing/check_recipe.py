"""What every recipe must do, built-in or plug-in: its stages are trained for a few steps and watched."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from stbench.config.build import build_backbone, build_objective
from stbench.config.plan import PlannedStage, PreparedRun, prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.config.spec import RunSpec
from stbench.core.backbone import Backbone, BackboneInfo, Weights
from stbench.core.recipe import Artifact, Step, Supervision, Term
from stbench.core.registry import DATASETS, load_builtins, lookup
from stbench.core.rng import Rng, key
from stbench.testing.check_backbone import require
from stbench.train.cost import expected_cost
from stbench.train.step import StageModel, make_batch, make_optimizer, update_ema

BATCH, STEPS = 16, 3


def check_recipe(
    name: str,
    *,
    backbone: str = "sit",
    objective: str | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Check a registered recipe by training each of its stages for a few steps on random latents.

    Later stages are built on what the earlier ones leave, as in a run. `objective`: the backbone's published
    one unless named. `options`: the recipe's, by name. Raises AssertionError for the first
    promise of `Recipe` that is broken, UserError for an unknown name or an option that does not fit.
    """
    load_builtins()
    overrides: dict[str, Any] = {"train.batch": BATCH, "train.precision": "fp32"}
    overrides |= {f"recipe.{option}": value for option, value in options.items()}
    spec = resolve(RunRequest(backbone, name, objective=objective, steps=STEPS, overrides=overrides))
    try:
        prepared = prepare(spec)
    except TypeError as error:
        raise AssertionError(f"a field of a supervision of '{name}' is not plain data: {error}") from error
    for stage in prepared.stages:
        cost = expected_cost(prepared, stage, draws=1)
        require(cost.student > 0.0, f"stage '{stage.name}' costs nothing")
    runs = zip(prepared.stages, _train_all(prepared), _train_all(prepared), strict=True)
    for stage, one, two in runs:
        same = one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
        require(same, f"stage '{stage.name}' differs when trained twice: draw from step.batch.rng only")


@dataclasses.dataclass
class _Watched(Supervision):
    """A recipe whose terms are looked at on their way to the loss."""

    inner: Supervision

    @property
    def taps(self) -> Sequence[int]:
        """The recipe's."""
        return self.inner.taps

    @property
    def images(self) -> bool:
        """The recipe's."""
        return self.inner.images

    def setup(self, device: torch.device) -> None:
        """The recipe's."""
        self.inner.setup(device)

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """The recipe's."""
        return self.inner.heads(info)

    def terms(self, step: Step) -> Mapping[str, Term]:
        """The recipe's, each checked to be (B,) finite float32."""
        terms = self.inner.terms(step)
        for name, term in terms.items():
            shape = tuple(term.value.shape)
            require(shape == (BATCH,), f"term '{name}' is {shape}, expected a value a sample, ({BATCH},)")
            require(
                term.value.dtype == torch.float32, f"term '{name}' is {term.value.dtype}, expected float32"
            )
            require(bool(term.value.isfinite().all()), f"term '{name}' is not finite")
        return terms


class _Left:
    """What a finished stage leaves, and every network that a recipe loads from it."""

    def __init__(self, stage: PlannedStage, module: StageModel) -> None:
        self.networks: list[Backbone] = []
        self._kept = {"raw": copy.deepcopy(module.student), "ema": copy.deepcopy(module.ema)}
        self.artifact = Artifact(
            name=stage.name,
            fingerprint=stage.fingerprint,
            checkpoint="",
            sha256={},
            steps=stage.steps,
            images_seen=stage.images,
            seconds=0.0,
            flops=module.cost.total,
            loader=self._load,
        )

    def _load(self, weights: Weights) -> Backbone:
        self.networks.append(copy.deepcopy(self._kept[weights]))
        return self.networks[-1]


def _train_all(prepared: PreparedRun) -> Iterator[dict[str, Tensor]]:
    """Train the stages in order; yields the final weights of each, heads included."""
    left: list[_Left] = []
    for stage in prepared.stages:
        supervision = stage.definition.supervision({item.artifact.name: item.artifact for item in left})
        module = _module(stage, supervision, prepared.spec, left[-1].artifact if left else None)
        teachers = [network for item in left for network in item.networks] + _held(supervision)
        before = copy.deepcopy([teacher.state_dict() for teacher in teachers])
        _train(stage, module, prepared.spec)
        _check_teachers(stage, module, teachers, before)
        for item in left:
            item.networks.clear()
        left.append(_Left(stage, module))
        yield module.state_dict()


def _held(recipe: Supervision) -> list[nn.Module]:
    """Networks a recipe keeps as attributes, or in lists of its own."""
    values = [v for value in vars(recipe).values() for v in (value if isinstance(value, list) else [value])]
    return [value for value in values if isinstance(value, nn.Module)]


def _module(stage: PlannedStage, recipe: Supervision, spec: RunSpec, previous: Artifact | None) -> StageModel:
    digits = lookup(DATASETS, spec.dataset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(spec.seed, "backbone"))
        student = build_backbone(spec.backbone, spec.objective, digits)
    if stage.definition.init == "previous" and previous is not None:
        student.load_state_dict(previous.load("ema").state_dict())
    for block in recipe.taps:
        require(
            0 <= block < student.info.depth,
            f"stage '{stage.name}' taps block {block} of {student.info.depth}",
        )
    module = StageModel(
        student, _Watched(recipe), build_objective(spec.objective), seed=spec.seed, dataset_size=digits.size
    )
    module.prepare(torch.device("cpu"))
    return module


def _train(stage: PlannedStage, module: StageModel, spec: RunSpec) -> None:
    """A few optimiser steps: finite losses, gradients in the heads, heads that cost, no global randomness."""
    digits, random = lookup(DATASETS, spec.dataset), torch.get_rng_state()
    optimizer = make_optimizer(module.trained_parameters(), spec.train, torch.device("cpu"))
    dead = dict(module.heads.named_parameters())
    for step in range(STEPS):
        rng = Rng(spec.seed, step * BATCH, BATCH)
        x0 = rng.normal("conformance", (digits.channels, digits.input_size, digits.input_size))
        labels = rng.integers("conformance-labels", digits.classes)
        index = torch.arange(BATCH)
        shape = (BATCH, *digits.image_shape)
        images = torch.randint(256, shape, generator=rng.generator("conformance-images"), dtype=torch.uint8)
        batch = make_batch(x0, labels, index, rng, spec.train.label_drop, digits.classes, {"images": images})
        losses = module(batch)
        require(bool(losses.total.isfinite()), f"stage '{stage.name}': loss not finite at step {step + 1}")
        optimizer.zero_grad()
        losses.total.backward()
        dead = {name: p for name, p in dead.items() if p.grad is None or not p.grad.any()}
        optimizer.step()
        update_ema(module.ema, module.student, 0.5)
    require(not dead, f"stage '{stage.name}': no gradient reaches {', '.join(dead)}")
    untouched = torch.equal(torch.get_rng_state(), random)
    require(untouched, f"stage '{stage.name}' draws from torch's global generator: use step.batch.rng")
    paid = module.cost.heads > 0.0 or not len(module.heads)
    require(paid, f"stage '{stage.name}': its heads cost nothing; run them by step.project")


def _check_teachers(
    stage: PlannedStage,
    module: StageModel,
    teachers: Sequence[nn.Module],
    before: Sequence[Mapping[str, Tensor]],
) -> None:
    """Teachers and the EMA are frozen and in eval mode; teachers are unchanged and nobody's parameters."""
    trained = {id(p) for p in module.parameters()}
    for network in (*teachers, module.ema):
        require(not network.training, f"stage '{stage.name}': a teacher is in train mode")
        frozen = not any(p.requires_grad for p in network.parameters())
        require(frozen, f"stage '{stage.name}': a teacher is not frozen")
        apart = trained.isdisjoint(id(p) for p in network.parameters())
        require(apart, f"stage '{stage.name}': a teacher is among the trained parameters")
    for network, state in zip(teachers, before, strict=True):
        same = all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
        require(same, f"stage '{stage.name}' changes its teacher")
    paid = module.cost.teachers > 0.0 or not teachers
    require(paid, f"stage '{stage.name}': its teacher costs nothing; run it by step.teach")
