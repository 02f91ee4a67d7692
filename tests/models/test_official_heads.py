"""The head that stays, of Internal Guidance's checkpoints: loaded, sampled with, trained from, exported."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stbench.cli.export import export_run, final_network
from stbench.config.build import build_backbone
from stbench.config.init_from import load_start
from stbench.config.plan import prepare
from stbench.config.resolve import resolve_options
from stbench.core.backbone import kept_heads, load_trunk
from stbench.core.errors import UserError
from stbench.core.guides import HeadGuide
from stbench.evaluate.past_run import open_run
from stbench.models.official import from_state, load_official
from stbench.testing.golden.run import Golden
from tests.config.test_init_from import QUICK
from tests.conftest import Command, train_tiny
from tests.datafiles import make_vae
from tests.models import published_loaders
from tests.models.test_official import key_table, recipe_heads, wrapped
from tests.networks import batch

GOLDEN = Golden(Path(__file__).parents[1] / "golden", "loss_internal_guidance")
ARGS: dict[str, Any] = {"path_type": "linear", "encoder_depth": 1}


def head_table(width: int, channels: int = 4) -> dict[str, Tensor]:
    """Random parameters of the head for patches of 2x2, under its keys."""
    shapes = {"linear": (4 * channels, width), "adaLN_modulation.1": (2 * width, width)}
    torch.manual_seed(3)
    return {
        f"final_layer_xr.{name}.{kind}": 0.1 * torch.randn(shape if kind == "weight" else shape[:1])
        for name, shape in shapes.items()
        for kind in ("weight", "bias")
    }


@pytest.fixture()
def file(tmp_path: Path) -> Path:
    """A training checkpoint of Internal Guidance with two blocks, and heads of another recipe."""
    state = key_table(24, 2, out=4) | head_table(24) | recipe_heads("repa", 24)
    torch.save(wrapped(state, args=argparse.Namespace(**ARGS)), tmp_path / "ig.pt")
    return tmp_path / "ig.pt"


def test_the_golden_head_is_loaded_from_an_official_file(tmp_path: Path) -> None:
    config, block = GOLDEN.meta["config"], GOLDEN.meta["settings"]["block"]
    args = argparse.Namespace(path_type="linear", encoder_depth=block)
    torch.save(wrapped(GOLDEN.group("sd/") | GOLDEN.group("head/"), args=args), tmp_path / "ig.pt")
    model = load_official(tmp_path / "ig.pt", heads=config["num_heads"])
    assert model.description.startswith("Internal Guidance, sit-custom")
    assert f"with its head final_layer_xr after block {block}, from" in model.description
    assert model.guides == {"head": HeadGuide("head", block - 1, scale=1.4)} and model.dropped == ()
    t, y = GOLDEN.t, GOLDEN.t["in/y"].clone()
    y[t["in/label_drop_u"] < 0.1] = GOLDEN.meta["null_label"]
    output = model.backbone.run(t["mid/x_t"], t["in/t"].double(), y, indices=(block - 1,))
    head = kept_heads(model.backbone)["head"](output.features[block - 1], output.condition)
    assert GOLDEN.compare("head", head, t["mid/pred_intermediate"], 2e-5).ok
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


def test_without_its_option_the_head_is_on_the_published_block() -> None:
    state = key_table(24, 9, out=4) | head_table(24)
    options: dict[str, Any] = {"heads": 4, "objective": "linear"}
    assert from_state(state, **options).guides["head"].block == 7  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="encoder_depth, .* between 1 and 2 in the args of .*, found 8; use"):
        from_state(key_table(24, 2, out=4) | head_table(24), **options)
    for value in (0, 10, "8", True, 2.0):
        with pytest.raises(UserError, match="between 1 and 9"):
            from_state(state, settings={"encoder_depth": value}, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_layer_xr.norm.weight": torch.ones(24)}, "unknown keys: final_layer_xr.norm.weight"),
        ({"final_layer_xr.linear.bias": torch.zeros(32)}, r"final_layer_xr\.linear\.bias \(16,\)"),
        ({"final_layer_xr.linear.bias": torch.full((16,), torch.nan)}, "contains NaN in 'linear.bias'"),
        ({"final_layer_xr.linear.bias": None}, "missing keys: final_layer_xr.linear.bias"),
    ],
)
def test_a_head_that_does_not_fit_is_named(change: Mapping[str, Tensor | None], message: str) -> None:
    state = {**key_table(24, 2, out=4), **head_table(24), **change}
    with pytest.raises(UserError, match=message):
        from_state({k: v for k, v in state.items() if v is not None}, settings=ARGS, heads=4)


def test_the_head_that_stays_is_part_of_the_hash_and_dropped_heads_are_not() -> None:
    state = key_table(24, 2, out=4) | head_table(24)
    whole = from_state(state, settings=ARGS, heads=4)
    more = from_state(state | recipe_heads("repa", 24), settings=ARGS, heads=4)
    other = from_state(state | {"final_layer_xr.linear.bias": torch.zeros(16)}, settings=ARGS, heads=4)
    assert whole.sha256 == more.sha256 != other.sha256
    assert {key.partition(".")[0] for key in more.dropped} == {"projectors"}
    with pytest.raises(UserError, match="weights of SiT, as --original sit says, found keys of Internal"):
        from_state(state, settings=ARGS, heads=4, original="sit")


def started_from(file: Path, recipe: str, **more: Any) -> dict[str, Tensor]:
    """The weights with which a run from a checkpoint starts."""
    values = {"backbone": "sit", "recipe": recipe, "steps": 1, "init_from": str(file)}
    spec = resolve_options(values, {**QUICK, "backbone.heads": 4, **more})
    prepared = prepare(spec)
    heads = prepared.stages[0].definition.heads
    student = build_backbone(spec.backbone, spec.objective, prepared.dataset, heads=heads)
    assert spec.init is not None
    load_start(student, spec.init, spec.objective)
    return student.state_dict()


def test_training_starts_from_the_head_if_the_recipe_keeps_one(file: Path) -> None:
    expected = load_official(file, heads=4).backbone.state_dict()
    kept = started_from(file, "internal-guidance", **{"recipe.block": 0})
    assert kept.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in kept.items())
    plain = started_from(file, "vanilla")
    assert expected.keys() - plain.keys() == {k for k in expected if k.startswith("kept_heads.head.")}
    assert all(torch.equal(value, expected[name]) for name, value in plain.items())


def test_a_checkpoint_is_sampled_with_guidance_by_its_head(
    stbench: Command, file: Path, tmp_path: Path
) -> None:
    common = ("sample", "--checkpoint", file, "--heads", 4, "--vae", make_vae(tmp_path / "vae"))
    common += ("-n", 4, "--steps", 3, "--sampler", "euler", "--device", "cpu")
    images = {}
    for guide in (None, "head:1", "head:1.4@0-1", "head"):
        output = tmp_path / f"{guide}.npz"
        words = () if guide is None else ("--guide", guide)
        code, _, err = stbench(*common, *words, "--output", output)
        assert code == 0, err
        images[guide] = np.load(output)["arr_0"]
    assert np.array_equal(images[None], images["head:1"])
    assert not np.array_equal(images[None], images["head:1.4@0-1"])
    assert np.array_equal(images["head"], images["head:1.4@0-1"])


# Export


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_run_is_exported_with_its_head_and_loaded_again(tmp_path: Path, weights: Any) -> None:
    options: dict[str, Any] = {"backbone": "sit", "backbone__qk_norm": False, "train__lr": 0.1}
    record = train_tiny(tmp_path, "internal-guidance", steps=2, recipe__block=1, **options)
    _, heads, loader = export_run(Path(record.path), "official", tmp_path / "w.pt", weights)
    assert heads == "heads: internal-guidance, trained"
    content = torch.load(tmp_path / "w.pt", weights_only=True)
    assert "CVL-UESTC/Internal-Guidance" in loader and "encoder_depth=2" in loader
    published_loaders.load(loader.removeprefix("loaded by: "), content)
    assert content["args"]["encoder_depth"] == 2 and not any("kept" in key for key in content["ema"])
    net, model = (
        final_network(open_run(Path(record.path)), weights),
        load_official(tmp_path / "w.pt", heads=2),
    )
    assert model.guides == {"head": HeadGuide("head", 1, scale=1.4)}
    state = model.backbone.state_dict()
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert state["kept_heads.head.linear.weight"].any()


def test_a_kept_head_is_left_out_where_it_has_no_place(stbench: Command, tmp_path: Path) -> None:
    record = train_tiny(tmp_path, "internal-guidance", steps=1, backbone="dit", backbone__qk_norm=False)
    code, _, err = stbench("export", record.path, "--output", tmp_path / "w.pt")
    assert code == 2 and "use --with-heads none" in err and len(err.strip().splitlines()) == 1
    code, out, err = stbench("export", record.path, "--with-heads", "none", "--output", tmp_path / "w.pt")
    assert code == 0 and "heads: none; left out: head\n" in out, err
    net = final_network(open_run(Path(record.path)), "ema")
    model = load_official(tmp_path / "w.pt", heads=2, original="dit")
    load_trunk(net, model.backbone.state_dict())
    assert torch.equal(model.backbone(*batch()), net(*batch()))
    code, _, err = stbench("export", record.path, "--format", "diffusers", "--output", tmp_path / "d")
    assert code == 0, err
    assert json.loads((tmp_path / "d" / "config.json").read_text())["num_layers"] == net.info.depth
