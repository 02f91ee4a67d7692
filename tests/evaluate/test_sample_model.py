"""Networks to sample from: runs, and official weights with a decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stbench.backbones.sit import SiT
from stbench.core.errors import UserError
from stbench.diffusion import LinearFlow
from stbench.diffusion.sample import Guidance
from stbench.evaluate.sample_job import SampleRequest, resolve_request, sample_images
from stbench.evaluate.sample_model import ModelLocation, load_model
from tests.conftest import Command
from tests.datafiles import make_vae

CPU = [torch.device("cpu")]


def network(channels: int = 4) -> SiT:
    """A SiT of published width and one block, without zero weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SiT(
            channels=channels,
            input_size=4,
            classes=10,
            out_channels=channels,
            size="custom",
            width=384,
            depth=1,
            heads=6,
            patch=2,
        )
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.03)
    return net


@pytest.fixture()
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A training checkpoint in REPA's layout, and an autoencoder in diffusers'."""
    ema = network().state_dict()
    raw = {key: torch.zeros_like(value) for key, value in ema.items()}
    args = {"path_type": "linear", "prediction": "v"}
    torch.save({"model": raw, "ema": ema, "args": args, "steps": 7}, tmp_path / "last.pt")
    return tmp_path / "last.pt", make_vae(tmp_path / "vae")


def location(files: tuple[Path, Path], **changes: Any) -> ModelLocation:
    return ModelLocation(
        files[0], True, str(files[1]), **({"original": "repa", "objective": "linear"} | changes)
    )


def test_official_weights_are_the_ema_with_published_settings(files: tuple[Path, Path]) -> None:
    model = load_model(location(files))
    assert all(
        torch.equal(a, b) for a, b in zip(model.backbone.parameters(), network().parameters(), strict=True)
    )
    assert isinstance(model.objective, LinearFlow)
    spec = resolve_request(SampleRequest(5, 1.8), model)
    assert (spec.sampler, spec.steps, spec.labels) == ("euler-maruyama", 250, "random")
    assert spec.guidance == Guidance(1.8, 0.0, 1.0)


def test_latents_are_unscaled_decoded_and_rounded_once(files: tuple[Path, Path]) -> None:
    from stbench.models.autoencoder import find_vae

    z, vae = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), find_vae(str(files[1]))
    with torch.no_grad():
        decoded = vae.load().vae.decode(z / vae.scale).sample  # type: ignore[operator]
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(load_model(location(files)).decode(z), expected)


@pytest.mark.slow
def test_one_and_two_processes_sample_the_same_images_from_a_checkpoint(
    files: tuple[Path, Path], tmp_path: Path, stbench: Command
) -> None:
    common = ("sample", "--checkpoint", files[0], "--original", "repa", "--vae", files[1], "-n", 40)
    common = (*common, "--cfg", 1.8, "--interval", 0, 0.7, "--steps", 2, "--batch", 32)
    for name, device in {"a": "cpu", "b": "cpu,cpu"}.items():
        code, _, err = stbench(*common, "--device", device, "--output", tmp_path / f"{name}.npz")
        assert code == 0, err
    one, two = (np.load(tmp_path / f"{name}.npz") for name in "ab")
    assert one["arr_0"].shape == (40, 32, 32, 3) and np.array_equal(one["arr_0"], two["arr_0"])
    assert 0 <= one["labels"].min() < one["labels"].max() < 10


def test_weights_interpreted_in_another_way_are_other_images(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    """The file is the same, and so is the hash of its weights."""
    request, output = SampleRequest(2, channels=4, steps=1, sampler="euler"), tmp_path / "a.npz"
    made = sample_images(location(files), request, [output], CPU)
    assert (made["objective"], made["heads"], made["noise_at_zero"]) == ("linear", 6, None)
    assert sample_images(location(files, original="sra"), request, [output], CPU) == made
    before = output.read_bytes()
    for other, name in (
        ({"original": "sit"}, "noise_at_zero None, not True"),
        ({"heads": 12}, "heads 6, not 12"),
    ):
        with pytest.raises(UserError, match=f"was made with {name}"):
            sample_images(location(files, **other), request, [output], CPU)
    assert output.read_bytes() == before


def test_a_missing_or_unfit_decoder_is_one_line(files: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="official weights need a decoder: add --vae"):
        load_model(ModelLocation(files[0], True))
    with pytest.raises(UserError, match="expected an autoencoder"):
        load_model(ModelLocation(files[0], True, str(files[0].parent / "gone"), "repa"))
    torch.save(network(16).state_dict(), files[0])
    with pytest.raises(UserError, match=r"generates 16 channels, but --vae .* takes 4; give the autoencoder"):
        load_model(location(files))
    with pytest.raises(UserError, match="weights not found: .*gone.pt"):
        load_model(ModelLocation(files[0].with_name("gone.pt"), True, str(files[1]), "repa"))


@pytest.mark.parametrize(("original", "channels"), [("repa", None), ("sra", None), ("sit", 3)])
def test_guided_channels_default_to_those_of_the_repository(
    files: tuple[Path, Path], original: str, channels: int | None
) -> None:
    model = load_model(location(files, original=original))
    assert resolve_request(SampleRequest(5, 1.8), model).guidance.channels == channels
    assert resolve_request(SampleRequest(5, 1.8, channels=4), model).guidance.channels == 4


def test_a_network_of_pixels_needs_no_decoder(files: tuple[Path, Path]) -> None:
    torch.save(network(3).state_dict(), files[0])
    model = load_model(ModelLocation(files[0], True, "none", "repa", objective="linear"))
    assert model.decoder_hash == "pixels"
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0]).expand(1, 3, 4, 4)
    assert model.decode(pixels)[0, 0, 0].tolist() == [0, 0, 128, 255]
    torch.save(network(4).state_dict(), files[0])
    with pytest.raises(UserError, match=r"generates 4 channels, but --vae none takes 3"):
        load_model(ModelLocation(files[0], True, "none", "repa", objective="linear"))


def test_raw_weights_can_be_sampled_and_the_checkpoint_is_described(
    files: tuple[Path, Path], tmp_path: Path, stbench: Command
) -> None:
    content = torch.load(files[0])
    head = {"projectors.0.0.weight": torch.zeros(8, 384)}
    torch.save({"model": {**content["ema"], **head}}, files[0])  # without "args": the path is not known
    common = ("sample", "--checkpoint", files[0], "--vae", files[1], "-n", 2, "--steps", 2)
    code, _, err = stbench(*common, "--output", tmp_path / "a.npz")
    assert code == 2 and "with `stbench sample` --weights raw" in err
    raw = (*common, "--weights", "raw", "--output")
    code, _, err = stbench(*raw, tmp_path / "a.npz")
    assert code == 2 and "path of a SiT in" in err and "type --objective linear" in err
    code, _, err = stbench(*raw, tmp_path / "a.npz", "--objective", "linear")
    line = "REPA, sit-custom, data at t=0, objective linear, without its heads projectors, from "
    assert code == 0 and f"sampling from {line}" in err
    code, _, err = stbench(*raw, tmp_path / "b.npz", "--objective", "cosine")
    assert code == 0 and "objective cosine" in err
    assert (tmp_path / "a.npz").read_bytes() != (tmp_path / "b.npz").read_bytes()


def test_a_run_is_its_last_ema_weights_with_its_own_settings(trained_run: Path) -> None:
    model = load_model(ModelLocation(trained_run))
    assert not model.backbone.training and model.description == ""
    assert model.defaults["sampler"] == "euler" and model.defaults["steps"] == 2
    assert model.identity().keys() == {"weights", "decoder", "rounding"}


def test_the_decoder_of_the_digits_cannot_be_replaced(trained_run: Path) -> None:
    with pytest.raises(UserError, match="--vae applies to runs on prepared data; digits has its own decoder"):
        load_model(ModelLocation(trained_run, vae="sd-vae-ft-ema"))
