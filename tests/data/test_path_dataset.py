"""Data sets from a path: rows, order, split, mirror images, devices, decoding, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stbench.core import verified
from stbench.core.errors import UserError
from stbench.data import dataset as dataset_module
from stbench.data.crop import decode_image
from stbench.data.dataset import Dataset, get_dataset
from stbench.data.open import open_data
from stbench.data.path_sets import Custom
from stbench.data.prepare import PrepareOptions
from stbench.data.spec import DataSpec
from stbench.models.autoencoder import WEIGHTS, find_vae, to_uint8
from tests.data.conftest import COUNT, SIZE
from tests.datafiles import column, make_images, make_repa, make_vae, picture, run_prepare


@pytest.fixture(scope="module")
def root(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/, and sets prepared from them: plain/, flip/ and pixels/."""
    root = tmp_path_factory.mktemp("data")
    make_images(root / "images", COUNT, SIZE)
    options = PrepareOptions(
        root / "images", root / "plain", str(vae), SIZE, shards=4, batch=8, references=20
    )
    run_prepare(options)
    run_prepare(replace(options, target=root / "flip", flip=True))
    run_prepare(replace(options, target=root / "pixels", vae="none", flip=True))
    return root


def opened(path: Path, **options: object) -> Custom:
    found = get_dataset("custom", DataSpec(path=str(path), **options))  # type: ignore[arg-type]
    assert isinstance(found, Custom)
    return found


def zeros(dataset: Dataset, count: int) -> Tensor:
    return torch.zeros(count, dataset.channels, dataset.input_size, dataset.input_size)


def test_attributes_come_from_the_manifest(root: Path, vae: Path) -> None:
    data = opened(root / "plain")
    assert (data.size, data.classes, data.channels, data.input_size) == (57, 10, 4, 4)
    assert (data.image_shape, data.flip, data.decoder) == (
        (3, SIZE, SIZE),
        False,
        find_vae(str(vae)).sha256,
    )


def test_latents_are_the_scaled_mean_plus_noise_times_std(root: Path) -> None:
    data, split = opened(root / "plain"), column(root / "plain", "split")
    moments = torch.from_numpy(column(root / "plain", "moments")[split != 1][:, 0]).float()
    rows = torch.tensor([56, 0, 31, 31])
    noise = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, std = moments[rows].chunk(2, 1)
    assert torch.equal(data.latents(rows, noise), (mean + std * noise) * 0.18215)
    assert torch.equal(
        data.labels(rows), torch.from_numpy(column(root / "plain", "labels")[split != 1])[rows]
    )


def test_the_mean_latent_is_that_of_all_rows_read_in_parts(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "MEAN_BATCH", 10)
    for name, views in (("plain", 1), ("flip", 2)):
        split = column(root / name, "split")
        moments = torch.from_numpy(column(root / name, "moments")[split != 1]).double()
        assert moments.shape[1] == views
        expected = moments[:, :, :4].mean((0, 1)) * 0.18215
        torch.testing.assert_close(opened(root / name).mean_latent(), expected.float())
    pixels = opened(root / "pixels")
    torch.testing.assert_close(pixels.mean_latent(), pixels.mean_latent().flip(-1))


def test_held_out_images_are_not_in_the_training_rows(root: Path) -> None:
    data, split = opened(root / "plain"), column(root / "plain", "split")
    z, y = data.heldout()
    assert (z.shape, len(y), len(data.heldout_images())) == ((3, 4, 4, 4), 3, 3)
    moments = torch.from_numpy(column(root / "plain", "moments")[split == 1][:, 0]).float()
    assert torch.equal(z, moments[:, :4] * 0.18215)
    everything = data.latents(torch.arange(data.size), zeros(data, data.size))
    assert torch.cdist(z.flatten(1), everything.flatten(1)).min() > 1e-4
    names = column(root / "plain", "ids")[split == 1]
    crops = [decode_image((root / "images" / n.decode()).read_bytes(), 3, SIZE) for n in names]
    assert np.array_equal(data.heldout_images().numpy(), crops)


