"""Backbones: published sizes and costs, features, conditioning, options and weight files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from stbench.core.backbone import Backbone
from stbench.core.errors import UserError
from stbench.core.registry import BACKBONES, load_builtins, lookup, names
from stbench.diffusion import VpContinuous
from stbench.diffusion.sample import Denoiser, Guidance
from stbench.models.layers import attend
from tests.networks import batch, build, tiny

load_builtins()
FAMILIES = [name for name in names(BACKBONES) if name in ("dit", "sit", "uvit")]


ADALN = {  # size -> parameters, trainable ones, GMACs, of DiT and of SiT with learned sigma
    "s/2": (32_963_360, 32_865_056, 6.06),
    "s/4": (32_945_024, 32_920_448, 1.41),
    "s/8": (33_148_160, 33_142_016, 0.36),
    "b/2": (130_512_416, 130_315_808, 23.01),
    "b/4": (130_475_648, 130_426_496, 5.57),
    "b/8": (130_881_536, 130_869_248, 1.42),
    "l/2": (458_102_816, 457_840_672, 80.70),
    "l/4": (458_053_760, 457_988_224, 19.70),
    "l/8": (458_594_816, 458_578_432, 5.01),
    "xl/2": (675_129_632, 674_834_720, 118.62),
    "xl/4": (675_074_432, 675_000_704, 29.04),
    "xl/8": (675_683_072, 675_664_640, 7.39),
}
SIT = {  # size -> parameters with four output channels, and with qk_norm on top
    "s/2": (32_957_200, 32_960_272),
    "b/2": (130_500_112, 130_503_184),
    "l/2": (458_086_416, 458_092_560),
    "xl/2": (675_111_184, 675_119_248),
}
UVIT = {  # size -> channels, latent size, classes, parameters, GMACs
    "s/2": (3, 32, 0, 44_255_328, 12.20),
    "s/4": (3, 64, 0, 44_292_228, 12.21),
    "m/4": (3, 64, 1000, 130_940_292, 35.24),
    "l/4-pixel": (3, 64, 1000, 286_827_652, 76.47),
    "l/2": (4, 32, 1000, 286_763_172, 76.46),
    "h/2": (4, 32, 1000, 500_832_016, 133.20),
    "l/4": (4, 64, 1000, 286_861_524, 76.48),
    "h/4": (4, 64, 1000, 500_942_656, 133.23),
    "s/2-latent": (4, 32, 1000, 44_772_516, 12.25),
    "m/2-latent": (4, 32, 1000, 130_891_940, 35.22),
}


def sizes(table: Iterable[str], fast: set[str]) -> list[Any]:
    """Test parameters in which every size that is not `fast` is slow."""
    return [size if size in fast else pytest.param(size, marks=pytest.mark.slow) for size in table]


def parameters(net: Backbone) -> int:
    return sum(p.numel() for p in net.parameters())


def gmacs(net: Backbone) -> float:
    return round(net.flops() / 2e9, 2)


@pytest.mark.parametrize("family,options", [("dit", {"out_channels": 8}), ("sit", {"learn_sigma": True})])
@pytest.mark.parametrize("size", sizes(ADALN, {"s/2", "b/4"}))
def test_adaln_sizes_match_the_published_ones(family: str, options: dict[str, Any], size: str) -> None:
    with torch.device("meta"):
        net = build(family, size, input_size=32, classes=1000, **options)
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert (parameters(net), trainable, gmacs(net)) == ADALN[size]


@pytest.mark.parametrize("size", sizes(SIT, {"s/2", "b/2"}))
def test_sit_with_four_channels_and_with_qk_norm_has_the_published_parameters(size: str) -> None:
    with torch.device("meta"):
        nets = [build("sit", size, input_size=32, classes=1000, qk_norm=norm) for norm in (False, True)]
    assert tuple(map(parameters, nets)) == SIT[size]


@pytest.mark.parametrize("size", sizes(UVIT, {"s/2", "m/4", "m/2-latent"}))
def test_uvit_sizes_match_the_published_ones(size: str) -> None:
    channels, input_size, classes, count, cost = UVIT[size]
    with torch.device("meta"):
        net = build(
            "uvit", size, channels=channels, input_size=input_size, classes=classes, out_channels=channels
        )
    assert (parameters(net), gmacs(net)) == (count, cost)


def test_every_published_preset_is_checked_above() -> None:
    assert set(lookup(BACKBONES, "dit").presets) == {*ADALN, "ti/2"}
    uvit = lookup(BACKBONES, "uvit")
    assert set(uvit.presets) == {*UVIT, "ti/2"}
    assert uvit.derived < set(uvit.presets)


@pytest.mark.parametrize("family", FAMILIES)
def test_prediction_has_out_channels(family: str) -> None:
    x, t, y = batch()
    assert tiny(family, out_channels=8)(x, t, y).shape == (3, 8, 8, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_stopping_early_changes_no_feature(family: str) -> None:
    net = tiny(family)
    x, t, y = batch()
    for k in range(net.info.depth):
        prediction, full = net.forward_intermediates(x, t, y, indices=(k,))
        none, early = net.forward_intermediates(x, t, y, indices=(k,), stop_early=True)
        assert none is None and torch.equal(early[k], full[k])
        assert full[k].shape == (3, net.info.tokens, net.info.width)
        assert prediction is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_stopping_early_runs_no_block_after_the_deepest_index(family: str) -> None:
    net = tiny(family)
    costs = [net.flops(0), net.flops(2), net.flops(net.info.depth - 1), net.flops()]
    assert costs == sorted(set(costs))
    ran: list[int] = []
    blocks = [m for m in net.modules() if type(m).__name__ in ("AdaLNBlock", "UViTBlock")]
    for k, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    net.features(*batch(), indices=(1, 3))
    assert len(ran) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_indices_does_not_matter(family: str) -> None:
    net = tiny(family)
    one, other = (net.features(*batch(), indices=order) for order in ((0, 2, 5), (5, 0, 2)))
    assert one.keys() == other.keys() == {0, 2, 5}
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert not torch.equal(one[2], one[5])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_null_label_differs_from_every_class(family: str) -> None:
    net = tiny(family)
    x, t, _ = batch(1)
    outputs = [net(x, t, torch.tensor([label])) for label in range(11)]
    assert all((outputs[10] - other).abs().max() > 1e-4 for other in outputs[:10])


@pytest.mark.parametrize("family", FAMILIES)
def test_time_reaches_the_output(family: str) -> None:
    net = tiny(family)
    x, t, y = batch()
    assert (net(x, t, y) - net(x, t / 2, y)).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_training_mode_drops_no_labels(family: str) -> None:
    net = tiny(family)
    x, t, y = batch()
    assert torch.equal(net.train()(x, t, y), net.eval()(x, t, y))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", [-1, 9])
def test_a_block_out_of_range_is_refused(family: str, block: int) -> None:
    net = tiny(family)
    with pytest.raises(
        ValueError,
        match=rf"block {block} is out of range: {family}-ti/2 has blocks 0\.\.{net.info.depth - 1}",
    ):
        net.forward_intermediates(*batch(), indices=(block,))


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_a_fresh_network_predicts_zero(family: str) -> None:
    assert build(family, "ti/2")(*batch()).abs().max() == 0


def test_whole_steps_are_embedded_exactly() -> None:
    seen: list[Tensor] = []
    net = tiny("dit")
    net.get_submodule("t_embedder").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    steps = torch.arange(1000)
    x, y = torch.zeros(1000, 4, 8, 8), torch.zeros(1000, dtype=torch.long)
    net.features(x, steps.double() / 999, y, indices=(0,))
    assert torch.equal(seen[0], steps.float())


def test_learned_sigma_returns_the_first_half_of_the_rows() -> None:
    net = tiny("sit", learn_sigma=True)
    plain = tiny("sit")
    state = net.state_dict()
    for name in ("weight", "bias"):
        rows = state[f"final_layer.linear.{name}"]
        state[f"final_layer.linear.{name}"] = rows.view(4, 8, *rows.shape[1:])[:, :4].flatten(0, 1)
    plain.load_state_dict(state)
    torch.testing.assert_close(net(*batch()), plain(*batch()))


def test_a_network_with_noise_at_zero_mirrors_time_and_velocity() -> None:
    net, turned = tiny("sit"), tiny("sit", noise_at_zero=True)
    x, t, y = batch()
    assert torch.equal(turned(x, t, y), -net(x, 1 - t, y))
    assert torch.equal(turned.features(x, t, y, indices=(2,))[2], net.features(x, 1 - t, y, indices=(2,))[2])


def test_uvit_without_a_label_table_ignores_labels() -> None:
    net = tiny("uvit", label_rows=0)
    x, t, y = batch()
    assert net.features(x, t, y, indices=(0,))[0].shape[1] == net.info.tokens
    assert torch.equal(net(x, t, y), net(x, t, y + 1))


def test_uvit_with_an_even_depth_is_refused() -> None:
    with pytest.raises(UserError, match=r"depth must be odd .*, got 6"):
        build("uvit", "ti/2", depth=6)


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_that_do_not_cover_the_latent_are_refused(family: str) -> None:
    with pytest.raises(UserError, match="divide the latent size 8, got 3"):
        build(family, "ti/2", patch=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_do_not_divide_the_width_are_refused(family: str) -> None:
    with pytest.raises(UserError, match="divide the width 96, got 5"):
        build(family, "ti/2", heads=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_softmax_of_scaled_products(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 8).to(dtype)
    expected = ((q.double() @ k.double().mT) / math.sqrt(8)).softmax(-1) @ v.double()
    out = attend(q, k, v)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_stays_near_float32(family: str) -> None:
    net = tiny(family)
    expected = net(*batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(*batch())
    assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_network_without_a_null_label_cannot_be_guided() -> None:
    assert [tiny("uvit", label_rows=rows).info.null_label for rows in (0, 10, 11)] == [True, False, True]
    with pytest.raises(UserError, match=r"has no null label and cannot be guided: .* got 1.5"):
        Denoiser(tiny("uvit", label_rows=10), VpContinuous(), torch.zeros(2).long(), Guidance(1.5))
    Denoiser(tiny("uvit", label_rows=10), VpContinuous(), torch.zeros(2).long(), Guidance(1.0))
