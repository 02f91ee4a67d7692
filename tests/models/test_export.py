"""Exported weights: official files give the same outputs when loaded, and diffusers computes the same."""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stbench.cli.export import export_run, final_network
from stbench.config.build import build_backbone, build_objective
from stbench.config.plan import prepare
from stbench.core.errors import UserError
from stbench.diffusion.ddpm_samplers import Ddim
from stbench.diffusion.guidance import Denoiser
from stbench.diffusion.sample import Guidance
from stbench.evaluate.past_run import open_run
from stbench.models.export import official_state
from stbench.models.export_diffusers import CLASS_NAME, MODULE
from stbench.models.official import load_official
from stbench.models.weights import save_weights
from stbench.runs.folder import RunFolder
from stbench.train import engine
from tests.conftest import Command, tiny_spec, train_tiny
from tests.datafiles import make_vae
from tests.models import published_loaders
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
    assert (content.keys() == {"ema", "args"}) is (family != "uvit")
    assert [line.partition(":")[0] for line in lines] == ["weights", "heads", "loaded by"]
    model = load_official(tmp_path / "w.pt", heads=2, original=original_of(family, options))
    expected = final_network(open_run(path), weights)(*batch())
    assert torch.equal(model.backbone(*batch()), expected) and expected.abs().max() > 0


def test_repas_format_has_no_learned_variance() -> None:
    net = tiny("sit", learn_sigma=True, qk_norm=False)
    state = official_state(net, {"learn_sigma": True})
    assert state["final_layer.linear.weight"].shape[0] == 16
    plain = tiny("sit", qk_norm=False)
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(*batch()), net(*batch()))


# Heads


@pytest.mark.parametrize("recipe", ["repa", "sra", "vae-align", "self-transcendence"])
def test_the_trained_heads_of_a_run_are_in_its_file(tmp_path: Path, recipe: str) -> None:
    record = train_tiny(tmp_path, recipe, steps=2, backbone="sit", backbone__qk_norm=False)
    lines = export_run(Path(record.path), "official", tmp_path / "w.pt", "ema")
    assert lines[1] == f"heads: {recipe}, trained"
    content = torch.load(tmp_path / "w.pt", weights_only=True)
    published_loaders.load(lines[2].removeprefix("loaded by: "), content)
    (state,) = sorted(Path(record.path).glob("checkpoints/*/state-*.safetensors"))[-1:]
    trained = {k: v for k, v in load_file(state).items() if k.startswith("heads.")}
    stored = [v for k, v in content["ema"].items() if k.startswith(("projectors", "ap_head"))]
    assert len(stored) == len(trained) > 0
    assert {float(v.double().sum()) for v in stored} == {float(v.double().sum()) for v in trained.values()}


def test_heads_can_be_added_and_left_out(stbench: Command, past: Callable[..., Path], tmp_path: Path) -> None:
    path = past(backbone="sit", **PLAIN)
    for choice, found in (("sra", "sra, zeros"), ("none", "none"), ("repa", "repa, zeros")):
        code, out, err = stbench(
            "export", path, "--with-heads", choice, "--output", tmp_path / f"{choice}.pt"
        )
        assert code == 0 and f"heads: {found}" in out, err
    code, _, err = stbench(
        "export", past(backbone="uvit"), "--with-heads", "sra", "--output", tmp_path / "u.pt"
    )
    assert code == 2 and "use --with-heads none" in err
    options = ("--with-heads", "sra", "--format", "diffusers", "--output", tmp_path / "d")
    code, _, err = stbench("export", path, *options)
    assert code == 2 and "--with-heads applies to --format official" in err


# diffusers


@pytest.fixture()
def folder(past: Callable[..., Path], tmp_path: Path) -> tuple[Path, Any]:
    """A DiT exported for diffusers, and the network."""
    path = past(backbone="dit", **PLAIN)
    export_run(path, "diffusers", tmp_path / "dit", "ema")
    return tmp_path / "dit", final_network(open_run(path), "ema")