def test_references_are_the_training_images_with_pixels(root: Path) -> None:
    data = opened(root / "plain")
    assert {name: len(images()) for name, images in data.references.items()} == {"train": 20, "all": 23}
    assert torch.equal(data.references["train"](), data.train_images())
    split, names = column(root / "plain", "split"), column(root / "plain", "ids")
    first = decode_image((root / "images" / names[split == 2][0].decode()).read_bytes(), 3, SIZE)
    assert np.array_equal(data.train_images()[0].numpy(), first)


def test_an_epoch_contains_every_image_once(root: Path) -> None:
    data = opened(root / "plain")
    epochs = data.order(3, 0, 3 * data.size).view(3, -1)
    assert torch.equal(epochs.sort(1).values, torch.arange(data.size).expand(3, -1))
    assert not torch.equal(epochs[0], epochs[1])


def test_order_does_not_depend_on_earlier_calls(root: Path) -> None:
    data = opened(root / "plain")
    whole = data.order(3, 0, 40 * 16)
    fresh = Custom(DataSpec(path=str(root / "plain")))
    for step in (39, 3, 0):
        assert torch.equal(fresh.order(3, step * 16, 16), whole[step * 16 :][:16])
    assert not torch.equal(fresh.order(4, 0, 16), whole[:16])
    far = fresh.order(3, 10**12, 16)
    assert torch.equal(far, Custom(DataSpec(path=str(root / "plain"))).order(3, 10**12, 16))


def test_flip_mirrors_half_of_the_rows(root: Path) -> None:
    data, plain = opened(root / "flip"), opened(root / "plain")
    order = data.order(0, 0, 40 * data.size)
    assert torch.equal(order % data.size, plain.order(0, 0, 40 * data.size))
    share = float((order >= data.size).float().mean())
    assert share == pytest.approx(0.5, abs=0.05)
    split = column(root / "flip", "split")
    mirror = torch.from_numpy(column(root / "flip", "moments")[split != 1][:, 1]).float()[:, :4] * 0.18215
    row = torch.tensor([5])
    assert torch.equal(data.latents(row + data.size, zeros(data, 1)), mirror[row])
    assert torch.equal(data.labels(row + data.size), data.labels(row))


def test_flip_can_be_turned_off_and_is_part_of_the_fingerprint(root: Path) -> None:
    still, data = opened(root / "flip", flip=False), opened(root / "flip")
    assert int(still.order(0, 0, 500).max()) < still.size
    assert still.fingerprint != data.fingerprint
    with pytest.raises(UserError, match="has no moments of mirror images; prepare it with --flip"):
        opened(root / "plain", flip=True)


def test_pixels_are_used_as_latents(root: Path) -> None:
    data = opened(root / "pixels")
    assert (data.channels, data.input_size, data.decoder) == (3, SIZE, "pixels")
    rows = torch.tensor([3, 3 + data.size])
    z = data.latents(rows, torch.ones(2, 3, SIZE, SIZE))
    split = column(root / "pixels", "split")
    pixels = torch.from_numpy(column(root / "pixels", "pixels")[split != 1][3, 0])
    assert torch.equal(data.decode(z)[0], pixels)
    assert torch.equal(data.decode(z)[1], pixels.flip(-1))


