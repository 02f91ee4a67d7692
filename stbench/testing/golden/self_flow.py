"""Golden checks of per-token times, and of dual timesteps with and without attention separation.

Block numbers in the sidecars are 1-based.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from stbench.core.backbone import Backbone
from stbench.core.objective import Batch, Objective
from stbench.core.recipe import Step
from stbench.core.rng import Rng
from stbench.diffusion import LinearFlow
from stbench.recipes.self_flow import SelfFlow, Separation, TeacherInput
from stbench.recipes.sra import Distance, token_distance
from stbench.testing.golden.backbones import TOLERANCE, backbone, captured, load_network
from stbench.testing.golden.baseline_losses import dropped
from stbench.testing.golden.objectives import gradient, network, tolerated
from stbench.testing.golden.run import Check, Golden, check
from stbench.testing.golden.self_transcendence import denoising, filled, step_of, teacher_of

TEACHERS: Mapping[str, tuple[TeacherInput, bool]] = {
    "sra": ("per-group", True),
    "self_flow": ("min", False),
    "same": ("same", True),
    "self_flow_masked_as_released": ("min-released", True),
    "self_flow_masked_intended": ("min", True),
}
"""Name in the files -> the recipe's option, and whether the groups of the teacher are separated, too."""
DISTANCES: Mapping[str, Distance] = {
    "sml1": "smooth-l1",
    "l1": "l1",
    "l2": "l2",
    "cos_released": "cosine-released",
    "cos_channel": "cosine",
}


@check("backbone_sit_pertoken")
def per_token_times(golden: Golden) -> Iterator[Check]:
    """Check the ordinary pass, and one with a time per token: condition, modulation, blocks and output."""
    yield from backbone(golden)
    net, t = load_network(golden)[0], golden.t
    tokens = {"modulation": "blocks.0.adaLN_modulation", "tokens": "final_layer"}
    blocks = tuple(range(net.info.depth))
    inner = captured(
        net, list(tokens.values()), lambda: net.run(t["tok/x"], t["tok/t"], t["tok/y"], indices=blocks)
    )
    found = net.run(t["tok/x"], t["tok/t"], t["tok/y"], indices=blocks)
    assert found.prediction is not None and found.condition is not None
    yield golden.compare("tok/t", t["tok/t_groups"].t().gather(1, t["tok/group"]), t["tok/t"], TOLERANCE)
    yield golden.compare("tok/cond", found.condition[:1], t["tok/cond"], TOLERANCE)
    yield golden.compare(
        "tok/modulation_01", inner["blocks.0.adaLN_modulation"][:1], t["tok/modulation_01"], TOLERANCE
    )
    yield from tolerated(golden, {f"tok/feat_{k + 1:02}": found.features[k] for k in blocks})
    yield golden.compare("tok/tokens", inner["final_layer"], t["tok/tokens"], TOLERANCE)
    yield golden.compare("tok/out", found.prediction, t["tok/out"], TOLERANCE)


@dataclasses.dataclass
class _StoredDraws(SelfFlow):
    """Self-Flow with the stored random numbers."""

    stored: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def order(self, rng: Rng) -> Tensor:
        """The stored numbers, one per token."""
        return self.stored["in/mask_u"]

    def times(self, objective: Objective, rng: Rng) -> tuple[Tensor, Tensor]:
        """The stored times of both groups."""
        first, second = self.stored["in/t_groups"].double()
        return first, second

    def offsets(self, rng: Rng) -> tuple[Tensor, Tensor]:
        """The stored offsets of both groups."""
        first, second = self.stored["in/teacher_u"].double()
        return first, second


def _supervision(golden: Golden, tokens: int) -> _StoredDraws:
    settings = golden.meta["settings"]
    return _StoredDraws(
        student_block=settings["block_student"] - 1,
        teacher_block=settings["block_teacher"] - 1,
        ratio=settings["mask_ratio"],
        teacher="per-group",
        distance="smooth-l1",
        weight=settings["coefficient_in_training"],
        labels="true",
        separation="both" if settings["attention_separation"] else "none",
        t_max=settings["teacher_t_max"],
        time="flow",
        beta=settings["smooth_l1_beta"],
        tokens=tokens,
        stored=golden.t,
    )


