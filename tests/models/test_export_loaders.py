"""Exported files against re-implementations of the published scripts' loading code."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from stbench.core.backbone import Backbone
from stbench.core.errors import UserError
from stbench.models.export import official_file
from stbench.models.export_heads import HeadsOf, rename_heads, zero_heads
from stbench.models.official import from_state
from tests.models import published_loaders
from tests.networks import batch, build, tiny

NO_HEADS = "none"


def on_meta(family: str, size: str, **options: Any) -> Backbone:
    """A published size without memory."""
    shape = {"input_size": 32, "classes": 1000, "out_channels": 8 if family == "dit" else 4}
    with torch.device("meta"):
        return build(family, size, **{**shape, **options})


def exported(net: Backbone, heads: str, **options: Any) -> tuple[dict[str, Any], list[str]]:
    stored = {} if heads == NO_HEADS else zero_heads(heads, net.info)  # type: ignore[arg-type]
    options = {"heads": {384: 6, 768: 12, 1024: 16, 1152: 16, 96: 3}[net.info.width], **options}
    objective = {"dit": "iddpm", "sit": "linear", "uvit": "vp-discrete"}[net.info.name]
    return official_file(net, options, objective, heads=stored)


@pytest.mark.parametrize("heads", [NO_HEADS, *get_args(HeadsOf)])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("size", ["b/2", "l/4", "xl/8", "s/2", "s/8", "ti/2"])
@pytest.mark.parametrize("input_size", [32, 64, 16])
def test_the_named_code_loads_a_sit(size: str, qk_norm: bool, heads: str, input_size: int) -> None:
    net = on_meta("sit", size, qk_norm=qk_norm, input_size=input_size)
    content, lines = exported(net, heads, qk_norm=qk_norm)
    (line,) = lines
    assert line.startswith("class ") is (size[0] in "st" or input_size == 16)
    published_loaders.load(line, content)


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("size", ["s/2", "b/4", "xl/2", "ti/2"])
def test_the_named_code_loads_a_sit_with_noise_at_zero(size: str, learn_sigma: bool) -> None:
    options = {"noise_at_zero": True, "learn_sigma": learn_sigma, "qk_norm": False}
    content, (line,) = exported(on_meta("sit", size, **options), NO_HEADS, **options)
    assert ("LayerSync" in line) is learn_sigma and line.startswith("class ") is (size == "ti/2")
    published_loaders.load(line, content)


@pytest.mark.parametrize("heads", [NO_HEADS, "sra"])
@pytest.mark.parametrize("size", ["s/2", "b/4", "xl/2", "ti/2"])
def test_the_named_code_loads_a_dit(size: str, heads: str) -> None:
    content, (line,) = exported(on_meta("dit", size, qk_norm=False), heads)
    assert ("DiT-SRA" in line) is (heads == "sra")
    published_loaders.load(line, content)


@pytest.mark.parametrize(
    "without,script",
    [
        ("ap_head.", "SiT-SRA/generate.py of vvvvvjdy/SRA --model SiT-B/2"),
        ("projectors.", "generate.py of sihyun-yu/REPA --model SiT-B/2 --projector-embed-dims 768"),
    ],
)
def test_a_file_without_heads_does_not_load_where_they_are_required(without: str, script: str) -> None:
    """The check itself fails for what earlier versions wrote."""
    content, _ = exported(on_meta("sit", "b/2"), NO_HEADS)
    with pytest.raises(AssertionError, match=without):
        published_loaders.load(script, content)


def test_repas_script_cannot_be_called_without_an_encoder() -> None:
    with pytest.raises(ValueError, match="invalid literal for int"):
        published_loaders.load("generate.py of sihyun-yu/REPA --model SiT-B/2 --projector-embed-dims ''", {})


@pytest.mark.parametrize("recipe", get_args(HeadsOf))
def test_heads_do_not_change_the_network_and_are_recognised(recipe: Any) -> None:
    net = tiny("sit", qk_norm=False)
    content, _ = official_file(net, {"heads": 3}, "linear", heads=zero_heads(recipe, net.info))
    model = from_state(content["ema"], settings=content["args"])
    assert torch.equal(model.backbone(*batch()), net(*batch()))
    titles = {"repa": "REPA", "sra": "SRA", "internal-guidance": "Internal Guidance"}
    assert model.description.startswith(titles.get(recipe, "Self-Transcendence"))
    assert model.dropped or list(model.guides) == ["head"]


def test_the_heads_of_several_encoders_are_all_named() -> None:
    net = on_meta("sit", "b/2")
    widths = {"0": 768, "1": 1024}
    own = {
        f"{j}.{key.split('.', 2)[2]}": torch.empty(*((w,) if key.endswith("4.bias") else (w, 2048)))
        if ".4." in key
        else value
        for j, w in widths.items()
        for key, value in zero_heads("repa", net.info).items()
    }
    content, (line,) = official_file(net, {"heads": 12}, "cosine", heads=rename_heads("repa", own))
    assert line.endswith("--path-type cosine --projector-embed-dims 768,1024")
    published_loaders.load(line, content)
    assert content["args"] == {"model": "SiT-B/2", "path_type": "cosine", "prediction": "v"}


@pytest.mark.parametrize(
    "family,options,heads",
    [
        ("dit", {"qk_norm": False}, "repa"),
        ("dit", {"qk_norm": False}, "vae-align"),
        ("dit", {"qk_norm": False}, "internal-guidance"),
        ("uvit", {}, "internal-guidance"),
        ("uvit", {}, "sra"),
        ("sit", {"noise_at_zero": True, "qk_norm": False}, "sra"),
    ],
)
def test_heads_that_no_repository_stores_with_the_network_are_refused(
    family: str, options: dict[str, Any], heads: str
) -> None:
    net = tiny(family, **options)
    scale = {"dit": "iddpm", "sit": "linear", "uvit": "vp-discrete"}[family]
    with pytest.raises(UserError, match="use --with-heads none"):
        official_file(net, {"heads": 3, **options}, scale, heads=zero_heads(heads, net.info))  # type: ignore[arg-type]