def difference(model: Any, net: Any) -> float:
    """The largest difference of the outputs, relative to the largest output."""
    x, _, _ = batch()
    steps, y = torch.tensor([0, 7, 999]), torch.tensor([0, 9, 10])
    expected = net(x, steps.double() / 999, y)
    with torch.no_grad():
        out: Tensor = model(x, timestep=steps, class_labels=y).sample
    return float((out - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def own_class(folder: Path) -> Any:
    """The class in the folder, imported as any Python file."""
    spec = importlib.util.spec_from_file_location("exported_dit", folder / f"{MODULE}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, CLASS_NAME)


def test_diffusers_computes_the_same_as_it_is_loaded(folder: tuple[Path, Any]) -> None:
    path, net = folder
    model = own_class(path).from_pretrained(path, local_files_only=True)
    assert difference(model, net) < 1e-5
    model.save_pretrained(path / "again")  # without the Python file: the configuration still names the class
    assert difference(own_class(path).from_pretrained(path / "again"), net) < 1e-5


def test_auto_model_runs_the_class_in_the_folder(
    folder: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoModel
    from diffusers.utils import dynamic_modules_utils

    if "trust_remote_code" not in inspect.getsource(AutoModel):
        pytest.skip("this version of diffusers has no AutoModel for classes in a folder")
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    path, net = folder
    assert difference(AutoModel.from_pretrained(str(path), trust_remote_code=True), net) < 1e-5


@pytest.mark.parametrize("place", ["folder", "again"])
def test_the_plain_class_refuses_to_compute_another_function(folder: tuple[Path, Any], place: str) -> None:
    from diffusers import DiTTransformer2DModel

    path, _ = folder
    own_class(path).from_pretrained(path).save_pretrained(path / "again")
    with pytest.raises(NotImplementedError, match="of DiT: load with AutoModel and trust_remote_code=True"):
        DiTTransformer2DModel.from_pretrained(path if place == "folder" else path / "again")


def test_the_pipeline_draws_the_same_images(folder: tuple[Path, Any], tmp_path: Path) -> None:
    """DiTPipeline with guidance against our DDIM sampler: the same noise, steps and decoder."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    path, net = folder
    vae = AutoencoderKL.from_pretrained(make_vae(tmp_path / "vae"))
    scheduler = DDIMScheduler.from_pretrained(path)
    pipeline = DiTPipeline(own_class(path).from_pretrained(path), vae, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        class_labels=[3, 7],
        guidance_scale=2.0,
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser(net, build_objective("iddpm"), torch.tensor([3, 7]), Guidance(2.0))
    latents = Ddim().run(denoiser, noise, steps=5, noise=None).float()
    with torch.no_grad():
        expected = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(
        torch.from_numpy(found).permute(0, 3, 1, 2), expected, atol=1e-4, rtol=1e-4, check_stride=False
    )


def test_the_label_table_is_padded_with_the_null_label(folder: tuple[Path, Any]) -> None:
    """The pipeline takes label 1000 as null, whatever the number of classes."""
    path, net = folder
    table = load_file(path / "diffusion_pytorch_model.safetensors")[
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    ]
    own = net.y_embedder.embedding_table.weight
    assert table.shape[0] == 1001 and torch.equal(table[:11], own)
    assert torch.equal(table[10:], own[-1:].expand(991, -1))


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
    assert code == 2 and "exists; delete it, or choose another --output" in err
    code, _, err = stbench("export", path, "--output", tmp_path / "w.bin")
    assert code == 2 and "ends in .pt" in err
    assert [f.name for f in tmp_path.glob("*w.*")] == ["w.pt"]
    code, _, err = stbench("export", tmp_path, "--output", tmp_path / "v.pt")
    assert code == 2 and "is not a run folder" in err


def test_the_configuration_names_the_class(past: Callable[..., Path], tmp_path: Path) -> None:
    path = past(backbone="dit", **PLAIN)
    export_run(path, "diffusers", tmp_path / "dit", "raw")
    config = json.loads((tmp_path / "dit" / "config.json").read_text())
    assert config["_class_name"] == CLASS_NAME and config["auto_map"] == {
        "AutoModel": f"{MODULE}.{CLASS_NAME}"
    }
    assert sorted(f.name for f in (tmp_path / "dit").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        f"{MODULE}.py",
        "scheduler_config.json",
    ]
