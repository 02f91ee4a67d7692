"""`stbench sample`: no image depends on devices, batches or stops; files are whole; one-line errors."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stbench.core.backbone import Backbone, BackboneInfo, Features
from stbench.core.device import arithmetic, pick_devices
from stbench.core.errors import UserError
from stbench.diffusion import LinearFlow
from stbench.diffusion.sample import Guidance, sample
from stbench.evaluate import sample_job as sampling
from stbench.evaluate.generate import image_noise
from stbench.evaluate.sample_batch import CPU_ROWS as ROWS
from stbench.evaluate.sample_batch import BatchSampler, SampleSpec
from stbench.evaluate.sample_job import SampleRequest
from stbench.evaluate.sample_model import ModelLocation, SamplingModel, load_model
from stbench.evaluate.sample_parts import PartsFolder, read_settings, write_pictures
from tests.conftest import Command, Runner

CPU = torch.device("cpu")
COUNT = 2 * ROWS + 6
"""Three network calls, the last of them filled up."""
ASKED = SampleRequest(COUNT, 1.8, (0.0, 0.7), sampler="euler-maruyama", steps=3, batch=ROWS)


@pytest.fixture()
def run(tiny: Runner) -> ModelLocation:
    return ModelLocation(Path(tiny().path))


def images(file: Path) -> np.ndarray:
    return np.load(file)["arr_0"]


def drawn(run: ModelLocation, file: Path, devices: str = "cpu", **changes: Any) -> np.ndarray:
    sampling.sample_images(run, replace(ASKED, **changes), [file], pick_devices(devices))
    return images(file)


def test_neither_batch_nor_processes_nor_number_change_a_pixel(run: ModelLocation, tmp_path: Path) -> None:
    whole = drawn(run, tmp_path / "a.npz")
    assert whole.shape == (COUNT, 32, 32, 3) and whole.dtype == np.uint8
    assert len(np.unique(whole.reshape(COUNT, -1), axis=0)) == COUNT
    assert np.array_equal(drawn(run, tmp_path / "b.npz", batch=7), whole)
    assert np.array_equal(drawn(run, tmp_path / "c.npz", batch=1000), whole)
    assert np.array_equal(drawn(run, tmp_path / "d.npz", "cpu,cpu"), whole)
    assert np.array_equal(drawn(run, tmp_path / "e.npz", count=ROWS + 1), whole[: ROWS + 1])
    assert not np.array_equal(drawn(run, tmp_path / "f.npz", seed=1), whole)


def test_a_stopped_job_goes_on_with_the_same_pixels(
    run: ModelLocation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = drawn(run, tmp_path / "a.npz")
    paint, painted = BatchSampler.sample, []

    def stops(self: BatchSampler, start: int, stop: int) -> np.ndarray:
        painted.append(start)
        if len(painted) == 3:
            raise KeyboardInterrupt
        return paint(self, start, stop)

    monkeypatch.setattr(BatchSampler, "sample", stops)
    with pytest.raises(KeyboardInterrupt):
        drawn(run, tmp_path / "b.npz")
    parts = tmp_path / "b.npz.parts"
    assert not (tmp_path / "b.npz").exists() and len(list(parts.glob("*.npy"))) == 2
    (parts / f"{ROWS:08d}.npy").write_bytes(b"cut off")
    assert np.array_equal(drawn(run, tmp_path / "b.npz"), whole)
    assert painted == [0, ROWS, 2 * ROWS, ROWS, 2 * ROWS]
    assert sorted(path.name for path in tmp_path.glob("b.npz*")) == ["b.npz"]


def test_what_a_killed_process_had_begun_of_an_output_goes(run: ModelLocation, tmp_path: Path) -> None:
    here = tmp_path / "drawn"
    (here / ".png.7.tmp").mkdir(parents=True)
    (here / ".png.7.tmp" / "000000.png").touch()
    (here / ".a.npz.7.tmp").touch()
    (here / ".b.npz.7.tmp").touch()
    sampling.sample_images(run, ASKED, [here / "a.npz", here / "png"], [CPU])
    assert sorted(p.name for p in here.iterdir()) == [".b.npz.7.tmp", "a.npz", "png"]


def test_each_image_has_noise_of_its_own() -> None:
    some = image_noise(0, "sample", start=3, stop=9, shape=(4, 2, 2))
    assert torch.equal(image_noise(0, "sample", start=5, stop=6, shape=(4, 2, 2))[0], some[2])
    assert len(some.flatten(1).unique(dim=0)) == 6
    assert not torch.equal(image_noise(0, "sample-step-0", start=3, stop=9, shape=(4, 2, 2)), some)
    assert not torch.equal(image_noise(1, "sample", start=3, stop=9, shape=(4, 2, 2)), some)


def test_npz_and_folder_hold_the_same_images_and_the_settings(run: ModelLocation, tmp_path: Path) -> None:
    file, folder = tmp_path / "a.npz", tmp_path / "png"
    settings = sampling.sample_images(run, ASKED, [file, folder], [CPU])
    pictures = sorted(folder.glob("*.png"))
    assert [p.name for p in pictures] == [f"{i:06d}.png" for i in range(COUNT)]
    assert np.array_equal(np.stack([np.asarray(Image.open(p)) for p in pictures]), images(file))
    held = np.load(file)
    assert held.files == ["arr_0", "labels", "settings"]
    assert held["labels"].tolist() == [i % 10 for i in range(COUNT)]
    assert read_settings(file) == read_settings(folder) == json.loads(json.dumps(settings))
    assert settings["cfg"] == 1.8 and list(settings["interval"]) == [0.0, 0.7]
    assert settings["rounding"].startswith("clamp, round half to even")


def test_what_is_made_is_left_alone_and_other_settings_are_refused(
    run: ModelLocation, tmp_path: Path
) -> None:
    file = tmp_path / "a.npz"
    drawn(run, file)
    before = file.stat().st_mtime_ns
    drawn(run, file)
    assert file.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"a.npz was made with cfg 1.8, not 2.0; delete it or choose another"):
        drawn(run, file, scale=2.0)
    np.savez(tmp_path / "other.npz", np.zeros(3))
    with pytest.raises(UserError, match="was not made by `stbench sample`"):
        drawn(run, tmp_path / "other.npz")
    PartsFolder(tmp_path / "b.npz", {"count": 9, "cfg": 1.0}, 3).open()
    with pytest.raises(UserError, match=r"b.npz.parts was made with schema None, not 1"):
        drawn(run, tmp_path / "b.npz")


def test_two_commands_do_not_fill_one_output(run: ModelLocation, tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    with (
        PartsFolder(file, {"count": 1}, 1).lock(),
        pytest.raises(UserError, match="a.npz.parts is in use by process"),
    ):
        drawn(run, file)
    (tmp_path / "a.npz.parts" / ".00000000.npy.1.tmp").write_bytes(b"left by a kill")
    assert len(drawn(run, file)) == COUNT


def full_after(allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the given number of synced files on, the disk is full: what a file system says late, at fsync."""
    sync, calls = os.fsync, iter(range(10**6))

    def fsync(handle: int) -> None:
        if next(calls) >= allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("allowed", [0, 3, 6], ids=["settings", "a part", "the npz"])
