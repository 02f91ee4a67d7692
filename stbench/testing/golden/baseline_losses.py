"""Golden checks of the losses of REPA, SRA, LayerSync and Dispersive Loss.

Block numbers in the sidecars are 1-based.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from stbench.core.recipe import Cost, Step, Supervision
from stbench.diffusion import ImprovedDdpm, LinearFlow
from stbench.models import align
from stbench.models.align import Clock
from stbench.models.encoders import EncoderSpec
from stbench.recipes.dispersive import Dispersive
from stbench.recipes.layersync import LayerSync
from stbench.recipes.repa import Repa
from stbench.recipes.sra import Decay, Distance, Sra
from stbench.testing.golden.objectives import TOLERANCE, gradient, network, tolerated
from stbench.testing.golden.run import Check, Golden, check
from stbench.testing.golden.self_transcendence import LABEL_DROP, denoising, filled, step_of, teacher_of


def value(supervision: Supervision, step: Step) -> Tensor:
    """The mean of a supervision's only term."""
    (term,) = supervision.terms(step).values()
    return term.value.mean()


def with_tokens(step: Step, block: int, tokens: Tensor) -> Step:
    """A copy of the step in which the features of `block` are `tokens` (B,N,D)."""
    return dataclasses.replace(step, features={**step.features, block: tokens})


def leaf_gradient(golden: Golden, name: str, supervision: Supervision, step: Step, block: int) -> Check:
    """Compare the gradient of a supervision's loss with respect to the features of one block."""
    leaf = step.features[block].detach().requires_grad_()
    return gradient(golden, name, value(supervision, with_tokens(step, block, leaf)), leaf)


@check("loss_repa")
def repa(golden: Golden) -> Iterator[Check]:
    """Check the velocity loss, and the cosine of projected and encoder tokens with its gradient."""
    objective, t = LinearFlow(), golden.t
    noised = objective.at(t["in/x0"], t["in/noise"], t["in/t"])
    net, stored = network(golden)
    block = golden.meta["settings"]["encoder_depth"] - 1
    out, hidden = stored["projectors.0.4.weight"].shape
    supervision = StoredTokens(
        (EncoderSpec("cached", "golden", out, ""),), block, 0.5, hidden, net.info.tokens
    )
    supervision.given = [t["in/z"]]
    heads = supervision.heads(net.info)
    filled(heads["0"], stored, "projectors.0.")
    step = step_of(net, noised, t["in/y"], supervision.taps, heads)
    yield from denoising(golden, objective, noised, step.prediction)
    projected = step.project("0", step.features[block])
    yield from tolerated(golden, {"mid/z_tilde": projected, "out/proj": value(supervision, step)})
    heads["0"] = nn.Identity()
    yield leaf_gradient(golden, "grad/z_tilde", supervision, with_tokens(step, block, projected), block)


@dataclasses.dataclass
class StoredTokens(Repa):
    """REPA with stored tokens instead of an encoder."""

    given: list[Tensor] = dataclasses.field(default_factory=list, init=False)
    eps: float | None = dataclasses.field(default=None, init=False)
    """Added to the standard deviation by iREPA's normalisation, if the file names it."""

    def normalised(self, z: Tensor) -> Tensor:
        """The targets (B,N,Dz), normalised with `eps`."""
        if self.alpha is None or self.eps is None:
            return super().normalised(z)
        return align.standardise(z, self.alpha, self.eps)

    def targets(self, step: Step) -> list[Tensor]:
        """The stored tokens."""
        return self.given


def dropped(golden: Golden, null: int) -> Tensor:
    """The labels after dropping them with the stored random numbers."""
    return torch.where(golden.t["in/label_drop_u"] < LABEL_DROP, null, golden.t["in/y"])


@check("loss_sra_sit")
def sra_sit(golden: Golden) -> Iterator[Check]:
    """Check SRA on SiT: every distance, and a teacher at less noise with the same labels."""
    objective, t, settings = LinearFlow(), golden.t, golden.meta["settings"]
    noised = objective.at(t["in/x0"], t["in/noise"], t["in/t"])
    net, _ = network(golden)
    y = dropped(golden, net.info.classes)
    supervision = sra_of(golden, settings["t_max"], "flow")
    heads = supervision.heads(net.info)
    filled(heads["head"], golden.group("head/"), "ap_head.")
    step = step_of(net, noised, y, supervision.taps, heads)
    yield from denoising(golden, objective, noised, step.prediction)
    student = step.project("head", step.features[supervision.student_block])
    earlier = supervision.teacher_time(objective, noised.t_host, t["in/offset_u"].double())
    cleaner = objective.at(noised.x0, noised.noise, earlier)
    target = step.teach(teacher_of(net), cleaner.x_t, cleaner.t, y, block=supervision.teacher_block)

    def mean(distance: Distance) -> Tensor:
        return dataclasses.replace(supervision, distance=distance).measure(student, target).mean()

    found = {
        "mid/student_tokens": student,
        "mid/teacher_tokens": target,
        "out/align_sml1_mean": mean("smooth-l1"),
        "out/align_l2_mean": mean("l2"),
        "out/align_l1_mean": mean("l1"),
        "out/align_cos_mean": mean("cosine-released"),
        "out/align_cos_channel_mean": mean("cosine"),
    }
    yield golden.compare("mid/teacher_t", earlier.float(), golden.t["mid/teacher_t"], TOLERANCE)
    yield from tolerated(golden, found)
    rows = t["out/align_cos_reference_map"].mean(1)
    released = 1.0 - align.cosine_released(student, target)
    yield golden.compare("out/align_cos_reference_map rows", released, rows, TOLERANCE)
    yield from sra_weights(golden, supervision)


