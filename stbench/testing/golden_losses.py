"""Golden checks of every recipe's loss. Block numbers in the sidecars count from 1."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from stbench import align
from stbench.contracts import Artifact, Backbone, Batch, Cost, Noised, Objective, Step
from stbench.objectives import ImprovedDdpm, LinearFlow
from stbench.recipes.self_transcendence import SelfTranscendence, VaeAlign
from stbench.rng import Rng
from stbench.testing.golden import Check, Golden, check
from stbench.testing.golden_objectives import TOLERANCE, gradient, network, run, tolerated

GUIDED = 1e-4
LABEL_DROP = 0.1
TEACHER_SCALE = 0.9

Reducible = TypeVar("Reducible", VaeAlign, SelfTranscendence)


def teacher_of(net: Backbone) -> Backbone:
    """The golden teacher: every tensor but the position embedding times 0.9."""
    teacher = copy.deepcopy(net)
    state = net.state_dict()
    teacher.load_state_dict(
        {k: v if k.endswith("pos_embed") else TEACHER_SCALE * v for k, v in state.items()}
    )
    return teacher


def filled(module: nn.Module, state: Mapping[str, Tensor], prefix: str) -> nn.Module:
    """The module with the tensors stored under `prefix`."""
    module.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
    return module


def denoising(golden: Golden, objective: Objective, noised: Noised, prediction: Tensor) -> Iterator[Check]:
    """The checks that most loss files share: input, target, prediction and loss, where stored."""
    found = {
        "mid/x_t": noised.x_t,
        "mid/target": objective.velocity_target(noised),
        "mid/pred": prediction,
        "out/denoise": objective.loss(prediction, noised),
    }
    for name, value in found.items():
        if name in golden.t:
            yield golden.compare(name, value, golden.t[name], TOLERANCE)


def step_of(net: Backbone, noised: Noised, y: Tensor, blocks: Sequence[int], heads: nn.ModuleDict) -> Step:
    """What the engine would show a recipe: one batch with its prediction and 0-based blocks."""
    prediction, features = net.forward_intermediates(noised.x_t, noised.t, y, indices=blocks)
    assert prediction is not None
    size = len(y)
    batch = Batch(noised.x0, y, y, torch.arange(size), Rng(0, 0, size))
    objective = LinearFlow()
    return Step(batch, noised, prediction, features, heads, net, objective, net.info, 0, size, size, Cost())


def reductions(golden: Golden, name: str, step: Step, recipe: Reducible, tolerance: float) -> Iterator[Check]:
    """A recipe's loss (B,) before masking, and the three ways of reducing it."""

    def value(**options: Any) -> Tensor:
        (term,) = replaced(recipe, **options).terms(step).values()
        return term.value

    everywhere = value(mask="samples", interval=(0.0, 1.0))
    found = {
        f"out/{name}_per_sample": everywhere,
        f"out/{name}_mean_masked_per_sample": value(mask="samples").mean(),
        f"out/{name}_mean_as_released": value(mask="released").mean(),
        f"out/{name}_mean_unmasked": everywhere.mean(),
    }
    inside = align.in_interval(step.objective, step.noised.t_host, recipe.interval)
    yield golden.compare("mid/mask", inside.float(), golden.t["mid/mask"].float(), 0.0)
    yield from tolerated(golden, found, tolerance)


def replaced(recipe: Reducible, **options: Any) -> Reducible:
    """The recipe with other options, set up anew."""
    changed = dataclasses.replace(recipe, **options)
    changed.setup(torch.device("cpu"))
    return changed


@check("loss_vae_align")
def vae_align(golden: Golden) -> Iterator[Check]:
    """Stage 1 of Self-Transcendence: an auxiliary velocity from one block, inside an interval of time."""
    objective, t, settings = LinearFlow(), golden.t, golden.meta["settings"]
    noised = objective.at(t["in/x0"], t["in/noise"], t["in/t"])
    net, _ = network(golden)
    block = settings["block"] - 1
    recipe = VaeAlign(block, settings["projector_hidden"], interval=tuple(settings["t_range"]))
    heads, stored = recipe.heads(net.info), golden.group("head/")
    mlp, final = cast(nn.Sequential, heads["velocity"])
    filled(mlp, stored, "projectors.")
    filled(final, stored, "projectors_final.")
    step = step_of(net, noised, t["in/y"], recipe.taps, heads)
    yield from denoising(golden, objective, noised, step.prediction)
    yield from tolerated(golden, {"mid/head_pred": step.project("velocity", step.features[block])})
    yield from reductions(golden, "head", step, recipe, TOLERANCE)