def test_a_full_disk_is_one_line_and_loses_nothing(
    run: ModelLocation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    whole = drawn(run, tmp_path / "a.npz")
    with monkeypatch.context() as patch:
        full_after(allowed, patch)
        with pytest.raises(
            UserError, match=r"cannot write .*b.npz.*: No space left on device; free some space"
        ):
            drawn(run, tmp_path / "b.npz")
    assert not (tmp_path / "b.npz").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
    for part in (tmp_path / "b.npz.parts").glob("*.npy"):
        assert len(np.load(part)) in (ROWS, COUNT - 2 * ROWS)
    assert np.array_equal(drawn(run, tmp_path / "b.npz"), whole)


def test_a_full_disk_while_writing_pictures_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Image.Image.save

    def full(self: Image.Image, target: Path, *rest: object) -> None:
        save(self, target)
        if target.name.startswith("000002"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="cannot write .*png: No space left on device"):
        write_pictures(tmp_path / "png", 4, [np.zeros((4, 2, 2, 3), np.uint8)], {})
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_a_process_stops_all_and_is_one_line(run: ModelLocation, tmp_path: Path) -> None:
    order = sampling.resolve_request(ASKED, SamplingModel(**_source()))
    parts = PartsFolder(tmp_path / "a.npz", {"count": COUNT}, ROWS)
    parts.open()
    gone = ModelLocation(tmp_path / "gone")
    with pytest.raises(UserError, match="gone is not a run folder"):
        sampling.generate_in_processes(sampling.Job(gone, order, parts), [CPU, CPU], parts.missing())


class Counting(Backbone):
    """Counts calls and rows, and answers by label, so that guided and unguided differ."""

    def __init__(self) -> None:
        super().__init__()
        self.info = BackboneInfo("counting", "custom", 1, 1, 16, 2, 4, 8, 10)
        self.seen: list[tuple[float, int]] = []

    def forward_intermediates(
        self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int] = (), stop_early: bool = False
    ) -> tuple[Tensor | None, Features]:
        self.seen.append((float(t[0]), len(x)))
        return 0.1 * x + y.view(-1, 1, 1, 1), {}


def _source(backbone: Counting | None = None) -> dict[str, Any]:
    return {
        "backbone": backbone or Counting(),
        "objective": LinearFlow(),
        "decode": lambda z: (z[:, :3] * 20 + 128).clamp(0, 255).to(torch.uint8),
        "weights_hash": "w",
        "decoder_hash": "d",
        "defaults": {
            "sampler": "euler",
            "steps": 10,
            "labels": "random",
            "interval": (0.2, 0.7),
            "channels": None,
        },
    }


