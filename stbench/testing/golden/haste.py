"""Golden checks of HASTE: attention maps, REPA's term, and the total before and after the stop.

Block numbers in the sidecar are 1-based.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from torch import Tensor

from stbench.core.recipe import Step
from stbench.diffusion import LinearFlow
from stbench.models.encoders import EncoderSpec
from stbench.recipes.haste import Haste
from stbench.testing.golden.objectives import TOLERANCE, gradient, network, tolerated
from stbench.testing.golden.run import Check, Golden, check
from stbench.testing.golden.self_transcendence import denoising, filled, step_of


@dataclasses.dataclass(kw_only=True)
class _StoredTeacher(Haste):
    """HASTE with stored tokens and logits instead of an encoder."""

    stored: Mapping[str, Tensor]

    def encode(self, step: Step) -> tuple[Tensor, Mapping[int, Tensor]]:
        """The stored tokens, and the stored logits of the aligned layers."""
        layers = {layer for _, layer in self.pairs}
        return self.stored["in/z"], {k: self.stored[f"in/teacher_logits_{k + 1:02}"] for k in layers}


def _supervision(golden: Golden, stored: Mapping[str, Tensor], tokens: int) -> _StoredTeacher:
    settings = golden.meta["settings"]
    out, hidden = stored["projectors.0.4.weight"].shape
    return _StoredTeacher(
        sources=(EncoderSpec("cached", "golden", out, ""),),
        block=settings["encoder_depth"] - 1,
        weight=settings["proj_coefficient"],
        hidden=hidden,
        tokens=tokens,
        pairs=tuple((block - 1, layer - 1) for block, layer in settings["pairs"]),
        attention_weight=settings["attn_coefficient"],
        stop=settings["early_stop_point"],
        stored=golden.t,
    )


@check("loss_haste")
def haste(golden: Golden) -> Iterator[Check]:
    """Check the student's logits, both terms with the gradient of the logits, and the total."""
    objective, t, stored = LinearFlow(), golden.t, golden.group("head/")
    noised = objective.at(t["in/x0"], t["in/noise"], t["in/t"])
    net, _ = network(golden)
    supervision = _supervision(golden, stored, net.info.tokens)
    heads = supervision.heads(net.info)
    filled(heads["0"], stored, "projectors.0.")
    blocks = supervision.taps
    step = step_of(net, noised, t["in/y"], blocks, heads, attention=[b for b, _ in supervision.pairs])
    yield from denoising(golden, objective, noised, step.prediction)
    yield from tolerated(golden, {f"mid/logits_{k + 1:02}": v for k, v in step.attention.items()})
    yield golden.compare(
        "mid/z_tilde", step.project("0", step.features[supervision.block]), t["mid/z_tilde"], TOLERANCE
    )
    terms = supervision.terms(step)
    yield from tolerated(golden, {f"out/{name}": terms[key].value.mean() for name, key in _TERMS.items()})
    for i, pair in enumerate(supervision.pairs):
        value = dataclasses.replace(supervision, pairs=(pair,)).terms(step)["attention"].value.mean()
        yield golden.compare(f"out/attn_pairs {i}", value, t["out/attn_pairs"][i], TOLERANCE)
    yield from _gradients(golden, supervision, step)
    yield from _totals(golden, supervision, step)


_TERMS = {"attn": "attention", "proj": "repa"}
"""Name in the file -> name of the term."""


def _gradients(golden: Golden, supervision: Haste, step: Step) -> Iterator[Check]:
    """Check the gradient of the attention term at the student's logits, for each stored block."""
    leaves = {k: v.detach().requires_grad_() for k, v in step.attention.items()}
    value = supervision.terms(dataclasses.replace(step, attention=leaves))["attention"].value.mean()
    for key in sorted(key for key in golden.t if key.startswith("grad/logits_")):
        yield gradient(golden, key, value, leaves[int(key.rsplit("_", 1)[1]) - 1])


def _totals(golden: Golden, supervision: Haste, step: Step) -> Iterator[Check]:
    """Check the training loss of the last aligned step and of the next one, which asks for no logits."""
    denoise, batch = step.objective.loss(step.prediction, step.noised).mean(), step.batch
    for name, finished in (("before", supervision.stop - 1), ("after", supervision.stop)):
        rng = dataclasses.replace(batch.rng, images_seen=finished * batch.rng.global_batch)
        later = dataclasses.replace(step, batch=dataclasses.replace(batch, rng=rng))
        terms = supervision.terms(later).values()
        total = denoise + sum(term.weight * term.value.mean() for term in terms)
        yield golden.compare(f"step/total_{name}", total, golden.t[f"step/total_{name}"], TOLERANCE)
        asked = bool(supervision.inputs(later.batch, step.noised))
        yield Check(f"logits {name}", float(asked != (name == "before")), 0.0)