@check("loss_self_transcendence")
def self_transcendence(golden: Golden) -> Iterator[Check]:
    """Stage 2: a student's projected tokens against a teacher's guided ones, inside an interval of time."""
    objective, t, settings = LinearFlow(), golden.t, golden.meta["settings"]
    noised = objective.at(t["in/x0"], t["in/noise"], t["in/t"])
    net, _ = network(golden)
    teacher, stored = teacher_of(net), golden.group("head/")
    student_block, block = settings["student_block"] - 1, settings["teacher_block"] - 1
    recipe = SelfTranscendence(
        Artifact("teacher", "golden", "", {}, 0, 0, 0.0, 0.0, lambda weights: teacher),
        student_block,
        block,
        hidden=len(stored["projectors.0.bias"]),
        guidance=settings["guidance"],
        interval=tuple(settings["t_range"]),
    )
    recipe.setup(torch.device("cpu"))
    heads = recipe.heads(net.info)
    filled(heads["projector"], stored, "projectors.")
    step = step_of(net, noised, t["in/y"], recipe.taps, heads)
    yield from denoising(golden, objective, noised, step.prediction)
    null = torch.full_like(t["in/y"], net.info.classes)
    cond, uncond = (step.teach(teacher, noised.x_t, noised.t, y, block=block) for y in (t["in/y"], null))
    projected = step.project("projector", step.features[student_block])
    features = {"mid/teacher_cond": cond, "mid/teacher_uncond": uncond, "mid/student_proj": projected}
    yield from tolerated(golden, features)
    guided = recipe.guided(step, torch.arange(len(null)))
    yield golden.compare("mid/guided", guided, t["mid/guided"], GUIDED)
    yield from reductions(golden, "feat", step, recipe, GUIDED)


@check("loss_repa")
def repa(golden: Golden) -> Iterator[Check]:
    """Velocity loss, and the cosine between projected tokens and an encoder's, with its gradient."""
    objective, t = LinearFlow(), golden.t
    noised = objective.at(t["in/x0"], t["in/noise"], t["in/t"])
    net, heads = network(golden)
    prediction, (tokens,) = run(net, noised, t["in/y"], golden.meta["settings"]["encoder_depth"])
    yield from denoising(golden, objective, noised, prediction)
    out, hidden = heads["projectors.0.4.weight"].shape
    projected = filled(align.projector(net.info.width, hidden, out), heads, "projectors.0.")(tokens)
    leaf = projected.detach().requires_grad_()
    loss = -align.cosine(leaf, t["in/z"]).mean()
    yield from tolerated(golden, {"mid/z_tilde": projected, "out/proj": loss})
    yield gradient(golden, "grad/z_tilde", loss, leaf)


def dropped(golden: Golden, null: int) -> Tensor:
    """The labels after dropping with the stored draws."""
    return torch.where(golden.t["in/label_drop_u"] < LABEL_DROP, null, golden.t["in/y"])


