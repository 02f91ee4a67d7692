"""Official checkpoints: every kind of file, what keys and shapes determine, and what is refused."""

from __future__ import annotations

import argparse
import os
import pathlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stbench.core.errors import UserError
from stbench.core.registry import BACKBONES, lookup
from stbench.models.official import OfficialModel, from_state, load_official
from stbench.models.repositories import REPOSITORIES
from stbench.testing.golden.backbones import original
from stbench.testing.golden.run import Golden
from tests.networks import batch, tiny

GOLDEN = Path(__file__).parents[1] / "golden"
BACKBONE_FILES = sorted(file.stem for file in GOLDEN.glob("backbone_*.safetensors"))


def key_table(width: int, depth: int, *, out: int, heads: int = 0, patch: int = 2) -> dict[str, Tensor]:
    """Random weights under the keys of the DiT family, written out by hand; `heads` adds qk_norm."""
    d, c, tokens, rows = width, 4, 16, 11
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, tokens, d),
        "x_embedder.proj.weight": (d, c, patch, patch),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (rows, d),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
        "final_layer.linear.weight": (patch * patch * out, d),
        "final_layer.linear.bias": (patch * patch * out,),
    }
    linear = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
    for i in range(depth):
        for name, shape in {**linear, "adaLN_modulation.1": (6 * d, d)}.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("q_norm", "k_norm") if heads else ():
            shapes |= {f"blocks.{i}.attn.{name}.{kind}": (d // heads,) for kind in ("weight", "bias")}
    torch.manual_seed(0)
    return {key: torch.randn(shape) * 0.1 for key, shape in shapes.items()}


def recipe_heads(kind: str, width: int) -> dict[str, Tensor]:
    """The heads that the repositories of recipes store with the network."""
    names = {
        "repa": [f"projectors.{j}.{k}" for j in range(2) for k in (0, 2, 4)],
        "irepa": ["projectors.0.projection_layer"],
        "self-transcendence": ["projectors.0", "projectors.2", "projectors.4", "projectors_final.linear"],
        "sra": ["ap_head.linear1", "ap_head.linear2"],
    }[kind]
    return {f"{name}.{part}": torch.randn(3, width)[:, 0] for name in names for part in ("weight", "bias")}


def wrapped(state: Mapping[str, Tensor], **more: Any) -> dict[str, Any]:
    """A training checkpoint as the repositories write it; "model" differs from "ema"."""
    path = {"path_type": "linear", "prediction": "v"}
    args = argparse.Namespace(model="SiT-B/2", image_size=256, num_classes=1000, cfg_prob=0.1, **path)
    return {
        "model": {key: value + 1.0 for key, value in state.items()},
        "ema": dict(state),
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "args": args,
        "steps": 400000,
        **more,
    }


@pytest.fixture()
def write(tmp_path: Path) -> Callable[..., Path]:
    """Save content to a file of this test; returns its path."""

    def save(content: Any, name: str = "last.pt", **options: Any) -> Path:
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return save


def run(model: OfficialModel) -> Tensor:
    return model.backbone(*batch())


def test_a_training_checkpoint_gives_its_ema_or_its_raw_weights(write: Callable[..., Path]) -> None:
    state = key_table(96, 2, out=4)
    file = write(wrapped(state, epoch=7))
    options: dict[str, Any] = {"heads": 4, "original": "repa"}
    ema, raw = load_official(file, **options), load_official(file, weights="raw", **options)
    flat = from_state(state, objective="linear", **options)
    assert torch.equal(run(ema), run(flat)) and not torch.equal(run(raw), run(flat))
    assert ema.sha256 == flat.sha256 != raw.sha256
    assert not ema.backbone.training and not any(p.requires_grad for p in ema.backbone.parameters())


@pytest.mark.parametrize(
    "kind,out,heads,found",
    [
        ("repa", 4, 0, "REPA"),
        ("irepa", 4, 0, "REPA"),
        ("sra", 4, 0, "SRA"),
        ("self-transcendence", 4, 4, "Self-Transcendence"),
        ("sra", 8, 0, "SRA on DiT"),
    ],
)
def test_heads_identify_the_repository_and_are_reported(kind: str, out: int, heads: int, found: str) -> None:
    extra = recipe_heads(kind, 96)
    objective = None if out == 8 else "linear"
    model = from_state(key_table(96, 2, out=out, heads=heads) | extra, heads=4, objective=objective)
    assert model.description.startswith(f"{found}, ") and model.dropped == tuple(sorted(extra))
    assert (model.family, model.objective) == (("dit", "iddpm") if out == 8 else ("sit", "linear"))
    assert model.options["qk_norm"] is bool(heads)
    assert not model.options.get("noise_at_zero")


def test_dit_and_upstream_sit_are_never_guessed() -> None:
    state = key_table(64, 2, out=8)
    with pytest.raises(UserError, match="DiT, SiT, LayerSync or Dispersive loss.*--original dit, sit, "):
        from_state(state, heads=4)
    dit = from_state(state, heads=4, original="dit")
    sit = from_state(state, heads=4, original="sit", objective="linear")
    assert (dit.objective, sit.objective) == ("iddpm", "linear")
    assert from_state(state, heads=4, family="sit", objective="linear").options["noise_at_zero"]
    assert run(dit).shape[1] == 8 and run(sit).shape[1] == 4


def test_the_direction_of_time_is_never_guessed() -> None:
    state = key_table(64, 2, out=4)
    with pytest.raises(UserError, match="REPA, SRA, Self-Transcendence or SiT"):
        from_state(state, heads=4)
    x, t, y = batch()
    data, noise = (
        from_state(state, heads=4, original=o, objective="linear").backbone for o in ("repa", "sit")
    )
    assert torch.equal(noise(x, t, y), -data(x, 1 - t, y))


def test_stored_options_distinguish_dit_from_sit_and_name_the_path() -> None:
    state = key_table(64, 2, out=8)
    assert from_state(state, settings={"model": "DiT-B/2"}, heads=4).family == "dit"
    settings = {"model": "SiT-B/2", "path_type": "GVP", "prediction": "velocity"}
    sit = from_state(state, settings=settings, heads=4)
    assert (sit.family, sit.objective, sit.options["noise_at_zero"]) == ("sit", "cosine", True)
    assert "objective cosine, from the weights" in sit.description
    with pytest.raises(UserError, match="found prediction 'noise' on path 'gvp'"):
        from_state(state, settings=settings | {"prediction": "noise"}, heads=4)


def test_the_path_of_a_flat_sit_is_asked_for() -> None:
    """The GVP and the linear path have the same keys and shapes."""
    state, options = key_table(64, 2, out=4), {"heads": 4, "original": "repa"}
    with pytest.raises(
        UserError, match=r"path of a SiT in the weights or in --objective, found neither; typ"
    ):
        from_state(state, **options)
    with pytest.raises(UserError, match="found --objective iddpm; type --objective linear"):
        from_state(state, objective="iddpm", **options)
    for name in ("linear", "cosine", "cosine-lognormal"):
        model = from_state(state, objective=name, **options)
        assert model.objective == name and f"objective {name}, from" in model.description


def test_an_objective_that_contradicts_the_file_is_refused() -> None:
    state, options = key_table(64, 2, out=4), {"heads": 4, "original": "repa"}
    settings = {"path_type": "linear"}
    with pytest.raises(UserError, match="objective 'cosine' in the weights, found 'linear'"):
        from_state(state, settings=settings, objective="cosine", **options)
    lognormal = from_state(state, settings=settings, objective="linear-lognormal", **options)
    assert lognormal.objective == "linear-lognormal"
    with pytest.raises(UserError, match="objective 'linear' in the weights, found 'iddpm'"):
        from_state(key_table(64, 2, out=8), heads=4, original="dit", objective="linear")
    with pytest.raises(UserError, match="objective 'vp-continuous' in the weights, found 'vp-discrete'"):
        from_state(tiny("uvit").state_dict(), objective="vp-continuous")


def test_a_number_of_heads_that_contradicts_the_file_is_refused() -> None:
    state, options = key_table(64, 2, out=4, heads=4), {"original": "repa", "objective": "linear"}
    assert from_state(state, heads=4, **options).options["heads"] == 4
    with pytest.raises(UserError, match="expected 8 attention heads in the weights, found 4, which follow"):
        from_state(state, heads=8, **options)
    with pytest.raises(UserError, match="divides the width 64 of the weights, found 5"):
        from_state(key_table(64, 2, out=4), heads=5, **options)
    assert "sit-custom with 8 heads" in from_state(key_table(64, 2, out=4), heads=8, **options).description


def test_options_that_contradict_the_keys_are_refused() -> None:
    with pytest.raises(UserError, match="as --original repa says, found keys of DiT"):
        from_state(key_table(64, 2, out=8), heads=4, original="repa")
    with pytest.raises(UserError, match="unknown original 'reap'; did you mean 'repa'"):
        from_state(key_table(64, 2, out=4), heads=4, original="reap")
    with pytest.raises(UserError, match="weights of a dit, found those of REPA.*--backbone sit"):
        from_state(key_table(64, 2, out=4), heads=4, family="dit")


def test_early_repa_files_restart_block_numbers_after_the_projector() -> None:
    state = key_table(64, 3, out=4)
    early = {
        key.replace("blocks.1.", "decoder_blocks.0.").replace("blocks.2.", "decoder_blocks.1."): value
        for key, value in state.items()
    }
    model = from_state(early, heads=4, objective="linear")
    assert torch.equal(run(model), run(from_state(state, heads=4, original="repa", objective="linear")))
    assert model.description.startswith("REPA")


@pytest.mark.parametrize(
    "family,size,facts",
    [
        ("dit", "xl/2", dict(input_size=32, classes=1000, out_channels=8)),
        ("dit", "xl/2", dict(input_size=64, classes=1000, out_channels=8)),
        ("sit", "xl/2", dict(input_size=32, classes=1000, learn_sigma=True)),
        ("sit", "b/4", dict(input_size=32, classes=1000, qk_norm=True)),
        ("uvit", "h/2", dict(input_size=32, classes=1000)),
        ("uvit", "l/2", dict(input_size=32, classes=1000)),
        ("uvit", "l/4", dict(input_size=64, classes=1000)),
        ("uvit", "l/4-pixel", dict(input_size=64, channels=3, out_channels=3, classes=1000)),
    ],
)
def test_published_sizes_are_read_from_shapes(family: str, size: str, facts: dict[str, Any]) -> None:
    """On the meta device: shapes without memory."""
    cls = lookup(BACKBONES, family)
    preset = {key: value for key, value in cls.presets[size].items() if key != "objective"}
    everything = {**preset, "channels": 4, "out_channels": 4, "size": size, **facts}
    with torch.device("meta"):
        state = cls(**everything).state_dict()
    found = cls.infer(state)
    assert {key: found.get(key, value) for key, value in everything.items()} == everything


def test_uvit_takes_time_scale_and_objective_from_its_size_or_original() -> None:
    net = tiny("uvit")
    model = from_state(net.state_dict())
    assert (model.size, model.objective) == ("ti/2", "vp-discrete")
    assert torch.equal(run(model), net(*batch()))
    odd = tiny("uvit", depth=5).state_dict()
    with pytest.raises(UserError, match="of unpublished size.*--original uvit-discrete"):
        from_state(odd)
    for name, scale in (("uvit-discrete", 1000.0), ("uvit-continuous", 999.0)):
        model = from_state(odd, original=name)
        assert (model.backbone.time_scale, model.objective) == (scale, REPOSITORIES[name].objective)


@pytest.mark.parametrize("name", BACKBONE_FILES)
def test_golden_outputs_are_reproduced_from_a_file(name: str, write: Callable[..., Path]) -> None:
    """The golden weights in a file as the repositories write them, loaded as by --init-from."""
    golden = Golden(GOLDEN, name)
    config, source = golden.meta["config"], original(golden.meta)
    file = write(wrapped(golden.group("sd/"), args=argparse.Namespace(path_type="linear")))
    model = load_official(file, heads=config["num_heads"], original=source)
    native = golden.t["in/t"].double() / model.backbone.time_scale
    reversed_time = REPOSITORIES[source].noise_at_zero
    t = 1.0 - native if reversed_time else native
    out = model.backbone(golden.t["in/x"], t, golden.t["in/y"])
    expected = -golden.t["out/model"] if reversed_time else golden.t["out/model"]
    assert golden.compare("out", out, expected, 2e-5).ok
    assert set(model.dropped) == {k for k in golden.group("sd/") if k.startswith("projectors")}


def test_every_kind_of_file_loads(write: Callable[..., Path], tmp_path: Path) -> None:
    state = key_table(64, 2, out=4)
    options: dict[str, Any] = {"heads": 4, "original": "sra", "objective": "linear"}
    expected = run(from_state(state, **options))
    save_file(state, tmp_path / "flat.safetensors")
    files = [
        tmp_path / "flat.safetensors",
        write(state),
        write(state, "old.pt", _use_new_zipfile_serialization=False),
        write({f"module.{key}": value for key, value in state.items()}, "ddp.pt"),
        write(wrapped({key: value.double() for key, value in state.items()}), "double.pt"),
    ]
    for file in files:
        assert torch.equal(run(load_official(file, **options)), expected), file


class Malicious:
    """Would run a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "value,name",
    [
        (Malicious(), f"{os.name}.system"),
        # Python 3.13 moved the class to pathlib._local.
        (pathlib.PurePosixPath("x"), f"{pathlib.PurePosixPath.__module__}.PurePosixPath"),
    ],
)
def test_python_objects_other_than_a_namespace_are_refused_by_name(
    write: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    zipped: bool,
    value: Any,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(wrapped(key_table(64, 1, out=4), opt=value), _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=f"contains the Python object {name}.*refused") as caught:
        load_official(file, heads=4)
    assert "\n" not in str(caught.value) and not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_one_line(write: Callable[..., Path], zipped: bool, share: float) -> None:
    file = write(key_table(64, 1, out=4), _use_new_zipfile_serialization=zipped)
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"last\.pt is truncated or not a weight file") as caught:
        load_official(file, heads=4)
    assert "\n" not in str(caught.value)


def test_a_truncated_safetensors_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file(key_table(64, 1, out=4), file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated or not a safetensors"):
        load_official(file)


def test_a_file_without_a_state_dict_is_one_line(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weights not found: .*none.pt"):
        load_official(tmp_path / "none.pt")
    with pytest.raises(UserError, match="state dict in .*, found list"):
        load_official(write([torch.zeros(1)]))
    with pytest.raises(UserError, match="tensors by name in .*, found int under 'steps'"):
        load_official(write({"steps": 3}))
    with pytest.raises(UserError, match="'ema' weights in .*, found only 'model'; type --init-weights raw"):
        load_official(write({"model": key_table(64, 1, out=4)}))
    with pytest.raises(UserError, match="keys of DiT, SiT or U-ViT.*found foo"):
        load_official(write({"foo": torch.zeros(1)}))


@pytest.mark.parametrize("change", ["unknown", "missing"])
def test_unknown_and_missing_keys_are_named(change: str) -> None:
    state = key_table(64, 2, out=4)
    if change == "unknown":
        state["blocks.0.attn.rope"] = torch.zeros(1)
    else:
        del state["blocks.1.attn.proj.bias"]
    with pytest.raises(UserError, match=rf"{change} keys: blocks\.\d\.attn"):
        from_state(state, heads=4, original="repa")


def test_wrong_shapes_are_named() -> None:
    state = key_table(64, 2, out=4)
    state["blocks.1.mlp.fc1.bias"] = torch.zeros(7)
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.fc1\.bias \(256,\).*found torch.float32 \(7,\)"):
        from_state(state, heads=4, original="repa")
    state = key_table(64, 2, out=4)
    state["pos_embed"] = torch.zeros(1, 15, 64)
    with pytest.raises(UserError, match="square latent, found 15"):
        from_state(state, heads=4, original="repa")


@pytest.mark.parametrize("key", ["x_embedder.proj.weight", "final_layer.linear.weight"])
def test_weights_without_their_axes_are_named(key: str) -> None:
    state = key_table(64, 2, out=4)
    state[key] = torch.zeros(64)
    with pytest.raises(UserError, match=rf"expected [42] axes of {key} in .*, found shape \(64,\)"):
        from_state(state, heads=4, original="repa")


def test_an_unpublished_width_needs_the_number_of_heads() -> None:
    with pytest.raises(UserError, match="width 64, which no preset has; set it with --heads 6"):
        from_state(key_table(64, 2, out=4), original="repa")


def test_a_dit_without_learned_variance_is_refused() -> None:
    state = key_table(64, 2, out=4)
    with pytest.raises(UserError, match="as --original dit says"):
        from_state(state, heads=4, original="dit")


@pytest.mark.parametrize(
    "family,options",
    [
        ("dit", {"out_channels": 8, "qk_norm": False}),
        ("sit", {"learn_sigma": True, "patch": 4, "noise_at_zero": True}),
        ("sit", {"width": 60, "heads": 5}),
        ("uvit", {"mlp_time_embed": True, "conv": False, "depth": 5}),
        ("uvit", {"label_rows": 0, "classes": 0}),
    ],
)
def test_weights_determine_the_configuration(family: str, options: dict[str, Any]) -> None:
    net = tiny(family, **options)
    source = {"dit": "dit", "sit": "sit" if options.get("noise_at_zero") else "repa"}.get(
        family, "uvit-discrete"
    )
    model = from_state(net.state_dict(), original=source, objective="linear" if family == "sit" else None)
    x, t, _ = batch()
    y = torch.zeros(3, dtype=torch.long)
    assert torch.equal(model.backbone(x, t, y), net(x, t, y))
    assert (model.backbone.info.depth, model.backbone.info.classes) == (net.info.depth, net.info.classes)