def sra_of(golden: Golden, t_max: float, clock: Clock) -> Sra:
    """SRA with the settings of a golden file and the published weight."""
    settings = golden.meta["settings"]
    return Sra(
        student_block=settings["block_student"] - 1,
        teacher_block=settings["block_teacher"] - 1,
        distance="smooth-l1",
        weight=0.2,
        schedule="256",
        t_max=t_max,
        time=clock,
        beta=settings["smooth_l1_beta"],
    )


def sra_weights(golden: Golden, supervision: Sra) -> Iterator[Check]:
    """Check the published weights by epoch: both resolutions, DiT, and the constant weight of the cosines."""
    schedules: dict[str, tuple[float, Decay]] = {
        "res256": (0.2, "256"),
        "res512": (0.2, "512"),
        "dit256": (0.04, "256"),
        "cos": (0.5, "constant"),
    }
    for epoch, expected in golden.meta["loss_weight_by_epoch"].items():
        for name, (weight, schedule) in schedules.items():
            if name in expected:
                changed = dataclasses.replace(supervision, weight=weight, schedule=schedule)
                found = torch.tensor(changed.weight_at(int(epoch)))
                yield golden.compare(f"weight {name} {epoch}", found, torch.tensor(expected[name]), 1e-6)


@check("loss_sra_dit")
def sra_dit(golden: Golden) -> Iterator[Check]:
    """Check SRA on DiT: the teacher's time moves by whole steps and never below step 1."""
    objective, t, settings = ImprovedDdpm(), golden.t, golden.meta["settings"]
    noised = objective.at(t["in/x_start"], t["in/noise"], objective.time(t["in/t"]))
    net, _ = network(golden)
    y = dropped(golden, net.info.classes)
    supervision = sra_of(golden, settings["t_max_steps"] / objective.steps, "native")
    heads = supervision.heads(net.info)
    filled(heads["head"], golden.group("head/"), "ap_head.")
    step = step_of(net, noised, y, supervision.taps, heads)
    student = step.project("head", step.features[supervision.student_block])
    draws = (t["in/offset"].double() + 0.5) / settings["t_max_steps"]
    earlier = supervision.teacher_time(objective, noised.t_host, draws)
    cleaner = objective.at(noised.x0, noised.noise, earlier)
    target = step.teach(teacher_of(net), cleaner.x_t, cleaner.t, y, block=supervision.teacher_block)
    found = {
        "mid/teacher_t": objective.index(cleaner.t_host),
        "out/mse": objective.mse(step.prediction, noised),
        "out/vb": objective.bound(step.prediction, noised),
        "out/loss": objective.loss(step.prediction, noised),
        "out/align": supervision.measure(student, target).mean(),
    }
    yield from tolerated(golden, found)


@check("loss_layersync")
def layersync(golden: Golden) -> Iterator[Check]:
    """Check LayerSync: one pair with its gradient, and several pairs."""
    objective, t, settings = LinearFlow(), golden.t, golden.meta["settings"]
    noised = objective.at(t["in/data"], t["in/noise"], 1.0 - t["in/t"].double())
    net, _ = network(golden)
    weak, strong = settings["weak_block"] - 1, settings["strong_block"] - 1
    pairs = [(a - 1, b - 1) for a, b in settings["multi_blocks"]]
    supervision, several = LayerSync(((weak, strong),), 0.2, "sum"), LayerSync(tuple(pairs), 0.2, "sum")
    blocks = sorted({*supervision.taps, *several.taps})
    step = step_of(net, noised, t["in/y"], blocks, nn.ModuleDict())
    yield from denoising(golden, objective, noised, step.prediction)
    yield leaf_gradient(golden, "grad/weak_tokens", supervision, step, weak)
    found = {
        "mid/weak_tokens": step.features[weak],
        "mid/strong_tokens": step.features[strong],
        "out/reg_tokens": -align.token_cosine(step.features[weak], step.features[strong]),
        "out/reg": value(supervision, step),
        "multi/reference_mean": value(dataclasses.replace(several, several="released"), step),
        "multi/pair_values": torch.stack([value(LayerSync((pair,), 0.2, "sum"), step) for pair in pairs]),
    }
    yield from tolerated(golden, found)
    total = t["multi/pair_values"].sum()
    yield golden.compare("multi/pair_values summed", value(several, step), total, TOLERANCE)


@check("loss_dispersive")
def dispersive(golden: Golden) -> Iterator[Check]:
    """Check the dispersive loss at two temperatures, and its gradient."""
    settings, z = golden.meta["settings"], golden.t["in/z"]
    absent = cast(Any, None)  # Dispersive reads the features and the batch size only
    step = Step(
        batch=absent,
        noised=absent,
        prediction=absent,
        features={0: z},
        heads=nn.ModuleDict(),
        ema=absent,
        objective=absent,
        info=absent,
        images_seen=0,
        dataset_size=len(z),
        global_batch=len(z),
        cost=Cost(),
    )
    supervision = Dispersive(
        block=0,
        weight=settings["coefficient_in_training"],
        tau=settings["tau_reference"],
        scope="gathered",
        local_batch=1,
    )
    other = dataclasses.replace(supervision, tau=settings["tau_other"])
    yield leaf_gradient(golden, "grad/z", supervision, step, 0)
    found = {
        "mid/pairwise": align.pairwise(z),
        "out/loss_tau1": value(supervision, step),
        "out/loss_tau": value(other, step),
    }
    yield from tolerated(golden, found)