@check("loss_sra_sit")
def sra_sit(golden: Golden) -> Iterator[Check]:
    """Self-representation alignment on SiT: every distance, a teacher at less noise with the same labels."""
    objective, t, settings = LinearFlow(), golden.t, golden.meta["settings"]
    noised = objective.at(t["in/x0"], t["in/noise"], t["in/t"])
    net, _ = network(golden)
    y = dropped(golden, net.info.classes)
    prediction, (tokens,) = run(net, noised, y, settings["block_student"])
    yield from denoising(golden, objective, noised, prediction)
    student = filled(align.sra_head(net.info.width), golden.group("head/"), "ap_head.")(tokens)
    earlier = (t["in/t"] - settings["t_max"] * t["in/offset_u"]).clamp(0.0, 1.0)
    _, (target,) = run(
        teacher_of(net), objective.at(noised.x0, noised.noise, earlier), y, settings["block_teacher"]
    )
    found = {
        "mid/teacher_t": earlier,
        "mid/student_tokens": student,
        "mid/teacher_tokens": target,
        "out/align_sml1_mean": align.smooth_l1(student, target, settings["smooth_l1_beta"]).mean(),
        "out/align_l2_mean": align.mse(student, target).mean(),
        "out/align_l1_mean": align.l1(student, target).mean(),
        "out/align_cos_mean": 1.0 - align.cosine_released(student, target).mean(),
        "out/align_cos_channel_mean": 1.0 - align.cosine(student, target).mean(),
    }
    yield from tolerated(golden, found)
    rows = t["out/align_cos_reference_map"].mean(1)
    released = 1.0 - align.cosine_released(student, target)
    yield golden.compare("out/align_cos_reference_map rows", released, rows, TOLERANCE)


@check("loss_sra_dit")
def sra_dit(golden: Golden) -> Iterator[Check]:
    """Self-representation alignment on DiT: whole steps, the teacher's never below 1."""
    objective, t, settings = ImprovedDdpm(), golden.t, golden.meta["settings"]
    noised = objective.at(t["in/x_start"], t["in/noise"], objective.time(t["in/t"]))
    net, _ = network(golden)
    y = dropped(golden, net.info.classes)
    prediction, (tokens,) = run(net, noised, y, settings["block_student"])
    student = filled(align.sra_head(net.info.width), golden.group("head/"), "ap_head.")(tokens)
    earlier = (t["in/t"] - t["in/offset"]).clamp(1, objective.steps - 1)
    at_teacher = objective.at(noised.x0, noised.noise, objective.time(earlier))
    _, (target,) = run(teacher_of(net), at_teacher, y, settings["block_teacher"])
    found = {
        "mid/teacher_t": objective.index(at_teacher.t_host),
        "out/mse": objective.mse(prediction, noised),
        "out/vb": objective.bound(prediction, noised),
        "out/loss": objective.loss(prediction, noised),
        "out/align": align.smooth_l1(student, target, settings["smooth_l1_beta"]).mean(),
    }
    yield from tolerated(golden, found)


@check("loss_layersync")
def layersync(golden: Golden) -> Iterator[Check]:
    """A weak block against a stronger one of the same pass, its gradient, and several pairs."""
    objective, t, settings = LinearFlow(), golden.t, golden.meta["settings"]
    noised = objective.at(t["in/data"], t["in/noise"], 1.0 - t["in/t"].double())
    net, _ = network(golden)
    prediction, (weak, strong) = run(net, noised, t["in/y"], settings["weak_block"], settings["strong_block"])
    yield from denoising(golden, objective, noised, prediction)
    leaf = weak.clone().requires_grad_()
    loss = -align.cosine(leaf, strong.detach()).mean()
    yield gradient(golden, "grad/weak_tokens", loss, leaf)
    found = {
        "mid/weak_tokens": weak,
        "mid/strong_tokens": strong,
        "out/reg_tokens": -align.token_cosine(weak, strong),
        "out/reg": loss,
    }
    yield from tolerated(golden, found)
    pairs = [run(net, noised, t["in/y"], *pair)[1] for pair in settings["multi_blocks"]]
    values = torch.stack([-align.cosine(a, b).mean() for a, b in pairs])
    yield from tolerated(golden, {"multi/pair_values": values, "multi/reference_mean": values[-1]})


@check("loss_dispersive")
def dispersive(golden: Golden) -> Iterator[Check]:
    """The dispersive loss at two temperatures, and its gradient."""
    settings, z = golden.meta["settings"], golden.t["in/z"].clone().requires_grad_()
    loss = align.dispersive(z, settings["tau_reference"])
    yield gradient(golden, "grad/z", loss, z)
    found = {
        "mid/pairwise": align.pairwise(z),
        "out/loss_tau1": loss,
        "out/loss_tau": align.dispersive(z, settings["tau_other"]),
    }
    yield from tolerated(golden, found)