def test_decoding_inverts_the_normalisation(root: Path, vae: Path) -> None:
    data = opened(root / "plain")
    z = torch.randn(20, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    network = find_vae(str(vae)).load()
    expected = torch.cat([to_uint8(network.decode(part / 0.18215)) for part in z.split(16)])
    assert torch.equal(data.decode(z), expected)


def test_resident_rows_are_bit_identical(root: Path) -> None:
    mapped, resident = opened(root / "flip").to("cpu"), opened(root / "flip", resident="yes").to("cpu")
    assert resident._resident is not None and mapped._resident is None
    rows = mapped.order(1, 100, 64)
    noise = torch.randn(64, 4, 4, 4)
    assert torch.equal(mapped.latents(rows, noise), resident.latents(rows, noise))
    assert mapped.fingerprint == resident.fingerprint


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_latents_from_host_and_device_memory(root: Path) -> None:
    mapped = opened(root / "flip", resident="no").to("cuda")
    resident = opened(root / "flip").to("cuda")
    assert resident._resident is not None and mapped._resident is None
    rows, noise = mapped.order(1, 100, 64), torch.randn(64, 4, 4, 4)
    assert torch.equal(mapped.latents(rows, noise), resident.latents(rows, noise))


def test_prefetched_rows_are_bit_identical(root: Path) -> None:
    data, fresh = opened(root / "flip").to("cpu"), opened(root / "flip").to("cpu")
    for step in range(6):
        rows = data.order(7, step * 16, 16)
        for part in rows.split(5):
            noise = torch.randn(len(part), 4, 4, 4)
            assert torch.equal(data.latents(part, noise), fresh.latents(part, noise))


def test_a_read_error_in_the_background_is_raised_by_latents(root: Path, tmp_path: Path, vae: Path) -> None:
    folder = make_repa(tmp_path / "repa", 30)
    data = opened(folder, vae=str(vae))
    for file in (folder / "vae-sd").rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:100])
    rows = data.order(0, 0, 8)
    with pytest.raises(UserError, match="is truncated or not an .npy file"):
        data.latents(rows, zeros(data, 8))


def test_images_encoded_on_the_fly_equal_a_prepared_set(root: Path, vae: Path) -> None:
    plain, direct = opened(root / "plain"), opened(root / "images", vae=str(vae), size=SIZE)
    assert (direct.size, direct.classes) == (plain.size, plain.classes)
    rows = torch.arange(plain.size)
    noise = torch.randn(len(rows), 4, 4, 4)
    assert torch.allclose(direct.latents(rows, noise), plain.latents(rows, noise), atol=2e-3)
    assert torch.equal(direct.heldout_images(), plain.heldout_images())
    pixels = opened(root / "images", vae="none")
    assert (pixels.channels, pixels.input_size, len(pixels.train_images())) == (3, SIZE, 57)


def test_a_folder_of_images_requires_an_autoencoder_and_one_size(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="need an autoencoder: add --set data.vae=sd-vae-ft-ema"):
        opened(root / "images")
    mixed = make_images(tmp_path / "mixed", 10, mixed=True)
    with pytest.raises(UserError, match=r"images of one size, found .* is 64x64, .* --set data.size=64"):
        opened(mixed, vae="none")


def test_truncated_shards_and_unfinished_sets_are_refused(root: Path, tmp_path: Path, vae: Path) -> None:
    job = PrepareOptions(root / "images", tmp_path / "set", str(vae), SIZE, shards=2, batch=8)
    run_prepare(job)
    file = tmp_path / "set" / "00001-moments.npy"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(UserError, match=r"00001-moments.npy is truncated or changed: expected 7808 bytes"):
        opened(tmp_path / "set")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="is not finished; rerun the `stbench data` command"):
        opened(tmp_path / "begun")
    with pytest.raises(UserError, match=r"found nothing; if they were moved, type `ln -s NEW_PLACE"):
        opened(tmp_path / "absent")


def test_a_changed_autoencoder_is_refused_unless_chosen(root: Path, tmp_path: Path, vae: Path) -> None:
    own = make_vae(tmp_path / "own")
    job = PrepareOptions(root / "images", tmp_path / "set", str(own), SIZE, batch=8)
    run_prepare(job)
    before = opened(tmp_path / "set").fingerprint
    make_vae(own, seed=1)
    find_vae.cache_clear()
    fresh = Custom(DataSpec(path=str(tmp_path / "set")))
    with pytest.raises(UserError, match="is not the autoencoder of .*: expected sha256"):
        _ = fresh.decoder
    chosen = Custom(DataSpec(path=str(tmp_path / "set"), vae=str(vae)))
    assert chosen.decoder == find_vae(str(vae)).sha256
    assert chosen.fingerprint == before


