"""Golden check of Internal Guidance's loss; VAE alignment's is with Self-Transcendence's."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from stbench.core.backbone import kept_heads
from stbench.diffusion import LinearFlow
from stbench.models.official_heads import HEAD
from stbench.recipes.deep_supervision import DeepSupervision, internal_guidance
from stbench.testing.golden.baseline_losses import dropped, leaf_gradient
from stbench.testing.golden.guides import with_head
from stbench.testing.golden.objectives import gradient, tolerated
from stbench.testing.golden.run import Check, Golden, check
from stbench.testing.golden.self_transcendence import denoising, step_of


@check("loss_internal_guidance")
def internal_guidance_loss(golden: Golden) -> Iterator[Check]:
    """Check the losses of the network and of its intermediate head, their sum, and the head's gradients."""
    objective, t, settings = LinearFlow(), golden.t, golden.meta["settings"]
    noised = objective.at(t["in/x0"], t["in/noise"], t["in/t"])
    net, _ = with_head(golden)
    block = settings["block"] - 1
    (stage,) = internal_guidance(net.info, block=block, weight=settings["coefficient_in_training"])
    supervision = stage.supervision({})
    assert isinstance(supervision, DeepSupervision)
    y, heads = dropped(golden, golden.meta["null_label"]), nn.ModuleDict(kept_heads(net))
    step = step_of(net, noised, y, supervision.taps, heads)
    yield from denoising(golden, objective, noised, step.prediction)

    (term,) = supervision.terms(step).values()
    head = step.project(HEAD, step.features[block], step.condition)
    found = {
        "mid/pred_intermediate": head,
        f"feat/block_{block + 1:02}": step.features[block],
        "out/intermediate": term.value,
        "out/total": objective.loss(step.prediction, noised).mean() + term.weight * term.value.mean(),
    }
    yield from tolerated(golden, found)
    leaf = head.detach().requires_grad_()
    error = supervision.error(objective, leaf, noised).mean()
    yield gradient(golden, "grad/pred_intermediate", error, leaf)
    yield leaf_gradient(golden, "grad/tokens", supervision, step, block)