@check("loss_dts")
def dual_timesteps(golden: Golden) -> Iterator[Check]:
    """Check groups, mixed input and loss of the student, and every teacher input with every distance."""
    objective, t = LinearFlow(), golden.t
    net, _ = network(golden)
    supervision = _supervision(golden, net.info.tokens)
    step = _student_step(golden, net, supervision)
    first = supervision.first_group(step.batch.rng)
    yield golden.compare("mid/group", (~first).long(), t["mid/group"], 0.0)
    yield golden.compare("mid/t_tokens", step.noised.t, t["mid/t_tokens"], TOLERANCE)
    yield from denoising(golden, objective, step.noised, step.prediction)
    if "mid/separation" in t:
        yield golden.compare("mid/separation", supervision.own_group(step.batch), t["mid/separation"], 0.0)
    for key in sorted(key for key in t if key.startswith("feat/block_")):
        yield golden.compare(key, step.features[int(key.rsplit("_", 1)[1]) - 1], t[key], TOLERANCE)
    student = step.project("head", step.features[supervision.student_block])
    yield golden.compare("mid/student_tokens", student, t["mid/student_tokens"], TOLERANCE)
    for name, (teacher, masked) in TEACHERS.items():
        if f"{name}/x_t" in t:
            separation: Separation = "both" if masked and supervision.separation == "both" else "none"
            changed = dataclasses.replace(supervision, teacher=teacher, separation=separation)
            yield from _teacher(golden, name, changed, step, student)


def _student_step(golden: Golden, net: Backbone, supervision: SelfFlow) -> Step:
    """The step of the student, with its corruption and its mask, and features of all blocks."""
    y, true = dropped(golden, net.info.classes), golden.t["in/y"]
    rng = _StoredNoise(0, 0, len(y), noise=golden.t["in/noise"])
    batch = Batch(golden.t["in/x0"], y, true, torch.arange(len(y)), rng)
    noised = supervision.corrupt(LinearFlow(), batch)
    heads = supervision.heads(net.info)
    filled(heads["head"], golden.group("head/"), "ap_head.")
    blocks = range(net.info.depth)
    step = step_of(net, noised, y, blocks, heads, **supervision.inputs(batch, noised))
    return dataclasses.replace(step, batch=batch, ema=teacher_of(net))


@dataclasses.dataclass(frozen=True)
class _StoredNoise(Rng):
    """Random numbers of a step whose noise is stored."""

    noise: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        """The stored noise (B,C,H,W)."""
        return self.noise


def _teacher(
    golden: Golden, name: str, supervision: SelfFlow, step: Step, student: Tensor
) -> Iterator[Check]:
    """Check one input of the teacher, its tokens, and the distances from the student's projected tokens."""
    t = golden.t
    x, times = supervision.teacher_input(step)
    expanded = times if times.ndim == 2 else times[:, None].expand(-1, supervision.tokens)
    yield from tolerated(golden, {f"{name}/t_tokens": expanded, f"{name}/x_t": x})
    mask: Any = {"mask": supervision.own_group(step.batch)} if supervision.separation == "both" else {}
    block = supervision.teacher_block
    target = step.teach(step.ema, x, times, step.batch.y_true, block=block, **mask)
    yield from tolerated(golden, {f"{name}/teacher_tokens": target})
    beta = supervision.beta
    for stored, distance in DISTANCES.items():
        value = token_distance(distance, student, target, beta)
        yield from tolerated(golden, {f"{name}/align_{stored}": value})
        if f"{name}/align_{stored}_mean" in t:
            # The whole recipe, from the features of the step to the mean of its term
            (term,) = dataclasses.replace(supervision, distance=distance).terms(step).values()
            yield from tolerated(golden, {f"{name}/align_{stored}_mean": term.value.mean()})
        if f"{name}/grad_{stored}" in t:
            # At the stored tokens: smooth-l1 divides their rounding errors by beta
            leaf = t["mid/student_tokens"].clone().requires_grad_()
            at_leaf = token_distance(distance, leaf, t[f"{name}/teacher_tokens"], beta).mean()
            yield gradient(golden, f"{name}/grad_{stored}", at_leaf, leaf)
