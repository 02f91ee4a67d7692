"""Golden checks of REG: the losses with a class token, and its sampler with two states."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stbench.core.backbone import Backbone, attach_heads, kept_heads
from stbench.core.objective import Batch
from stbench.core.rng import Rng
from stbench.diffusion import LinearFlow
from stbench.diffusion.sample import Guidance, sample
from stbench.models.encoders import EncoderSpec
from stbench.models.official import from_state
from stbench.recipes.reg import OUTPUT, ClassEmbedding, Reg, WithClassToken, class_output
from stbench.testing.golden.objectives import tolerated
from stbench.testing.golden.run import Check, Golden, check
from stbench.testing.golden.samplers import TOLERANCE, Recorder, effective_scale, repa_sampler
from stbench.testing.golden.self_transcendence import denoising, filled, step_of

HEADS = {"cls_projectors2.": "linear.", "wg_norm.": "norm.", "final_layer.linear_cls.": ""}
"""Prefixes of the official parameters for the class token -> prefixes in our two heads."""


def with_class_token(golden: Golden) -> tuple[Backbone, dict[str, Tensor]]:
    """The network of a file with its two heads for the class token, and the stored projectors."""
    state = golden.group("sd/")
    found = {key: state.pop(key) for key in list(state) if key.startswith(tuple(HEADS))}
    own = {k.replace(p, q): v for k, v in found.items() for p, q in HEADS.items() if k.startswith(p)}
    state["pos_embed"] = state["pos_embed"][:, 1:]  # the class token has position zero
    heads = int(golden.meta["config"]["num_heads"])
    model = from_state(state, golden.name, heads=heads, original="repa", objective="linear")
    width, source = own["linear.weight"].shape
    embedding, output = ClassEmbedding(source, width, None), class_output(width, source)
    embedding.load_state_dict({key: value for key, value in own.items() if "." in key})
    output.load_state_dict({key: value for key, value in own.items() if "." not in key})
    attach_heads(model.backbone, {"prefix": embedding, OUTPUT: output})
    return model.backbone.requires_grad_(False), {key: state[key] for key in model.dropped}


@check("loss_reg")
def reg(golden: Golden) -> Iterator[Check]:
    """Check the losses of latent and class token, and the alignment of all tokens of the encoder."""
    objective, t, settings = LinearFlow(), golden.t, golden.meta["settings"]
    net, stored = with_class_token(golden)
    first = t["sd/pos_embed"][:, 0]
    yield golden.compare("position", first, torch.zeros_like(first), 0.0)
    hidden, source = stored["projectors.0.2.weight"].shape[0], t["in/z"].shape[2]
    supervision = Reg(
        sources=(EncoderSpec("cached", "golden", source, ""),),
        block=golden.meta["config"]["encoder_depth"] - 1,
        weight=settings["proj_coefficient_in_training"],
        hidden=hidden,
        tokens=net.info.tokens,
        class_weight=settings["cls_coefficient_in_training"],
    )
    noised = objective.at(t["in/x0"], t["in/noise"], t["in/t"])
    supervision.corrupt_class(objective, t["in/z"], t["in/noise_cls"], noised.t_host)
    heads = supervision.heads(net.info)
    filled(heads["0"], stored, "projectors.0.")
    batch = Batch(noised.x0, t["in/y"], t["in/y"], torch.arange(len(noised.x0)), Rng(0, 0, len(noised.x0)))
    inputs = supervision.inputs(batch, noised)
    every = range(net.info.depth)
    step = step_of(net, noised, t["in/y"], every, {**heads, **kept_heads(net)}, **inputs)
    yield from denoising(golden, objective, noised, step.prediction)

    assert step.prefix_out is not None
    joined = {k: torch.cat([step.prefix[k], step.features[k]], dim=1) for k in every}
    terms = supervision.terms(step)
    means = {name: term.value.mean() for name, term in terms.items()}
    weighted = sum(term.weight * means[name] for name, term in terms.items())
    found = {
        "mid/cls_t": inputs["prefix"][:, 0],
        "mid/target_cls": objective.velocity_target(supervision.noised_class).flatten(1),
        "mid/pred_cls": step.project(OUTPUT, step.prefix_out[:, 0]),
        "mid/z_tilde": step.project("0", joined[supervision.block]),
        "out/denoise_cls": terms["class"].value,
        "out/proj": means["reg"],
        "out/total": objective.loss(step.prediction, noised).mean() + weighted,
    }
    yield from tolerated(golden, found)
    yield from tolerated(golden, {f"feat/block_{k + 1:02}": tokens for k, tokens in joined.items()})


@check("sampler_reg")
def sampler(golden: Golden) -> Iterator[Check]:
    """Check each run's sample, and both states, time and batch size of every call."""
    (net, _), t = with_class_token(golden.weights()), golden.t
    c, source = net.info.channels, t["in/z_cls"].shape[1]
    for name, run in golden.meta["runs"].items():
        view = WithClassToken(net, source, max(run["cls_cfg_scale"], 0.0))
        recorder, z = Recorder(view), torch.cat([t["in/z"], view.pad(t["in/z_cls"])], dim=1)
        draws = [
            torch.cat([latent, view.pad(token)], dim=1)
            for latent, token in zip(t[f"{name}/noise"], t[f"{name}/noise_cls"], strict=True)
        ]
        guidance = Guidance(effective_scale(run["cfg_scale"]), run["guidance_low"], run["guidance_high"])
        used, steps = repa_sampler(name, run), run["num_steps"]
        out = sample(
            used,
            recorder,
            LinearFlow(),
            z,
            t["in/y"],
            steps=steps,
            guidance=guidance,
            noise=torch.stack(draws).__getitem__,
        )
        states = recorder.states(len(z))
        guided = int((recorder.batches == 2 * len(z)).sum())
        yield Check(f"{name} calls", abs(len(recorder.calls) - run["model_calls"]), 0.0)
        yield Check(f"{name} guided calls", abs(guided - run["guided_calls"]), 0.0)
        yield golden.compare(f"{name}/batch", recorder.batches, t[f"{name}/batch"], 0.0)
        found = {
            "out": out[:, :c],
            "model_x": states[:, :, :c],
            "model_cls": states[:, :, c:].flatten(2)[..., :source],
            "model_t": recorder.times,
        }
        named = {f"{name}/{key}": value for key, value in found.items()}
        yield from tolerated(golden, named, TOLERANCE)
