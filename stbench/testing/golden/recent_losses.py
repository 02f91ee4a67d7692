"""Golden checks of the losses of contrastive flow matching, iREPA and SARA's structural term.

Block numbers in the sidecars are 1-based.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from stbench.core.recipe import Step
from stbench.core.rng import Rng
from stbench.diffusion import LinearFlow
from stbench.models import align
from stbench.models.encoders import EncoderSpec
from stbench.recipes.delta_fm import DeltaFm, Unconditional
from stbench.testing.golden.baseline_losses import StoredTokens, dropped, with_tokens
from stbench.testing.golden.objectives import TOLERANCE, gradient, network, tolerated
from stbench.testing.golden.run import Check, Golden, check
from stbench.testing.golden.self_transcendence import denoising, filled, step_of

PROJECTOR = "projectors.0."


@dataclass(frozen=True)
class _Stored(Rng):
    """Returns stored draws."""

    draws: Tensor | None = None

    def integers(self, stream: str, high: int) -> Tensor:
        """The stored draws."""
        assert self.draws is not None and int(self.draws.max()) < high
        return self.draws


@check("loss_delta_fm")
def delta_fm(golden: Golden) -> Iterator[Check]:
    """Check the negatives and the contrast with its gradient, with and without unlabelled samples."""
    objective, t = LinearFlow(), golden.t
    noised = objective.at(t["in/x0"], t["in/noise"], t["in/t"])
    net, _ = network(golden)
    y = dropped(golden, net.info.classes)
    step = step_of(net, noised, y, (), nn.ModuleDict())
    rng = _Stored(0, 0, len(y), draws=t["in/negative_u"])
    step = replace(step, batch=replace(step.batch, rng=rng))
    yield golden.compare("mid/labels", y, t["mid/labels"], 0.0)
    yield from denoising(golden, objective, noised, step.prediction)
    yield from _contrast(golden, step, "", "contrast")
    yield from _contrast(golden, step, "skip/", "skip")


def _contrast(golden: Golden, step: Step, prefix: str, unconditional: Unconditional) -> Iterator[Check]:
    supervision = DeltaFm(golden.meta["settings"]["lambda"], "micro-batch", unconditional, None)
    negatives = golden.t["mid/target"][golden.t["in/negative"]]
    yield golden.compare(f"{prefix}negatives", supervision.negatives(step), negatives, TOLERANCE)
    leaf = step.prediction.detach().requires_grad_()
    (term,) = supervision.terms(replace(step, prediction=leaf)).values()
    denoise = step.objective.loss(leaf, step.noised)
    total = denoise + term.weight * term.value
    found = {"out/denoise": denoise, "out/contrast": term.value, "out/loss": total}
    yield from tolerated(golden, {prefix + name: value for name, value in found.items()})
    yield gradient(golden, f"{prefix}grad/pred", total.mean(), leaf)


@check("loss_irepa")
def irepa(golden: Golden) -> Iterator[Check]:
    """Check the normalised target, and the cosine after a convolution of either kernel with its gradient."""
    t, settings = golden.t, golden.meta["settings"]
    for name, alpha in (("mid/z_norm", settings["alpha"]), ("mid/z_norm_alpha1", 1.0)):
        found = align.standardise(t["in/z"], alpha, settings["eps"])
        yield golden.compare(name, found, t[name], TOLERANCE)
    for prefix, head in (("", "head/"), ("k1/", "head_k1/")):
        weights = golden.group(head)
        out, _, kernel, _ = weights[f"{PROJECTOR}projection_layer.weight"].shape
        supervision = StoredTokens(
            (EncoderSpec("cached", "golden", out, ""),),
            settings["encoder_depth"] - 1,
            settings["coefficient_in_training"],
            None,
            t["in/z"].shape[1],
            projector="conv",
            kernel=kernel,
            normalise="spatial",
            alpha=settings["alpha"],
        )
        supervision.eps = settings["eps"]
        yield from _aligned(golden, supervision, weights, prefix, "repa", "proj")


@check("loss_sara")
def sara(golden: Golden) -> Iterator[Check]:
    """Check the similarities between the tokens of a sample, and the structural term with its gradient."""
    t, settings, weights = golden.t, golden.meta["settings"], golden.group("head/")
    out, hidden = weights[f"{PROJECTOR}4.weight"].shape
    supervision = StoredTokens(
        (EncoderSpec("cached", "golden", out, ""),),
        settings["encoder_depth"] - 1,
        settings["proj_coefficient_in_training"],
        hidden,
        t["in/z"].shape[1],
        structure=settings["struc_coefficient_in_training"],
    )
    yield from _aligned(golden, supervision, weights, "", "structure", "struc")
    for name, tokens in (("mid/autocorr_z", t["in/z"]), ("mid/autocorr_h", t["mid/z_tilde"])):
        unit = F.normalize(tokens[: len(t[name])], dim=-1)
        yield golden.compare(name, unit @ unit.mT, t[name], TOLERANCE)
    per_sample = align.structure(t["mid/z_tilde"], t["in/z"])
    yield from tolerated(golden, {"out/struc_per_sample": per_sample})


def _aligned(
    golden: Golden,
    supervision: StoredTokens,
    weights: dict[str, Tensor],
    prefix: str,
    term: str,
    stored: str,
) -> Iterator[Check]:
    """Check projected tokens, one term of the supervision and its gradient."""
    objective, t, block = LinearFlow(), golden.t, supervision.block
    noised = objective.at(t["in/x0"], t["in/noise"], t["in/t"])
    net, _ = network(golden)
    supervision.given = [t["in/z"]]
    heads = supervision.heads(net.info)
    filled(heads["0"], weights, PROJECTOR)
    step = step_of(net, noised, t["in/y"], supervision.taps, heads)
    yield from denoising(golden, objective, noised, step.prediction)
    projected = step.project("0", step.features[block])
    heads["0"] = nn.Identity()
    leaf = projected.detach().requires_grad_()
    found = supervision.terms(with_tokens(step, block, leaf))[term]
    value = found.value.mean()
    results = {f"{prefix}mid/z_tilde": projected, f"{prefix}out/{stored}": value}
    weighted = f"{prefix}out/{stored}_weighted"
    results |= {weighted: found.weight * value} if weighted in t else {}
    if (tokens := f"feat/block_{block + 1:02}") in t:
        results[tokens] = step.features[block]
    yield from tolerated(golden, results)
    yield gradient(golden, f"{prefix}grad/z_tilde", value, leaf)
