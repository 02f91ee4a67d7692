"""What each recipe adds to the loss: blocks, weights, teachers and batches, against values by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stbench.config.build import build_backbone
from stbench.config.plan import prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.core.backbone import Backbone, BackboneInfo
from stbench.core.errors import UserError
from stbench.core.objective import Batch, Objective
from stbench.core.recipe import Cost, Step, Supervision, build_stages
from stbench.core.rng import Rng
from stbench.data.dataset import get_dataset
from stbench.diffusion import ImprovedDdpm, LinearFlow, VpContinuous, VpDiscrete
from stbench.models import align
from stbench.models import encoders as teachers
from stbench.recipes.dispersive import Dispersive, dispersive
from stbench.recipes.layersync import LayerSync, layersync
from stbench.recipes.repa import Repa, repa
from stbench.recipes.sra import Sra, sra
from stbench.train.cost import expected_cost
from stbench.train.step import StageModel, make_batch

BATCH = 8


def network(backbone: str = "sit", objective: str = "linear") -> Backbone:
    """An embedded-size network with every parameter moved, so that no block is the identity."""
    spec = resolve(RunRequest(backbone, "vanilla", objective=objective))
    net = build_backbone(spec.backbone, objective, get_dataset("digits"))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return net


def info(name: str, size: str, depth: int, width: int = 96, tokens: int = 16) -> BackboneInfo:
    return BackboneInfo(name, size, depth, width, tokens, 2, 4, 8, 10)


def only(stages: Sequence[Any]) -> Any:
    (stage,) = stages
    return stage.supervision({})


def step_of(
    recipe: Supervision, net: Backbone, objective: Objective, images_seen: int = 0, label_drop: float = 0.5
) -> Step:
    """One step as the engine would show it."""
    module = StageModel(net, recipe, objective, seed=0, dataset_size=1500)
    recipe.setup(torch.device("cpu"))
    rng = Rng(0, images_seen, BATCH)
    index = torch.arange(BATCH)
    data = get_dataset("digits")
    extras = {"images": data.images(index)} if recipe.images else {}
    x0, labels = rng.normal("x0", (4, 8, 8)), data.labels(index)
    batch: Batch = make_batch(x0, labels, index, rng, label_drop, 10, extras)
    noised = objective.draw(batch)
    prediction, features = net.forward_intermediates(
        noised.x_t, noised.t, batch.y, indices=tuple(recipe.taps)
    )
    assert prediction is not None
    parts: dict[str, Any] = {"features": features, "heads": module.heads, "ema": module.ema}
    counts = {"images_seen": images_seen, "dataset_size": 1500, "global_batch": BATCH}
    return Step(batch, noised, prediction, objective=objective, info=net.info, cost=Cost(), **parts, **counts)


def value(recipe: Supervision, step: Step) -> Tensor:
    (term,) = recipe.terms(step).values()
    assert term.value.shape == (BATCH,)
    return term.value


# SRA


@pytest.mark.parametrize(
    ("where", "blocks"),
    [
        (info("sit", "xl/2", 28), (7, 19)),
        (info("dit", "xl/2", 28), (7, 15)),
        (info("sit", "b/2", 12), (3, 7)),
        (info("uvit", "l/2", 21), (5, 14)),
        (info("sit", "ti/2", 6), (1, 3)),
    ],
)
def test_sra_blocks(where: BackboneInfo, blocks: tuple[int, int]) -> None:
    recipe = only(build_stages(sra, where))
    assert (recipe.student_block, recipe.teacher_block) == blocks


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("sit", {}, (0.2, "256", "flow")),
        ("dit", {}, (0.04, "256", "native")),
        ("sit", {"distance": "cosine"}, (0.5, "constant", "flow")),
        ("dit", {"distance": "cosine-released", "schedule": "512"}, (0.5, "512", "native")),
        ("uvit", {"weight": 0.0, "time": "native"}, (0.0, "256", "native")),
        ("sit", {"distance": "l2"}, (0.2, "256", "flow")),
    ],
)
def test_sra_defaults_follow_distance_and_family(
    family: str, options: dict[str, Any], expected: tuple[float, str, str]
) -> None:
    recipe = only(build_stages(sra, info(family, "xl/2", 28), **options))
    assert (recipe.weight, recipe.schedule, recipe.time) == expected


def test_sra_schedule_follows_the_size_of_the_latents() -> None:
    large = dataclasses.replace(info("sit", "xl/2", 28), input_size=64)
    assert only(build_stages(sra, large)).schedule == "512"
    assert only(build_stages(sra, large, distance="cosine")).schedule == "constant"
    assert only(build_stages(sra, dataclasses.replace(large, channels=3))).schedule == "256"  # pixels


def test_sra_weight_falls_after_its_last_full_epoch() -> None:
    recipe = only(build_stages(sra, info("sit", "xl/2", 28)))
    assert recipe.weight_at(149) == 0.2
    assert recipe.weight_at(1149) == pytest.approx(0.02)
    assert dataclasses.replace(recipe, schedule="512").weight_at(899) == pytest.approx(0.02)
    assert dataclasses.replace(recipe, schedule="constant").weight_at(5000) == 0.2


def test_sra_weight_counts_epochs_of_the_data_set() -> None:
    recipe, net = only(build_stages(sra, info("sit", "ti/2", 6))), network()
    early, late = (step_of(recipe, net, LinearFlow(), images_seen=seen) for seen in (149 * 1500, 349 * 1500))
    assert recipe.terms(early)["sra"].weight == 0.2
    assert recipe.terms(late)["sra"].weight == pytest.approx(0.2 * 0.1**0.2)


def test_sra_teacher_is_the_ema_at_less_noise_with_the_same_noise_and_labels() -> None:
    net, objective = network(), LinearFlow()
    recipe = cast(Sra, only(build_stages(sra, net.info)))
    step = step_of(recipe, net, objective)
    with torch.no_grad():
        for parameter in step.ema.parameters():
            parameter.mul_(0.9)
    t = (step.noised.t_host - 0.2 * step.batch.rng.uniform("sra")).clamp(0, 1)
    assert (step.batch.y != step.batch.y_true).any()
    cleaner = objective.at(step.batch.x0, step.noised.noise, t)
    target = step.ema.features(cleaner.x_t, cleaner.t, step.batch.y, indices=(3,))[3]
    student = step.heads["head"](step.features[1])
    expected = align.smooth_l1(student, target, 0.05)
    torch.testing.assert_close(value(recipe, step), expected)
    value(recipe, step).mean().backward()
    assert all(p.grad is None for p in step.ema.parameters())
    assert any(p.grad is not None for p in net.parameters())


def test_sra_distances_differ_and_the_released_cosine_is_over_tokens() -> None:
    recipe = only(build_stages(sra, info("sit", "ti/2", 6), distance="cosine"))
    a, b = torch.randn(2, 16, 96), torch.randn(2, 16, 96)
    over_channels = 1 - nn.functional.cosine_similarity(a, b, dim=2).mean(1)
    over_tokens = 1 - nn.functional.cosine_similarity(a, b, dim=1).mean(1)
    torch.testing.assert_close(recipe.measure(a, b), over_channels)
    released = dataclasses.replace(recipe, distance="cosine-released")
    torch.testing.assert_close(released.measure(a, b), over_tokens)
    assert not torch.allclose(over_channels, over_tokens)
    for distance, error in (("l1", (a - b).abs()), ("l2", (a - b).square())):
        other = dataclasses.replace(recipe, distance=distance)
        torch.testing.assert_close(other.measure(a, b), error.flatten(1).mean(1))


@pytest.mark.parametrize("objective", [LinearFlow(), ImprovedDdpm(), VpDiscrete(), VpContinuous()])
def test_the_flow_clock_lowers_the_noise_by_the_same_amount_everywhere(objective: Objective) -> None:
    tau = torch.linspace(0.05, 0.9, 9, dtype=torch.float64)
    t, u = objective.t_of_tau(tau), torch.full((9,), 0.5, dtype=torch.float64)
    lowered = objective.tau(align.cleaner(objective, t, 0.2, u, "flow"))
    lowest = objective.tau(objective.t_of_tau(torch.zeros(1, dtype=torch.float64)))
    torch.testing.assert_close(lowered, (tau - 0.1).clamp(min=0).maximum(lowest), atol=2e-3, rtol=0)


def test_the_native_clock_moves_whole_steps_and_dits_teacher_stays_above_step_0() -> None:
    ddpm, vp = ImprovedDdpm(), VpDiscrete()
    steps = torch.tensor([0, 1, 150, 999])
    u = torch.tensor([0.0, 0.999, 0.5, 0.0], dtype=torch.float64)
    moved = ddpm.index(align.cleaner(ddpm, ddpm.time(steps), 0.2, u, "native"))
    assert moved.tolist() == [1, 1, 50, 999]
    assert vp.index(align.cleaner(vp, vp.time(steps), 0.2, u, "native")).tolist() == [0, 0, 50, 999]


def test_sra_refuses_a_beta_that_has_no_meaning() -> None:
    with pytest.raises(UserError, match=r"recipe\.beta=0\.1 has no meaning for distance 'cosine'"):
        build_stages(sra, info("sit", "ti/2", 6), distance="cosine", beta=0.1)


# LayerSync


def test_layersync_default_is_the_published_pair() -> None:
    assert only(build_stages(layersync, info("sit", "xl/2", 28))).pairs == ((7, 15),)
    assert only(build_stages(layersync, info("sit", "ti/2", 6))).pairs == ((1, 2),)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[2, 2]], "two different blocks"),
        ([], "at least one pair"),
        ([[1, 9]], r"has blocks 0\.\.5; try --set recipe\.pairs=\[\[0,5\]\]"),
    ],
)
def test_layersync_refuses_pairs_that_would_train_something_else(pairs: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_stages(layersync, info("sit", "ti/2", 6), pairs=pairs)


def test_layersync_sums_pairs_and_stops_the_gradient_at_the_strong_block() -> None:
    net = network()
    recipe = cast(LayerSync, only(build_stages(layersync, net.info, pairs=[(0, 2), (1, 4)])))
    step = step_of(recipe, net, LinearFlow())
    leaves = {k: v.detach().requires_grad_() for k, v in step.features.items()}
    step = dataclasses.replace(step, features=leaves)
    total = value(recipe, step)
    parts = [-align.cosine(leaves[a], leaves[b]) for a, b in ((0, 2), (1, 4))]
    torch.testing.assert_close(total, parts[0] + parts[1])
    torch.testing.assert_close(value(dataclasses.replace(recipe, several="released"), step), parts[1])
    total.sum().backward()
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert leaves[2].grad is None and leaves[4].grad is None


# Dispersive


def test_dispersive_settings_by_name_and_changed() -> None:
    where = info("sit", "b/2", 12)
    assert only(build_stages(dispersive, where)) == Dispersive(2, 0.5, 0.5, "local", 16)
    assert only(build_stages(dispersive, where, setting="pytorch")) == Dispersive(11, 0.25, 1.0, "local", 32)
    changed = only(build_stages(dispersive, where, block=4, weight=0.1, local_batch=8))
    assert changed == Dispersive(4, 0.1, 0.5, "local", 8)


def test_dispersive_is_computed_on_the_batch_it_names() -> None:
    net = network()
    recipe = cast(Dispersive, only(build_stages(dispersive, net.info, local_batch=4)))
    step = step_of(recipe, net, LinearFlow())
    z = step.features[recipe.block]
    halves = torch.stack([align.dispersive(z[:4], 0.5), align.dispersive(z[4:], 0.5)])
    torch.testing.assert_close(value(recipe, step), halves.repeat_interleave(4))
    gathered = dataclasses.replace(recipe, scope="gathered")
    torch.testing.assert_close(value(gathered, step), align.dispersive(z, 0.5).expand(BATCH))
    with pytest.raises(UserError, match=r"wants the global batch of 16 at once, found 8"):
        gathered.terms(dataclasses.replace(step, global_batch=16))


def test_dispersive_refuses_a_local_batch_that_is_not_used() -> None:
    with pytest.raises(UserError, match="no meaning with"):
        build_stages(dispersive, info("sit", "ti/2", 6), scope="gathered", local_batch=8)


# REPA


def test_repa_aligns_with_the_digits_encoder_and_names_it() -> None:
    net = network()
    recipe = cast(Repa, only(build_stages(repa, net.info)))
    assert recipe.needs == "encoder digits" and recipe.images
    step = step_of(recipe, net, LinearFlow())
    found = value(recipe, step)
    encoder = teachers.open_encoder(recipe.sources[0], 16, torch.device("cpu"))
    assert isinstance(encoder, teachers.ImageEncoder)
    z = encoder.tokens(step.batch.extras["images"])
    assert z.shape == (BATCH, 16, 96)
    torch.testing.assert_close(found, -align.cosine(step.heads["0"](step.features[recipe.block]), z))
    assert step.cost.teachers == encoder.flops * BATCH > 0


def test_the_digits_encoder_reads_digits() -> None:
    data = get_dataset("digits")
    encoder = teachers.open_encoder(teachers.find_encoder("digits"), 16, torch.device("cpu"))
    assert isinstance(encoder, teachers.ImageEncoder)
    images = data.heldout_images()
    with torch.no_grad():
        features = encoder.network.forward_features(images.float() / 127.5 - 1.0)
        right = encoder.network.forward_head(features).argmax(1) == data.heldout()[1]
    assert right.double().mean() > 0.95


@pytest.mark.parametrize(
    ("where", "block"),
    [(("xl/2", 28), 7), (("l/2", 24), 7), (("b/2", 12), 3), (("ti/2", 6), 1)],
)
def test_repa_blocks(where: tuple[str, int], block: int) -> None:
    assert only(build_stages(repa, info("sit", *where), encoder="digits")).block == block


def test_repa_default_encoder_is_dinov2_b_at_the_latents_grid() -> None:
    recipe = only(build_stages(repa, info("sit", "b/2", 12, 768, 256)))
    (source,) = recipe.sources
    assert (source.name, source.width, recipe.hidden) == (teachers.DINOV2, 768, 2048)


@pytest.fixture()
def vit(tmp_path: Path) -> Path:
    """Random weights of a small timm network, as a user would have them on disk."""
    torch.manual_seed(0)
    save_file(
        timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "vit.safetensors"
    )
    return tmp_path / "vit.safetensors"


def test_repa_takes_timm_networks_from_local_weights(vit: Path) -> None:
    net = network()
    names = ["vit_tiny_patch16_224", "vit_tiny_patch16_224"]
    recipe = cast(Repa, only(build_stages(repa, net.info, encoder=names, checkpoint=[str(vit)] * 2)))
    step = step_of(recipe, net, LinearFlow())
    targets = recipe.targets(step)
    assert [tuple(z.shape) for z in targets] == [(BATCH, 16, 192)] * 2  # 64x64 pixels in patches of 16
    tokens = step.features[recipe.block]
    expected = -sum(align.cosine(step.heads[j](tokens), z) for j, z in zip("01", targets, strict=True)) / 2
    torch.testing.assert_close(value(recipe, step), expected)


def test_encoder_input_normalises_and_enlarges() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    white = teachers.encoder_input(torch.full((1, 1, 32, 32), 255, dtype=torch.uint8), 64, mean, std)
    assert white.shape == (1, 3, 64, 64)
    expected = (1 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(white.mean((0, 2, 3)), expected)


def test_dinov2_is_normalised_as_imagenet() -> None:
    config = timm.create_model(teachers.DINOV2.replace("base", "small"), pretrained=False).pretrained_cfg
    assert (config["mean"], config["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_the_path_of_weights_is_no_part_of_a_source(vit: Path) -> None:
    moved = vit.with_name("moved.safetensors")
    moved.write_bytes(vit.read_bytes())
    assert teachers.find_encoder("vit_tiny_patch16_224", vit) == teachers.find_encoder(
        "vit_tiny_patch16_224", moved
    )


@pytest.fixture()
def cache(tmp_path: Path) -> Path:
    encoder = teachers.open_encoder(teachers.find_encoder("digits"), 16, torch.device("cpu"))
    assert isinstance(encoder, teachers.ImageEncoder)
    images = torch.split(get_dataset("digits").train_images(), 400)
    teachers.cache_tokens(tmp_path / "tokens", encoder, images, 1500)
    return tmp_path / "tokens"


def test_cached_tokens_teach_as_the_encoder_does_and_are_paid_once(cache: Path) -> None:
    net = network()
    online, cached = (
        only(build_stages(repa, net.info)),
        cast(Repa, only(build_stages(repa, net.info, encoder=str(cache)))),
    )
    assert cached.needs == "cached tokens of encoder digits" and not cached.images
    first, again = (step_of(cached, net, LinearFlow(), images_seen=seen) for seen in (1496, 1500))
    reference = step_of(online, net, LinearFlow(), images_seen=1496)
    torch.testing.assert_close(value(cached, first), value(online, reference), atol=1e-3, rtol=0)
    value(cached, again)
    assert first.cost.teachers == reference.cost.teachers > 0 == again.cost.teachers


def test_damaged_and_foreign_caches_are_refused(cache: Path) -> None:
    net = network()
    recipe = cast(Repa, only(build_stages(repa, net.info, encoder=str(cache))))
    step = step_of(recipe, net, LinearFlow())
    with pytest.raises(UserError, match=r"cached tokens are of 1500 images, the data set has 1281167"):
        recipe.terms(dataclasses.replace(step, dataset_size=1281167))
    mirrored = dataclasses.replace(step.batch, index=step.batch.index + 1500)
    with pytest.raises(UserError, match=r"found mirror images; type --set data\.flip=false"):
        recipe.terms(dataclasses.replace(step, batch=mirrored))
    with pytest.raises(UserError, match=r"holds 16 tokens an image, the backbone has 64"):
        teachers.open_encoder(recipe.sources[0], 64, torch.device("cpu"))
    tokens = np.load(cache / "tokens.npy")
    np.save(cache / "tokens.npy", tokens[:-1])
    with pytest.raises(UserError, match="is damaged"):
        teachers.find_encoder(str(cache))
    (cache / "tokens.npy").unlink()
    with pytest.raises(UserError, match=r"lacks tokens\.npy"):
        teachers.find_encoder(str(cache))
    (cache / "tokens.json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(UserError, match=r"tokens\.json is damaged"):
        teachers.find_encoder(str(cache))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "dinov9"}, "unknown encoder 'dinov9'"),
        ({"encoder": "no/such/folder"}, "no cached tokens at no/such/folder"),
        ({"encoder": "vit_tiny_patch16_224", "checkpoint": "none.safetensors"}, "hf download timm/vit_tiny"),
        ({"encoder": ["digits", "digits"], "checkpoint": "x"}, "a file for each of 2 encoders, found 1"),
        ({"checkpoint": "x"}, "has no meaning for encoder 'digits', which has its own; leave it out"),
        ({"encoder": "resnet18"}, "encoder 'resnet18' gives no patch tokens"),
    ],
)
def test_repa_errors_say_what_to_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_stages(repa, info("sit", "ti/2", 6), **options)


def test_weights_that_are_not_here_name_the_download() -> None:
    missing = teachers.find_encoder("vit_tiny_patch16_224.augreg_in21k")
    with pytest.raises(UserError, match=r"cannot be loaded.*hf download timm/vit_tiny_patch16_224\.augreg"):
        teachers.open_encoder(missing, 16, torch.device("cpu"))


def test_a_cache_of_another_number_of_images_is_not_made(tmp_path: Path) -> None:
    encoder = teachers.open_encoder(teachers.find_encoder("digits"), 16, torch.device("cpu"))
    assert isinstance(encoder, teachers.ImageEncoder)
    images = get_dataset("digits").train_images()[:6]
    for count in (5, 7):
        with pytest.raises(UserError, match=f"expected {count} images to cache tokens of"):
            teachers.cache_tokens(tmp_path, encoder, torch.split(images, 4), count)
        assert not (tmp_path / "tokens.json").exists()


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


def test_an_encoder_of_another_grid_is_refused() -> None:
    with pytest.raises(UserError, match="encoder 'digits' gives 16 tokens, the backbone has 64"):
        teachers.open_encoder(teachers.find_encoder("digits"), 64, torch.device("cpu"))
