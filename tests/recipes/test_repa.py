"""REPA: encoders, cached tokens and their cost, errors, and identity of runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from stbench.config.plan import prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.core.errors import UserError
from stbench.diffusion import LinearFlow
from stbench.models import align, encoders
from stbench.models.timm_models import DINOV2
from stbench.recipes.irepa import irepa
from stbench.recipes.repa import Repa, repa
from stbench.recipes.sara import sara
from stbench.train.cost import expected_cost
from tests.steps import BATCH, info, network, only, step_of, value
from tests.weights import cache_digits, random_vit


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_vit(tmp_path_factory.mktemp("vit") / "vit.safetensors")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache_digits(tmp_path_factory.mktemp("cache") / "tokens")


def test_repa_aligns_with_the_digits_encoder_and_names_it() -> None:
    net = network()
    supervision = cast(Repa, only(repa(net.info)))
    assert supervision.needs == "encoder digits" and supervision.images
    step = step_of(supervision, net, LinearFlow())
    found = value(supervision, step)
    encoder = encoders.open_encoder(supervision.sources[0], 16, torch.device("cpu"))
    assert isinstance(encoder, encoders.ImageEncoder)
    z = encoder.tokens(step.batch.extras["images"])
    assert z.shape == (BATCH, 16, 96)
    torch.testing.assert_close(found, -align.cosine(step.heads["0"](step.features[supervision.block]), z))
    assert step.cost.teachers == encoder.flops * BATCH > 0


@pytest.mark.parametrize(
    ("where", "block"),
    [(("xl/2", 28), 7), (("l/2", 24), 7), (("b/2", 12), 3), (("ti/2", 6), 1)],
)
def test_repa_blocks(where: tuple[str, int], block: int) -> None:
    assert only(repa(info("sit", *where), encoder="digits")).block == block


def test_repa_default_encoder_is_dinov2_b_at_the_latents_grid() -> None:
    supervision = only(repa(info("sit", "b/2", 12, 768, 256)))
    (source,) = supervision.sources
    assert (source.name, source.width, supervision.hidden) == (DINOV2, 768, 2048)


def test_repa_takes_timm_networks_from_local_weights(vit: Path) -> None:
    net = network()
    names = ["vit_tiny_patch16_224", "vit_tiny_patch16_224"]
    supervision = cast(Repa, only(repa(net.info, encoder=names, checkpoint=[str(vit)] * 2)))
    step = step_of(supervision, net, LinearFlow())
    targets = supervision.targets(step)
    assert [tuple(z.shape) for z in targets] == [(BATCH, 16, 192)] * 2  # 64x64 pixels in patches of 16
    tokens = step.features[supervision.block]
    expected = -sum(align.cosine(step.heads[j](tokens), z) for j, z in zip("01", targets, strict=True)) / 2
    torch.testing.assert_close(value(supervision, step), expected)


def test_cached_tokens_teach_as_the_encoder_does_and_are_paid_once(cache: Path) -> None:
    net = network()
    online, cached = only(repa(net.info)), cast(Repa, only(repa(net.info, encoder=str(cache))))
    assert cached.needs == "cached tokens of encoder digits" and not cached.images
    first, again = (step_of(cached, net, LinearFlow(), images_seen=seen) for seen in (1496, 1500))
    reference = step_of(online, net, LinearFlow(), images_seen=1496)
    torch.testing.assert_close(value(cached, first), value(online, reference), atol=1e-3, rtol=0)
    value(cached, again)
    assert first.cost.teachers == reference.cost.teachers > 0 == again.cost.teachers


def test_irepa_projects_by_a_convolution_onto_normalised_tokens() -> None:
    net = network()
    supervision = cast(Repa, only(irepa(net.info)))
    assert (supervision.weight, supervision.alpha, supervision.kernel, supervision.hidden) == (
        1,
        0.6,
        3,
        None,
    )
    step = step_of(supervision, net, LinearFlow())
    (z,) = supervision.targets(step)
    projected = step.heads["0"](step.features[supervision.block])
    torch.testing.assert_close(
        value(supervision, step), -align.cosine(projected, align.standardise(z, alpha=0.6))
    )
    released = only(irepa(net.info, kernel=1)).heads(net.info)["0"]
    assert released.projection_layer.weight.shape == (96, 96, 1, 1)


def test_sara_adds_the_structural_term() -> None:
    net = network()
    supervision = cast(Repa, only(sara(net.info)))
    step = step_of(supervision, net, LinearFlow())
    terms = supervision.terms(step)
    assert {name: term.weight for name, term in terms.items()} == {"repa": 0.5, "structure": 0.5}
    plain = only(repa(net.info))
    plain.setup(torch.device("cpu"))
    torch.testing.assert_close(terms["repa"].value, value(plain, step))
    (z,) = supervision.targets(step)
    projected = step.heads["0"](step.features[supervision.block])
    torch.testing.assert_close(terms["structure"].value, align.structure(projected, z))


def test_after_the_stop_neither_a_term_nor_the_encoder_runs() -> None:
    net = network()
    supervision = cast(Repa, only(repa(net.info, stop=3)))
    for seen, runs in ((3 * BATCH - 1, True), (3 * BATCH, False)):
        step = step_of(supervision, net, LinearFlow(), images_seen=seen)
        assert bool(supervision.terms(step)) == (step.cost.teachers > 0) == (step.cost.heads > 0) == runs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 3}, r"recipe\.kernel=3 has no effect with recipe\.projector=mlp; .*projector=conv"),
        ({"alpha": 0.6}, r"recipe\.alpha=0\.6 has no effect with recipe\.normalise=none"),
        ({"projector": "conv", "hidden": 64}, r"recipe\.hidden=64 has no effect with recipe\.projector=conv"),
        ({"projector": "conv", "kernel": 2}, r"recipe\.kernel must be odd, got 2"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        repa(info("sit", "ti/2", 6), **options)
    with pytest.raises(UserError, match="needs more than one token per image, got 1"):
        irepa(info("sit", "ti/2", 6, tokens=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "dinov9"}, "unknown encoder 'dinov9'"),
        ({"encoder": "no/such/folder"}, "no cached tokens at no/such/folder"),
        ({"encoder": "vit_tiny_patch16_224", "checkpoint": "none.safetensors"}, "hf download timm/vit_tiny"),
        ({"encoder": ["digits", "digits"], "checkpoint": "x"}, "one file for each of 2 encoders, got 1"),
        ({"checkpoint": "x"}, "cannot be used with encoder 'digits', which has its own weights; leave it"),
        ({"encoder": "resnet18"}, "encoder 'resnet18' has no patch tokens"),
    ],
)
def test_repa_errors_say_what_to_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        repa(info("sit", "ti/2", 6), **options)


def test_a_moved_file_is_the_same_run_and_another_file_another(vit: Path, tmp_path: Path) -> None:
    def train_hash(file: Path) -> str:
        options = {"recipe.encoder": "vit_tiny_patch16_224", "recipe.checkpoint": str(file)}
        return prepare(resolve(RunRequest("sit", "repa", overrides=options))).hashes.train

    moved, other = tmp_path / "moved.safetensors", tmp_path / "other.safetensors"
    moved.write_bytes(vit.read_bytes())
    other.write_bytes(vit.read_bytes() + b" ")
    assert train_hash(vit) == train_hash(moved) != train_hash(other)


def test_a_dry_run_needs_no_weights() -> None:
    options = {"recipe.encoder": "vit_tiny_patch16_224.augreg_in21k"}
    prepared = prepare(resolve(RunRequest("sit", "repa", overrides=options)))
    assert expected_cost(prepared, prepared.stages[0], draws=1).teachers > 0


def test_caches_of_other_images_are_refused(cache: Path) -> None:
    net = network()
    supervision = cast(Repa, only(repa(net.info, encoder=str(cache))))
    step = step_of(supervision, net, LinearFlow())
    with pytest.raises(UserError, match=r"expected cached tokens of 1281167 images, found 1500"):
        supervision.terms(dataclasses.replace(step, dataset_size=1281167))
    mirrored = dataclasses.replace(step.batch, index=step.batch.index + 1500)
    with pytest.raises(UserError, match=r"no cached tokens of mirror images; type --set data\.flip=false"):
        supervision.terms(dataclasses.replace(step, batch=mirrored))
