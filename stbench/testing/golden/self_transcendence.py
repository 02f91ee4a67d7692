"""Golden checks of Self-Transcendence's two stages, and helpers for checks of losses.

Block numbers in the sidecars are 1-based.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from stbench.core.backbone import Backbone
from stbench.core.objective import Batch, Noised, Objective
from stbench.core.recipe import Artifact, Cost, Step
from stbench.core.rng import Rng
from stbench.diffusion import LinearFlow
from stbench.models import align
from stbench.recipes.deep_supervision import VaeAlign
from stbench.recipes.self_transcendence import SelfTranscendence
from stbench.testing.golden.objectives import TOLERANCE, network, tolerated
from stbench.testing.golden.run import Check, Golden, check

GUIDED = 1e-4
LABEL_DROP = 0.1
TEACHER_SCALE = 0.9

Reducible = TypeVar("Reducible", VaeAlign, SelfTranscendence)


def teacher_of(net: Backbone) -> Backbone:
    """The teacher of the golden files: the network with every tensor but the position embedding times 0.9."""
    teacher = copy.deepcopy(net)
    state = net.state_dict()
    teacher.load_state_dict(
        {k: v if k.endswith("pos_embed") else TEACHER_SCALE * v for k, v in state.items()}
    )
    return teacher


def filled(module: nn.Module, state: Mapping[str, Tensor], prefix: str) -> nn.Module:
    """Load the tensors stored under `prefix` into a module, and return it."""
    module.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
    return module


def denoising(golden: Golden, objective: Objective, noised: Noised, prediction: Tensor) -> Iterator[Check]:
    """Compare input, target, prediction and denoising loss, as far as they are stored."""
    found = {
        "mid/x_t": noised.x_t,
        "mid/target": objective.velocity_target(noised),
        "mid/pred": prediction,
        "out/denoise": objective.loss(prediction, noised),
    }
    for name, value in found.items():
        if name in golden.t:
            yield golden.compare(name, value, golden.t[name], TOLERANCE)


def step_of(
    net: Backbone,
    noised: Noised,
    y: Tensor,
    blocks: Sequence[int],
    heads: Mapping[str, nn.Module] | nn.ModuleDict,
    **inputs: Any,
) -> Step:
    """The step that the engine would build for a supervision, with features of 0-based `blocks`.

    `inputs` are optional inputs of the forward pass.
    """
    found = net.run(noised.x_t, noised.t, y, indices=blocks, **inputs)
    assert found.prediction is not None
    size = len(y)
    batch = Batch(noised.x0, y, y, torch.arange(size), Rng(0, 0, size))
    objective = LinearFlow()
    return Step(
        batch=batch,
        noised=noised,
        prediction=found.prediction,
        features=found.features,
        condition=found.condition,
        attention=found.attention,
        kept=found.kept,
        prefix=found.prefix,
        prefix_out=found.prefix_out,
        heads=heads,
        ema=net,
        objective=objective,
        info=net.info,
        images_seen=0,
        dataset_size=size,
        global_batch=size,
        cost=Cost(),
    )


def reductions(
    golden: Golden, name: str, step: Step, supervision: Reducible, tolerance: float
) -> Iterator[Check]:
    """Compare a supervision's loss (B,) before masking, and the ways of reducing it.

    The mean over the samples inside the interval follows from the stored mean over the batch.
    """

    def value(**options: Any) -> Tensor:
        (term,) = replaced(supervision, **options).terms(step).values()
        return term.value

    everywhere = value(mask="samples", interval=(0.0, 1.0))
    found = {
        f"out/{name}_per_sample": everywhere,
        f"out/{name}_mean_masked_per_sample": value(mask="samples").mean(),
        f"out/{name}_mean_as_released": value(mask="released").mean(),
        f"out/{name}_mean_unmasked": everywhere.mean(),
    }
    inside = align.in_interval(step.objective, step.noised.t_host, supervision.interval)
    yield golden.compare("mid/mask", inside.float(), golden.t["mid/mask"].float(), 0.0)
    yield from tolerated(golden, found, tolerance)
    stored, mask = golden.t[f"out/{name}_mean_masked_per_sample"], golden.t["mid/mask"]
    expected = stored * len(mask) / mask.sum().clamp(min=1)
    yield golden.compare(f"{name} mean inside", value(mask="inside-mean").mean(), expected, tolerance)


def replaced(supervision: Reducible, **options: Any) -> Reducible:
    """A copy of the supervision with other options, set up again."""
    changed = dataclasses.replace(supervision, **options)
    changed.setup(torch.device("cpu"))
    return changed


@check("loss_vae_align")
def vae_align(golden: Golden) -> Iterator[Check]:
    """Check stage 1: the velocity predicted from one block, inside an interval of time."""
    objective, t, settings = LinearFlow(), golden.t, golden.meta["settings"]
    noised = objective.at(t["in/x0"], t["in/noise"], t["in/t"])
    net, _ = network(golden)
    block = settings["block"] - 1
    supervision = VaeAlign(block, settings["projector_hidden"], interval=tuple(settings["t_range"]))
    heads, stored = supervision.heads(net.info), golden.group("head/")
    mlp, final = cast(nn.Sequential, heads["velocity"])
    filled(mlp, stored, "projectors.")
    filled(final, stored, "projectors_final.")
    step = step_of(net, noised, t["in/y"], supervision.taps, heads)
    yield from denoising(golden, objective, noised, step.prediction)
    yield from tolerated(golden, {"mid/head_pred": step.project("velocity", step.features[block])})
    yield from reductions(golden, "head", step, supervision, TOLERANCE)


@check("loss_self_transcendence")
def self_transcendence(golden: Golden) -> Iterator[Check]:
    """Check stage 2: the student's projected tokens and the teacher's guided ones, inside the interval."""
    objective, t, settings = LinearFlow(), golden.t, golden.meta["settings"]
    noised = objective.at(t["in/x0"], t["in/noise"], t["in/t"])
    net, _ = network(golden)
    teacher, stored = teacher_of(net), golden.group("head/")
    student_block, block = settings["student_block"] - 1, settings["teacher_block"] - 1
    supervision = SelfTranscendence(
        Artifact(
            name="teacher",
            fingerprint="golden",
            checkpoint="",
            sha256={},
            steps=0,
            images_seen=0,
            seconds=0.0,
            flops=0.0,
            loader=lambda weights: teacher,
        ),
        student_block=student_block,
        teacher_block=block,
        hidden=len(stored["projectors.0.bias"]),
        guidance=settings["guidance"],
        interval=tuple(settings["t_range"]),
    )
    supervision.setup(torch.device("cpu"))
    heads = supervision.heads(net.info)
    filled(heads["projector"], stored, "projectors.")
    step = step_of(net, noised, t["in/y"], supervision.taps, heads)
    yield from denoising(golden, objective, noised, step.prediction)
    null = torch.full_like(t["in/y"], net.info.classes)
    cond, uncond = (step.teach(teacher, noised.x_t, noised.t, y, block=block) for y in (t["in/y"], null))
    projected = step.project("projector", step.features[student_block])
    features = {"mid/teacher_cond": cond, "mid/teacher_uncond": uncond, "mid/student_proj": projected}
    yield from tolerated(golden, features)
    guided = supervision.guided(step, torch.arange(len(null)))
    yield golden.compare("mid/guided", guided, t["mid/guided"], GUIDED)
    yield from reductions(golden, "feat", step, supervision, GUIDED)
