"""REG: the class token's losses and noise, the heads that stay, and sampling of two states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from stbench.config.plan import prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.core.backbone import Backbone, attach_heads, kept_heads, sampling_view
from stbench.core.errors import UserError
from stbench.core.recipe import Step
from stbench.core.rng import Rng
from stbench.data.dataset import get_dataset
from stbench.diffusion import LinearFlow
from stbench.diffusion.sample import Guidance
from stbench.evaluate.generate import block_noise, generate, state_noise
from stbench.models import align, encoders
from stbench.recipes.reg import OUTPUT, Reg, WithClassToken, reg
from stbench.train.cost import expected_cost
from tests.steps import BATCH, DATASET_SIZE, network, only, step_of
from tests.weights import cache_digits

WIDTH = 96
"""Token width of the digits encoder, and of ti/2."""


def with_heads(family: str = "sit", objective: str = "linear", **options: Any) -> Backbone:
    """A network with the heads of REG, all perturbed."""
    net = network(family, objective)
    torch.manual_seed(3)
    (stage,) = reg(net.info, **options)
    assert stage.heads is not None
    attach_heads(net, stage.heads(net))
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for head in kept_heads(net).values():
            for parameter in head.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return net


@pytest.fixture(scope="module")
def taken() -> tuple[Reg, Backbone, Step]:
    net = with_heads()
    supervision = cast(Reg, only(reg(net.info)))
    return supervision, net, step_of(supervision, net, LinearFlow())


def encoded(supervision: Reg, step: Step) -> Tensor:
    """The encoder's tokens, and their mean before them."""
    encoder = encoders.open_encoder(supervision.sources[0], 16, torch.device("cpu"))
    assert isinstance(encoder, encoders.ImageEncoder)
    tokens = encoder.tokens(step.batch.extras["images"])
    return torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)


def test_the_class_token_is_denoised_as_the_latent_is(taken: tuple[Reg, Backbone, Step]) -> None:
    supervision, net, step = taken
    token, noise = encoded(supervision, step)[:, 0], step.batch.rng.normal("reg", (WIDTH,))
    t = step.noised.t_host.float()[:, None]
    noised = (1 - t) * token + t * noise
    head = kept_heads(net)["prefix"]
    found = net.run(step.noised.x_t, step.noised.t, step.batch.y, indices=(1,), prefix=noised[:, None])
    assert found.prefix_out is not None and found.prefix_out.shape == (BATCH, 1, WIDTH)
    predicted = kept_heads(net)[OUTPUT](found.prefix_out[:, 0])
    terms = supervision.terms(step)
    expected = (predicted - (noise - token)).square().mean(1)
    torch.testing.assert_close(terms["class"].value, expected)
    assert terms["class"].weight == 0.03 and head(noised[:, None]).shape == (BATCH, 1, WIDTH)


def test_alignment_covers_class_and_image_tokens(taken: tuple[Reg, Backbone, Step]) -> None:
    supervision, _, step = taken
    assert step.features[1].shape == (BATCH, 16, WIDTH) and step.prefix[1].shape == (BATCH, 1, WIDTH)
    projected = step.heads["0"](torch.cat([step.prefix[1], step.features[1]], dim=1))
    expected = -align.token_cosine(projected, encoded(supervision, step)).mean(1)
    term = supervision.terms(step)["reg"]
    torch.testing.assert_close(term.value, expected)
    assert term.weight == 0.5


def test_gradients_reach_embedding_and_output_of_the_class_token() -> None:
    net = with_heads()
    supervision = cast(Reg, only(reg(net.info)))
    supervision.terms(step_of(supervision, net, LinearFlow()))["class"].value.mean().backward()
    heads = dict(torch.nn.ModuleDict(kept_heads(net)).named_parameters())
    assert heads and all(p.grad is not None and p.grad.any() for p in heads.values())


def test_a_new_network_predicts_zero_for_the_class_token() -> None:
    net = network()
    (stage,) = reg(net.info)
    assert stage.heads is not None
    heads = stage.heads(net)
    assert all(not parameter.any() for parameter in heads[OUTPUT].parameters())
    assert cast(Any, heads["prefix"]).norm.eps == 1e-6


@pytest.mark.parametrize("family", ["dit", "sit", "uvit"])
def test_prefix_tokens_pass_all_blocks_and_change_the_prediction(family: str) -> None:
    net = with_heads(family)
    x, t, y = torch.randn(3, 4, 8, 8), torch.rand(3, dtype=torch.float64), torch.arange(3)
    prefix, last = torch.randn(3, 2, WIDTH), net.info.depth - 1
    plain, found = net.run(x, t, y, indices=(last,)), net.run(x, t, y, indices=(last,), prefix=prefix)
    assert found.prediction is not None and plain.prediction is not None
    assert found.prediction.shape == plain.prediction.shape
    assert not torch.allclose(found.prediction, plain.prediction)
    assert found.features[last].shape == plain.features[last].shape
    assert found.prefix[last].shape == (3, 2, WIDTH) and not plain.prefix and plain.prefix_out is None
    with pytest.raises(ValueError, match="prefix tokens cannot be combined with attention"):
        net.run(x, t, y, prefix=prefix, attention=(0,))


