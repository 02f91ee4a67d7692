"""Exported weights: official files give the same outputs when loaded, and diffusers computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stbench.cli.export import export_run, final_network
from stbench.config.build import build_backbone
from stbench.config.plan import prepare
from stbench.core.errors import UserError
from stbench.evaluate.past_run import open_run
from stbench.models.export import official_state
from stbench.models.official import load_official
from stbench.models.weights import save_weights
from stbench.runs.folder import RunFolder
from stbench.train import engine
from tests.conftest import Command, tiny_spec
from tests.networks import batch, tiny

PLAIN: dict[str, Any] = {"backbone__qk_norm": False}


@pytest.fixture()
def past(tmp_path: Path) -> Callable[..., Path]:
    """Make a run folder as training leaves it, but with random weights; returns its path."""

    def make(**more: Any) -> Path:
        spec = tiny_spec(steps=2, **more)
        prepared = prepare(spec)
        options = engine.RunOptions(tmp_path / "runs")
        folder = RunFolder(options.output / prepared.run_id)
        with folder.lock():
            engine.open_folder(folder, prepared, options)
        stage = folder.stage(0, prepared.stages[0].name)
        for weights in ("raw", "ema"):
            net = build_backbone(spec.backbone, spec.objective, prepared.dataset)
            for name, parameter in net.named_parameters():
                if name != "pos_embed" or spec.backbone.name == "uvit":
                    torch.nn.init.normal_(parameter, std=0.1)
            stage.record_weights(weights, 2, save_weights(net.state_dict(), stage.weights(weights, 2)))
        return folder.path

    return make


def original_of(family: str, options: dict[str, Any]) -> str:
    if family == "sit":
        return "sit" if options.get("backbone__noise_at_zero") else "repa"
    return {"dit": "dit", "uvit": "uvit-discrete"}[family]


@pytest.mark.parametrize("weights", ["ema", "raw"])
@pytest.mark.parametrize(
    "family,options",
    [
        ("dit", PLAIN),
        ("sit", {"backbone__qk_norm": True}),
        ("sit", PLAIN | {"backbone__noise_at_zero": True, "backbone__learn_sigma": True}),
        ("sit", PLAIN | {"backbone__learn_sigma": True}),
        ("uvit", {}),
    ],
)
def test_a_loaded_official_export_gives_the_same_outputs(
    past: Callable[..., Path], tmp_path: Path, family: str, options: dict[str, Any], weights: Any
) -> None:
    path = past(backbone=family, **options)
    lines = export_run(path, "official", tmp_path / "w.pt", weights)
    content = torch.load(tmp_path / "w.pt", weights_only=True)
    assert (content.keys() == {"ema", "args"}) is (family != "uvit") and "for: " in lines[1]
    model = load_official(tmp_path / "w.pt", heads=2, original=original_of(family, options))
    expected = final_network(open_run(path), weights)(*batch())
    assert torch.equal(model.backbone(*batch()), expected) and expected.abs().max() > 0


def test_repas_format_has_no_learned_variance() -> None:
    net = tiny("sit", learn_sigma=True, qk_norm=False)
    state, whose = official_state(net, {"learn_sigma": True})
    assert state["final_layer.linear.weight"].shape[0] == 16 and "t=0 is data" in whose
    plain = tiny("sit", qk_norm=False)
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(*batch()), net(*batch()))


def correct_frequencies(model: Any) -> None:
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0


def test_diffusers_computes_the_same_with_the_frequencies_of_dit(
    past: Callable[..., Path], tmp_path: Path
) -> None:
    """By default diffusers divides the exponents by 127 instead of 128: another function of time."""
    from diffusers import DiTTransformer2DModel

    path = past(backbone="dit", **PLAIN)
    lines = export_run(path, "diffusers", tmp_path / "dit", "ema")
    assert "downscale_freq_shift = 0" in lines[1]
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "dit", local_files_only=True).eval()
    x, _, y = batch()
    steps = torch.tensor([0, 7, 999])
    net = final_network(open_run(path), "ema")
    expected = net(x, steps.double() / 999, y)

    def difference() -> float:
        with torch.no_grad():
            out: Tensor = model(x, timestep=steps, class_labels=y).sample
        return float((out - expected).abs().max() / expected.abs().max().clamp(min=1.0))

    assert difference() > 1e-4
    correct_frequencies(model)
    assert difference() < 1e-5


@pytest.mark.parametrize(
    "family,options,kind,message",
    [
        ("dit", {"backbone__qk_norm": True}, "diffusers", "found a DiT with qk_norm; try --format official"),
        ("dit", {"backbone__qk_norm": True}, "official", "dit without qk_norm.*backbone.qk_norm=false"),
        ("uvit", {}, "diffusers", "found a uvit; try --format official"),
        ("sit", {}, "diffusers", "found a sit; try --format official"),
        ("dit", PLAIN | {"objective": "linear"}, "official", "found objective 'linear'"),
        ("sit", {"backbone__time_scale": 1000.0}, "official", "backbone.time_scale=1, .*found 1000"),
    ],
)
def test_a_network_that_other_code_cannot_express_is_refused(
    past: Callable[..., Path], tmp_path: Path, family: str, options: dict[str, Any], kind: Any, message: str
) -> None:
    path = past(backbone=family, **options)
    with pytest.raises(UserError, match=message) as caught:
        export_run(path, kind, tmp_path / "out.pt", "ema")
    assert "\n" not in str(caught.value) and not (tmp_path / "out.pt").exists()


def test_the_command_writes_a_file_and_does_not_overwrite_one(
    stbench: Command, past: Callable[..., Path], tmp_path: Path
) -> None:
    path = past(backbone="sit")
    code, out, err = stbench("export", path, "--output", tmp_path / "w.pt")
    assert code == 0, err
    assert "REPA" in out
    code, _, err = stbench("export", path, "--output", tmp_path / "w.pt")
    assert code == 2 and "exists; choose another --output" in err
    code, _, err = stbench("export", path, "--output", tmp_path / "w.bin")
    assert code == 2 and "ends in .pt" in err
    assert [f.name for f in tmp_path.glob("*w.*")] == ["w.pt"]
    code, _, err = stbench("export", tmp_path, "--output", tmp_path / "v.pt")
    assert code == 2 and "is not a run folder" in err


def test_the_configuration_names_the_class(past: Callable[..., Path], tmp_path: Path) -> None:
    path = past(backbone="dit", **PLAIN)
    export_run(path, "diffusers", tmp_path / "dit", "raw")
    config = json.loads((tmp_path / "dit" / "config.json").read_text())
    assert config["_class_name"] == "DiTTransformer2DModel" and config["num_embeds_ada_norm"] == 10
    assert sorted(f.name for f in (tmp_path / "dit").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
