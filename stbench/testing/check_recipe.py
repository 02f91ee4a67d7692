"""`check_recipe`: the conformance check of recipes, built-in or plug-in.

Trains every stage for a few steps and raises an AssertionError with a one-line message for a violation.
"""

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
from stbench.core.backbone import Backbone, BackboneInfo, Weights, fit_heads, load_trunk
from stbench.core.objective import Batch, Noised, Objective
from stbench.core.recipe import Artifact, Step, Supervision, Term
from stbench.core.registry import load_builtins
from stbench.core.rng import Rng, key
from stbench.data.dataset import get_dataset
from stbench.testing.require import require
from stbench.train.batches import make_batch
from stbench.train.cost import expected_cost
from stbench.train.memory import stored_networks
from stbench.train.step import StageModel, make_optimizer, update_ema

BATCH, STEPS = 16, 3


def check_recipe(
    name: str,
    *,
    backbone: str = "sit",
    objective: str | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Check that a registered recipe conforms, by training each of its stages for a few steps.

    The data are random latents with the shape of the embedded digits. As in a run, later stages receive the
    artifacts of earlier ones. `objective` defaults to the one the backbone was published with; `options` are
    the recipe's options by name.

    Checked are planning (fields that identify a stage, costs), terms (shape, dtype, finite values), gradients
    of heads, teachers (frozen, unchanged, counted), random numbers, and that training twice gives the same
    weights. Raises AssertionError for the first violation, UserError for an unknown name or a bad option.
    """
    load_builtins()
    overrides: dict[str, Any] = {"train.batch": BATCH, "train.precision": "fp32"}
    overrides |= {f"recipe.{option}": value for option, value in options.items()}
    spec = resolve(RunRequest(backbone, name, objective=objective, steps=STEPS, overrides=overrides))
    prepared = _prepare(spec)
    runs = zip(prepared.stages, _train_all(prepared), _train_all(prepared), strict=True)
    for stage, first, second in runs:
        same = first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
        require(same, f"stage '{stage.name}' differs when trained twice: draw from step.batch.rng only")


def _prepare(spec: RunSpec) -> PreparedRun:
    """Check that every stage can be identified and costed before anything is trained."""
    try:
        prepared = prepare(spec)
    except TypeError as error:
        raise AssertionError(
            f"the fields of a supervision of '{spec.recipe.name}' must be plain data or dataclasses: {error}"
        ) from error
    for stage in prepared.stages:
        cost = expected_cost(prepared, stage, draws=1)
        require(cost.student > 0.0, f"stage '{stage.name}' costs nothing")
    return prepared


# Training with checks


@dataclasses.dataclass
class _CheckedSupervision(Supervision):
    """Delegates to a supervision and checks its terms on their way to the loss."""

    inner: Supervision

    @property
    def taps(self) -> Sequence[int]:
        """See `Supervision`."""
        return self.inner.taps

    @property
    def images(self) -> bool:
        """See `Supervision`."""
        return self.inner.images

    def setup(self, device: torch.device) -> None:
        """See `Supervision`."""
        self.inner.setup(device)

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """See `Supervision`."""
        return self.inner.heads(info)

    def corrupt(self, objective: Objective, batch: Batch) -> Noised:
        """See `Supervision`."""
        return self.inner.corrupt(objective, batch)

    def inputs(self, batch: Batch, noised: Noised) -> Mapping[str, Any]:
        """See `Supervision`."""
        return self.inner.inputs(batch, noised)

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Return the inner terms, after checking that each is finite float32 (B,)."""
        terms = self.inner.terms(step)
        for name, term in terms.items():
            shape, dtype = tuple(term.value.shape), term.value.dtype
            require(
                shape == (BATCH,),
                f"term '{name}' has shape {shape}, expected one value per sample, ({BATCH},)",
            )
            require(dtype == torch.float32, f"term '{name}' is {dtype}, expected torch.float32")
            require(bool(term.value.isfinite().all()), f"term '{name}' is not finite")
        return terms


class _FinishedStage:
    """A trained stage: its artifact, and the networks that later supervisions load from it."""

    def __init__(self, stage: PlannedStage, module: StageModel) -> None:
        self.loaded: list[Backbone] = []
        self._trained = {"raw": copy.deepcopy(module.student), "ema": copy.deepcopy(module.ema)}
        self.artifact = stage.artifact(self._load, flops=module.cost.total)

    def _load(self, weights: Weights) -> Backbone:
        self.loaded.append(copy.deepcopy(self._trained[weights]))
        return self.loaded[-1]


def _train_all(prepared: PreparedRun) -> Iterator[dict[str, Tensor]]:
    """Train the stages in order; yields the final weights of each, heads included."""
    finished: list[_FinishedStage] = []
    for stage in prepared.stages:
        # Build the stage on the artifacts of the earlier ones
        previous = finished[-1].artifact if finished else None
        artifacts = {earlier.artifact.name: earlier.artifact for earlier in finished}
        supervision = stage.definition.supervision(artifacts)
        module = _build_module(stage, supervision, prepared.spec, previous)
        # Teachers: networks loaded from artifacts, and those that the supervision stores itself
        loaded = [network for earlier in finished for network in earlier.loaded]
        teachers = loaded + stored_networks(supervision)
        before = copy.deepcopy([teacher.state_dict() for teacher in teachers])
        # Train, check, and keep the result for later stages
        _train(stage, module, prepared.spec)
        _check_teachers(stage, module, teachers, before)
        for earlier in finished:
            earlier.loaded.clear()
        finished.append(_FinishedStage(stage, module))
        yield module.state_dict()


def _build_module(
    stage: PlannedStage, supervision: Supervision, spec: RunSpec, previous: Artifact | None
) -> StageModel:
    """Build the student and heads of a stage as the engine does, with checked terms."""
    digits = get_dataset(spec.dataset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(spec.seed, "backbone"))
        student = build_backbone(spec.backbone, spec.objective, digits, heads=stage.definition.heads)
    if stage.definition.init == "previous" and previous is not None:
        load_trunk(student, previous.load("ema").state_dict())
    fit_heads(student, digits)
    depth = student.info.depth
    for block in supervision.taps:
        require(0 <= block < depth, f"stage '{stage.name}' taps block {block}, but there are {depth} blocks")
    objective = build_objective(spec.objective, spec.objective_options)
    module = StageModel(
        student,
        _CheckedSupervision(supervision),
        objective,
        seed=spec.seed,
        dataset_size=digits.size,
    )
    module.prepare(torch.device("cpu"))
    return module


def _train(stage: PlannedStage, module: StageModel, spec: RunSpec) -> None:
    """Take a few optimiser steps; check losses, gradients and cost of heads, and random numbers."""
    random_state = torch.get_rng_state()
    optimizer = make_optimizer(module.trained_parameters(), spec.train, torch.device("cpu"))
    dead = dict(nn.ModuleDict(module.trained_heads()).named_parameters())
    for step in range(STEPS):
        losses = module(_random_batch(step, spec))
        require(
            bool(losses.total.isfinite()), f"stage '{stage.name}': the loss is not finite at step {step + 1}"
        )
        optimizer.zero_grad()
        losses.total.backward()
        dead = {name: p for name, p in dead.items() if p.grad is None or not p.grad.any()}
        optimizer.step()
        update_ema(module.ema, module.student, 0.5)
    require(not dead, f"stage '{stage.name}': no gradient reaches {', '.join(dead)}")
    untouched = torch.equal(torch.get_rng_state(), random_state)
    require(untouched, f"stage '{stage.name}' draws from torch's global generator: use step.batch.rng")
    counted = module.cost.heads > 0.0 or not len(module.heads)
    require(counted, f"stage '{stage.name}': the FLOPs of its heads are not counted: use step.project")


def _random_batch(step: int, spec: RunSpec) -> Batch:
    """Random latents, labels and images for one step, with labels dropped as in a run."""
    digits = get_dataset(spec.dataset)
    rng = Rng(spec.seed, step * BATCH, BATCH)
    x0 = rng.normal("conformance", (digits.channels, digits.input_size, digits.input_size))
    labels = rng.integers("conformance-labels", digits.classes)
    shape = (BATCH, *digits.image_shape)
    images = torch.randint(256, shape, generator=rng.generator("conformance-images"), dtype=torch.uint8)
    index = torch.arange(BATCH)
    return make_batch(x0, labels, index, rng, spec.train.label_drop, digits.classes, {"images": images})


def _check_teachers(
    stage: PlannedStage,
    module: StageModel,
    teachers: Sequence[nn.Module],
    before: Sequence[Mapping[str, Tensor]],
) -> None:
    """Check that teachers and EMA are frozen and in eval mode, and teachers unchanged and counted."""
    trained = {id(p) for p in module.parameters()}
    for network in (*teachers, module.ema):
        require(not network.training, f"stage '{stage.name}': a teacher is in train mode")
        frozen = not any(p.requires_grad for p in network.parameters())
        require(frozen, f"stage '{stage.name}': a teacher is not frozen")
        apart = trained.isdisjoint(id(p) for p in network.parameters())
        require(apart, f"stage '{stage.name}': a teacher is among the trained parameters")
    for network, state in zip(teachers, before, strict=True):
        same = all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
        require(same, f"stage '{stage.name}' changes the weights of its teacher")
    counted = module.cost.teachers > 0.0 or not teachers
    require(counted, f"stage '{stage.name}': the FLOPs of its teacher are not counted: use step.teach")