def test_flops_count_the_prefix_token_and_its_embedding() -> None:
    net, d, n, blocks = with_heads(), WIDTH, 16, 6
    more = net.flops(prefix=torch.empty(1, 1, WIDTH)) - net.flops()
    attention = 2 * 2 * d * ((n + 1) ** 2 - n**2)
    assert more == blocks * (2 * 12 * d * d + attention) + 2 * WIDTH * d
    run = prepare(resolve(RunRequest("sit", "reg", steps=10)))
    cost = expected_cost(run, run.stages[0])
    student = net.flops(prefix=torch.empty(1, 1, WIDTH))
    assert cost.student == pytest.approx(3.0 * student * run.stages[0].images)
    assert cost.teachers > 0.0


def test_the_view_holds_the_class_token_in_padded_channels() -> None:
    net = with_heads()
    view = sampling_view(net)
    assert isinstance(view, WithClassToken)
    assert (view.info.channels, view.info.extra_channels, view.extra) == (6, 2, 2)
    x, token = torch.randn(3, 4, 8, 8), torch.randn(3, WIDTH)
    padded = view.pad(token)
    assert torch.equal(padded.flatten(1)[:, :WIDTH], token) and not padded.flatten(1)[:, WIDTH:].any()
    t, y = torch.rand(3, dtype=torch.float64), torch.arange(3)
    out, found = view(torch.cat([x, padded], dim=1), t, y), net.run(x, t, y, prefix=token[:, None])
    assert found.prefix_out is not None
    assert torch.equal(out[:, :4], cast(Tensor, found.prediction))
    assert torch.equal(out[:, 4:], view.pad(kept_heads(net)[OUTPUT](found.prefix_out[:, 0])))
    assert sampling_view(network()).info.extra_channels == 0


def test_latents_start_from_the_noise_of_other_recipes() -> None:
    info = sampling_view(with_heads()).info

    def draw(stream: str, shape: tuple[int, ...]) -> Tensor:
        return block_noise(0, stream, start=0, stop=50, shape=shape)

    found = state_noise(draw, info, "evaluation")
    assert torch.equal(found[:, :4], draw("evaluation", (4, 8, 8)))
    assert torch.equal(found[:, 4:], draw("evaluation-extra", (2, 8, 8)))


def images(net: Backbone, scale: float, sampler: str = "euler") -> Tensor:
    found, _, finite = generate(
        net,
        LinearFlow(),
        get_dataset("digits"),
        n=50,
        labels="balanced",
        seed=0,
        sampler=sampler,
        steps=3,
        guidance=Guidance(scale),
        device="cpu",
    )
    assert finite
    return found


def test_the_class_token_has_its_own_guidance_scale() -> None:
    same, equal, conditional = (with_heads(class_scale=scale) for scale in (None, 1.5, 0.0))
    assert torch.equal(images(same, 1.5), images(equal, 1.5))
    assert not torch.equal(images(same, 1.5), images(conditional, 1.5))
    assert torch.equal(images(same, 1.0), images(conditional, 1.0))
    assert not torch.equal(images(same, 1.0), images(same, 1.0, "euler-maruyama"))


def test_half_a_batch_has_the_same_noise() -> None:
    whole, part = Rng(0, 0, BATCH), Rng(0, 0, BATCH, 4, 8)
    assert torch.equal(whole.normal("reg", (WIDTH,))[4:], part.normal("reg", (WIDTH,)))


def test_an_objective_with_a_learned_variance_is_refused() -> None:
    with pytest.raises(UserError, match="recipe 'reg' .* needs an objective without learned variance"):
        prepare(resolve(RunRequest("dit", "reg", objective="iddpm", steps=10)))


def test_cached_tokens_give_the_same_losses_and_are_counted_once(tmp_path: Path) -> None:
    folder, net = cache_digits(tmp_path / "tokens"), with_heads()
    encoder, cached = (only(reg(net.info, encoder=name)) for name in ("digits", str(folder)))
    assert (encoder.images, cached.images) == (True, False)
    steps = [step_of(supervision, net, LinearFlow()) for supervision in (encoder, cached)]
    exact, rounded = (
        supervision.terms(step) for supervision, step in zip((encoder, cached), steps, strict=True)
    )
    torch.testing.assert_close(rounded["class"].value, exact["class"].value, atol=1e-2, rtol=1e-2)
    assert steps[0].cost.teachers == steps[1].cost.teachers > 0.0
    later = step_of(cached, net, LinearFlow(), images_seen=DATASET_SIZE)
    cached.terms(later)
    assert later.cost.teachers == 0.0


def test_a_cache_without_class_tokens_is_refused(tmp_path: Path) -> None:
    folder, net = cache_digits(tmp_path / "tokens"), with_heads()
    manifest = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps(manifest | {"encoder": "vit_tiny_patch16_224"}))
    with pytest.raises(UserError, match="found patch tokens only; cache them again with .*--class-token"):
        step_of(only(reg(net.info, encoder=str(folder))), net, LinearFlow())