def test_another_autoencoder_can_decode(root: Path, tmp_path: Path) -> None:
    data, vae = opened(root / "plain"), make_vae(tmp_path / "vae", seed=1)
    other = data.decoded_by(str(vae)).to("cpu")
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other.decode(z), opened(root / "plain", vae=str(vae)).decode(z))
    assert not torch.equal(other.decode(z), data.decode(z))
    assert other.decoder == find_vae(str(vae)).sha256 != data.decoder
    assert other.fingerprint == data.fingerprint
    with pytest.raises(UserError, match="expected an autoencoder"):
        _ = data.decoded_by(str(tmp_path / "gone")).decoder
    with pytest.raises(UserError, match="contains pixels, which need no autoencoder"):
        opened(root / "pixels").decoded_by(str(vae))


def test_imagenet_requires_its_classes_and_size(root: Path) -> None:
    for name, size in (("imagenet256", 256), ("imagenet512", 512)):
        with pytest.raises(UserError, match=f"{name} requires 1000 classes at {size} pixels, .*10 at 32"):
            get_dataset(name, DataSpec(path=str(root / "plain")))
        with pytest.raises(UserError, match=f"data set '{name}' requires --data PATH"):
            get_dataset(name)
    with pytest.raises(UserError, match="'digits' does not accept --data"):
        get_dataset("digits", DataSpec(path=str(root / "plain")))


def test_unreadable_images_of_a_folder_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_images(tmp_path / "images", 12, 16)
    (folder / "class1" / "img00001.png").write_bytes(b"no image")
    data = opened(folder, vae="none")
    assert data.size + len(data.heldout_images()) == 11
    assert "left out: class1/img00001.png: not an image" in capsys.readouterr().err
    for file in sorted(folder.rglob("*.*g"))[1:]:
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="expected at least 2 readable images, found 1"):
        Custom(DataSpec(path=str(folder), vae="none"))


def test_images_that_are_not_square_require_a_size(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / "class").mkdir(exist_ok=True)
        picture(number, 20, 10).save(tmp_path / "class" / f"{number}.png")
    with pytest.raises(UserError, match="expected square images; give the size to crop them to"):
        opened(tmp_path, vae="none")
    assert opened(tmp_path, vae="none", size=8).image_shape == (3, 8, 8)


def test_a_damaged_autoencoder_is_not_used_by_a_run_that_recorded_it(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "vae"
    shutil.copytree(vae, mine)
    path = make_repa(tmp_path / "repa", 20, 4)
    first = get_dataset("custom", DataSpec(path=str(path), vae=str(mine)))
    recorded = first.effective(DataSpec(path=str(path), vae=str(mine)))
    assert recorded.vae_sha256 == find_vae(str(mine)).sha256
    assert get_dataset("custom", recorded) is first
    weights = bytearray((mine / WEIGHTS).read_bytes())
    weights[-3] ^= 1
    (mine / WEIGHTS).write_bytes(weights)
    find_vae.cache_clear()
    monkeypatch.setattr(dataset_module, "_built", {})  # as in another process
    with pytest.raises(UserError, match=r"the autoencoder of .* changed since the run started"):
        get_dataset("custom", recorded)


def test_full_verification_finds_what_the_memory_hides(
    copied: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that returns other bytes without a write changes neither size nor times."""
    monkeypatch.setattr(verified, "SETTLED", 0.0)
    data = DataSpec(path=str(copied.target))
    open_data(data)
    file = copied.target / "00000-moments.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    status = file.stat()
    stamp = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    memory = verified._Memory(copied.target)
    memory.remember(file.name, stamp, str(memory.sha256(file.name)))
    memory.save()
    open_data(data)
    with verified.full_verification(), pytest.raises(UserError, match="00000-moments.npy is damaged"):
        open_data(data)