@pytest.mark.parametrize("sampler", ["euler", "euler-maruyama", "heun"])
def test_guidance_outside_its_interval_costs_nothing(sampler: str) -> None:
    network, z = Counting(), torch.zeros(5, 4, 8, 8)
    options: dict[str, Any] = {"steps": 10, "noise": lambda draw: z}
    sample(sampler, network, LinearFlow(), z, torch.arange(5), guidance=Guidance(1.8, 0.2, 0.7), **options)
    inside = [(t, rows) for t, rows in network.seen if 0.2 <= t <= 0.7]
    outside = [(t, rows) for t, rows in network.seen if not 0.2 <= t <= 0.7]
    if sampler == "heun":  # the correction takes the decision of its step's start
        assert {rows for _, rows in network.seen} == {5, 10}
        assert sum(rows for _, rows in network.seen) < 10 * len(network.seen)
    else:
        assert {rows for _, rows in inside} == {10} and {rows for _, rows in outside} == {5}
    assert len(inside) > 3 and len(outside) > 3
    plain = Counting()
    sample(sampler, plain, LinearFlow(), z, torch.arange(5), guidance=Guidance(1.0, 0.2, 0.7), **options)
    assert {rows for _, rows in plain.seen} == {5} and len(plain.seen) == len(network.seen)


def test_the_digits_have_a_decoder_of_their_own(run: ModelLocation) -> None:
    with pytest.raises(UserError, match="--vae applies to runs on prepared data; digits has its own decoder"):
        load_model(replace(run, vae="sd-vae-ft-ema"))


def test_every_call_has_the_same_number_of_rows() -> None:
    network = Counting()
    source = SamplingModel(**_source(network))
    order = sampling.resolve_request(replace(ASKED, scale=1.0, sampler="euler", batch=5), source)
    assert BatchSampler(source, order, CPU).sample(0, 6).shape == (6, 8, 8, 3)
    assert {rows for _, rows in network.seen} == {ROWS}
    assert sampling.shard_size(order, CPU) == ROWS


def test_what_is_left_open_comes_from_the_source() -> None:
    source = SamplingModel(**_source())
    order = sampling.resolve_request(SampleRequest(5), source)
    assert order == SampleSpec(5, Guidance(1.0, 0.2, 0.7), "euler", 10, "random", 0, 64)
    for wrong, message in {
        "sampler": ("ddpm", "cannot invert objective"),
        "labels": ("even", "'balanced' or 'random'"),
        "channels": (9, "--channels must be between 1 and 4"),
        "precision": ("fp16", "unknown precision 'fp16'"),
        "interval": ((0.7, 0.2), "0 <= low <= high"),
    }.items():
        with pytest.raises(UserError, match=message[1]):
            sampling.resolve_request(replace(SampleRequest(5), **{wrong: message[0]}), source)


def test_arithmetic_puts_the_switches_back() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with arithmetic("tf32", CPU):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
    with arithmetic("bf16", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def switches() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    return cudnn.enabled, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def test_the_decoder_is_in_fp32_whatever_the_network_is_in() -> None:
    seen: dict[str, tuple[bool, ...]] = {}

    def decode(z: torch.Tensor) -> torch.Tensor:
        seen["decoder"] = switches()
        return torch.zeros(len(z), 3, 4, 4, dtype=torch.uint8)

    source = SamplingModel(**(_source() | {"decode": decode}))
    before = switches()
    order = sampling.resolve_request(SampleRequest(2, steps=1, precision="tf32"), source)
    BatchSampler(source, order, CPU).sample(0, 2)
    assert seen["decoder"] == (True, False, False) and switches() == before


def test_devices_are_of_one_kind() -> None:
    assert pick_devices("cpu, cpu") == [CPU, CPU]
    with pytest.raises(UserError, match="is not here|devices of one kind"):
        pick_devices("cpu,cuda")


MISTAKES = {
    "nothing": ((), "expected a run folder or --checkpoint FILE, found neither"),
    "both": (("nowhere", "--checkpoint", "x.pt"), "found both"),
    "original of a run": (("nowhere", "--original", "repa"), "apply to --checkpoint"),
    "suffix": (("nowhere", "--output", "x.png"), "must be a folder or a file that ends in .npz"),
    "twice": (("nowhere", "--output", "x", "--output", "./x"), "names the same path twice"),
    "no decoder": (("--checkpoint", "x.pt"), "official weights need a decoder: add --vae"),
    "guidance": (("nowhere", "--cfg", "0.5"), "Invalid value for '--cfg'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(
    stbench: Command, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[name]
    code, _, err = stbench("sample", *arguments, "--device", "cpu")
    assert code == 2 and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_the_command_takes_guidance_by_either_name(
    run: ModelLocation, stbench: Command, tmp_path: Path
) -> None:
    common = ("sample", run.path, "-n", 5, "--device", "cpu", "--interval", 0, 0.7, "--steps", 2)
    for name, option in {"a": "--cfg", "b": "--guidance"}.items():
        code, out, err = stbench(*common, option, 1.8, "--output", tmp_path / f"{name}.npz")
        assert code == 0 and f"5 images: {tmp_path / name}.npz" in out, err
    assert np.array_equal(images(tmp_path / "a.npz"), images(tmp_path / "b.npz"))
