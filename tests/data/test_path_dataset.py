"""Data sets from a path keep the contract of `Dataset`: rows, order, split, flip, devices, decoding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stbench.core.errors import UserError
from stbench.data.crop import decode_image
from stbench.data.dataset import Dataset, get_dataset
from stbench.data.path_dataset import Custom, ImageNet256, ImageNet512
from stbench.data.prefetch import Prefetch
from stbench.data.prepare import PrepareOptions, make_encoder, open_task, prepare
from stbench.data.spec import DataSpec
from stbench.models.autoencoder import Autoencoder, find_vae, to_uint8
from tests.datafiles import make_images, make_repa, make_vae

COUNT, SIZE = 60, 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/, vae/, and sets prepared from them: plain/, flip/ and pixels/."""
    root = tmp_path_factory.mktemp("data")
    make_vae(root / "vae")
    make_images(root / "images", COUNT, SIZE)
    job = PrepareOptions(
        root / "images", root / "plain", str(root / "vae"), SIZE, shards=4, batch=8, references=20
    )
    for one in (
        job,
        replace(job, target=root / "flip", flip=True),
        replace(job, target=root / "pixels", vae="none", flip=True),
    ):
        prepare(one, open_task(one), lambda count: None)
    return root


def opened(path: Path, **options: object) -> Custom:
    found = get_dataset("custom", DataSpec(path=str(path), **options))  # type: ignore[arg-type]
    assert isinstance(found, Custom)
    return found


def stored(folder: Path, array: str) -> np.ndarray:
    return np.concatenate([np.load(file) for file in sorted(folder.glob(f"*-{array}.npy"))])


def zeros(dataset: Dataset, count: int) -> Tensor:
    return torch.zeros(count, dataset.channels, dataset.input_size, dataset.input_size)


def test_facts_are_those_of_the_manifest(root: Path) -> None:
    data = opened(root / "plain")
    assert (data.size, data.classes, data.channels, data.input_size) == (57, 10, 4, 4)
    assert (data.image_shape, data.flip, data.decoder) == (
        (3, SIZE, SIZE),
        False,
        find_vae(str(root / "vae")).sha256,
    )


def test_latents_are_the_scaled_mean_plus_noise_times_the_spread(root: Path) -> None:
    data, split = opened(root / "plain"), stored(root / "plain", "split")
    moments = torch.from_numpy(stored(root / "plain", "moments")[split != 1][:, 0]).float()
    rows = torch.tensor([56, 0, 31, 31])
    noise = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, std = moments[rows].chunk(2, 1)
    assert torch.equal(data.latents(rows, noise), (mean + std * noise) * 0.18215)
    assert torch.equal(
        data.labels(rows), torch.from_numpy(stored(root / "plain", "labels")[split != 1])[rows]
    )


def test_held_out_images_are_never_trained_on(root: Path) -> None:
    data, split = opened(root / "plain"), stored(root / "plain", "split")
    z, y = data.heldout()
    assert (z.shape, len(y), len(data.heldout_images())) == ((3, 4, 4, 4), 3, 3)
    moments = torch.from_numpy(stored(root / "plain", "moments")[split == 1][:, 0]).float()
    assert torch.equal(z, moments[:, :4] * 0.18215)
    everything = data.latents(torch.arange(data.size), zeros(data, data.size))
    assert torch.cdist(z.flatten(1), everything.flatten(1)).min() > 1e-4
    names = stored(root / "plain", "ids")[split == 1]
    crops = [decode_image((root / "images" / n.decode()).read_bytes(), 3, SIZE) for n in names]
    assert np.array_equal(data.heldout_images().numpy(), crops)


def test_references_are_the_kept_training_images(root: Path) -> None:
    data = opened(root / "plain")
    assert {name: len(images()) for name, images in data.references.items()} == {"train": 20, "all": 23}
    assert torch.equal(data.references["train"](), data.train_images())
    split, names = stored(root / "plain", "split"), stored(root / "plain", "ids")
    first = decode_image((root / "images" / names[split == 2][0].decode()).read_bytes(), 3, SIZE)
    assert np.array_equal(data.train_images()[0].numpy(), first)


def test_an_epoch_shows_every_image_once(root: Path) -> None:
    data = opened(root / "plain")
    epochs = data.order(3, 0, 3 * data.size).view(3, -1)
    assert torch.equal(epochs.sort(1).values, torch.arange(data.size).expand(3, -1))
    assert not torch.equal(epochs[0], epochs[1])


def test_order_reaches_any_point_without_what_came_before(root: Path) -> None:
    data = opened(root / "plain")
    whole = data.order(3, 0, 40 * 16)
    fresh = Custom(DataSpec(path=str(root / "plain")))
    for step in (39, 3, 0):
        assert torch.equal(fresh.order(3, step * 16, 16), whole[step * 16 :][:16])
    assert not torch.equal(fresh.order(4, 0, 16), whole[:16])
    far = fresh.order(3, 10**12, 16)
    assert torch.equal(far, Custom(DataSpec(path=str(root / "plain"))).order(3, 10**12, 16))


def test_flip_draws_the_mirror_image_for_half_of_the_rows(root: Path) -> None:
    data, plain = opened(root / "flip"), opened(root / "plain")
    order = data.order(0, 0, 40 * data.size)
    assert torch.equal(order % data.size, plain.order(0, 0, 40 * data.size))
    share = float((order >= data.size).float().mean())
    assert share == pytest.approx(0.5, abs=0.05)
    split = stored(root / "flip", "split")
    mirror = torch.from_numpy(stored(root / "flip", "moments")[split != 1][:, 1]).float()[:, :4] * 0.18215
    row = torch.tensor([5])
    assert torch.equal(data.latents(row + data.size, zeros(data, 1)), mirror[row])
    assert torch.equal(data.labels(row + data.size), data.labels(row))


def test_flip_can_be_left_out_and_is_part_of_the_fingerprint(root: Path) -> None:
    still, data = opened(root / "flip", flip=False), opened(root / "flip")
    assert int(still.order(0, 0, 500).max()) < still.size
    assert still.fingerprint != data.fingerprint
    with pytest.raises(UserError, match="holds no moments of mirror images; prepare it with --flip"):
        opened(root / "plain", flip=True)


def test_pixels_are_their_own_latents(root: Path) -> None:
    data = opened(root / "pixels")
    assert (data.channels, data.input_size, data.decoder) == (3, SIZE, "pixels")
    rows = torch.tensor([3, 3 + data.size])
    z = data.latents(rows, torch.ones(2, 3, SIZE, SIZE))
    split = stored(root / "pixels", "split")
    pixels = torch.from_numpy(stored(root / "pixels", "pixels")[split != 1][3, 0])
    assert torch.equal(data.decode(z)[0], pixels)
    assert torch.equal(data.decode(z)[1], pixels.flip(-1))


def test_decoding_undoes_the_scaling(root: Path) -> None:
    data = opened(root / "plain")
    z = torch.randn(20, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    network = find_vae(str(root / "vae")).load()
    expected = torch.cat([to_uint8(network.decode(part / 0.18215)) for part in z.split(16)])
    assert torch.equal(data.decode(z), expected)


def test_rows_in_memory_give_the_same_bits(root: Path) -> None:
    mapped, resident = opened(root / "flip").to("cpu"), opened(root / "flip", resident="yes").to("cpu")
    assert resident._resident is not None and mapped._resident is None
    rows = mapped.order(1, 100, 64)
    noise = torch.randn(64, 4, 4, 4)
    assert torch.equal(mapped.latents(rows, noise), resident.latents(rows, noise))
    assert mapped.fingerprint == resident.fingerprint


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_latents_from_host_and_device_memory(root: Path) -> None:
    mapped = opened(root / "flip", resident="no").to("cuda")
    resident = opened(root / "flip").to("cuda")
    assert resident._resident is not None and mapped._resident is None
    rows, noise = mapped.order(1, 100, 64), torch.randn(64, 4, 4, 4)
    assert torch.equal(mapped.latents(rows, noise), resident.latents(rows, noise))


def test_what_was_read_ahead_is_what_would_have_been_read(root: Path) -> None:
    data, fresh = opened(root / "flip").to("cpu"), opened(root / "flip").to("cpu")
    for step in range(6):
        rows = data.order(7, step * 16, 16)
        for part in rows.split(5):
            noise = torch.randn(len(part), 4, 4, 4)
            assert torch.equal(data.latents(part, noise), fresh.latents(part, noise))


def test_prefetch_reads_each_announced_batch_once_and_finds_its_stretches() -> None:
    read: list[list[int]] = []

    def load(rows: Tensor) -> Tensor:
        read.append(rows.tolist())
        return rows * 10

    ahead = Prefetch(load)
    batches = [torch.tensor([4, 2, 4, 9]), torch.tensor([1, 7, 7, 3])]
    ahead.announce(batches)
    ahead.announce([batches[1], torch.tensor([5, 6])])
    found = ahead.take(torch.tensor([7, 3]))
    assert found is not None and found.tolist() == [70, 30]
    assert ahead.take(torch.tensor([4, 9])) is None
    assert ahead.take(torch.tensor([7, 1])) is None
    assert read[:2] == [[4, 2, 4, 9], [1, 7, 7, 3]]
    last = ahead.take(torch.tensor([5, 6]))
    assert last is not None and last.tolist() == [50, 60] and len(read) == 3


def test_a_reading_error_reaches_the_trainer(root: Path, tmp_path: Path) -> None:
    folder = make_repa(tmp_path / "repa", 30)
    data = opened(folder, vae=str(root / "vae"))
    for file in (folder / "vae-sd").rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:100])
    rows = data.order(0, 0, 8)
    with pytest.raises(UserError, match="is truncated or no .npy file"):
        data.latents(rows, zeros(data, 8))


def test_a_folder_of_images_is_encoded_as_prepare_does(root: Path) -> None:
    plain, direct = opened(root / "plain"), opened(root / "images", vae=str(root / "vae"), size=SIZE)
    assert (direct.size, direct.classes) == (plain.size, plain.classes)
    rows = torch.arange(plain.size)
    noise = torch.randn(len(rows), 4, 4, 4)
    assert torch.allclose(direct.latents(rows, noise), plain.latents(rows, noise), atol=2e-3)
    assert torch.equal(direct.heldout_images(), plain.heldout_images())
    pixels = opened(root / "images", vae="none")
    assert (pixels.channels, pixels.input_size, len(pixels.train_images())) == (3, SIZE, 57)


def test_what_a_folder_of_images_wants_is_told(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which autoencoder is to encode them"):
        opened(root / "images")
    mixed = make_images(tmp_path / "mixed", 10, mixed=True)
    with pytest.raises(UserError, match=r"images of one size, found .* is 64x64, .* --set data.size=64"):
        opened(mixed, vae="none")


def test_truncated_shards_and_unfinished_sets_are_refused_at_once(root: Path, tmp_path: Path) -> None:
    job = PrepareOptions(root / "images", tmp_path / "set", str(root / "vae"), SIZE, shards=2, batch=8)
    prepare(job, open_task(job), lambda count: None)
    file = tmp_path / "set" / "00001-moments.npy"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(UserError, match=r"00001-moments.npy is truncated or changed: expected 7808 bytes"):
        opened(tmp_path / "set")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="is not finished; type the `stbench data` command"):
        opened(tmp_path / "begun")
    with pytest.raises(UserError, match=r"found nothing; if they moved, type `ln -s NEW_PLACE"):
        opened(tmp_path / "absent")


def test_another_autoencoder_is_noticed_and_can_be_chosen(root: Path, tmp_path: Path) -> None:
    own = make_vae(tmp_path / "own")
    job = PrepareOptions(root / "images", tmp_path / "set", str(own), SIZE, batch=8)
    prepare(job, open_task(job), lambda count: None)
    before = opened(tmp_path / "set").fingerprint
    make_vae(own, seed=1)
    find_vae.cache_clear()
    fresh = Custom(DataSpec(path=str(tmp_path / "set")))
    with pytest.raises(UserError, match="is not the autoencoder of .*: expected sha256"):
        _ = fresh.decoder
    chosen = Custom(DataSpec(path=str(tmp_path / "set"), vae=str(root / "vae")))
    assert chosen.decoder == find_vae(str(root / "vae")).sha256
    assert chosen.fingerprint == before


def test_encoding_is_in_fp32_and_puts_the_switches_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, seen, moments = torch.backends.cudnn, [], Autoencoder.moments

    def watched(self: Autoencoder, images: Tensor) -> Tensor:
        seen.append((cudnn.enabled, cudnn.allow_tf32))
        return moments(self, images)

    monkeypatch.setattr(Autoencoder, "moments", watched)
    before = cudnn.enabled, cudnn.allow_tf32
    make_encoder(str(root / "vae"), SIZE, False, "fp32", torch.device("cpu"))(
        np.zeros((1, 3, SIZE, SIZE), np.uint8)
    )
    assert seen == [(True, False)] and before == (cudnn.enabled, cudnn.allow_tf32)


def test_a_run_can_be_decoded_by_another_autoencoder(root: Path, tmp_path: Path) -> None:
    data, vae = opened(root / "plain"), make_vae(tmp_path / "vae", seed=1)
    other = data.decoded_by(str(vae)).to("cpu")
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other.decode(z), opened(root / "plain", vae=str(vae)).decode(z))
    assert not torch.equal(other.decode(z), data.decode(z))
    assert other.decoder == find_vae(str(vae)).sha256 != data.decoder
    assert other.fingerprint == data.fingerprint
    with pytest.raises(UserError, match="expected an autoencoder"):
        _ = data.decoded_by(str(tmp_path / "gone")).decoder
    with pytest.raises(UserError, match="holds pixels, which no autoencoder decodes"):
        opened(root / "pixels").decoded_by(str(vae))


def test_imagenet_wants_its_classes_and_size(root: Path) -> None:
    for name, size in (("imagenet256", 256), ("imagenet512", 512)):
        with pytest.raises(UserError, match=f"{name} wants 1000 classes at {size} pixels, .* holds 10 at 32"):
            get_dataset(name, DataSpec(path=str(root / "plain")))
        with pytest.raises(UserError, match=f"data set '{name}' wants --data PATH"):
            get_dataset(name)
    with pytest.raises(UserError, match="'digits' takes no --data"):
        get_dataset("digits", DataSpec(path=str(root / "plain")))


PUBLISHED = [
    (ImageNet256, "dit", "xl/2", (256, 1e-4, (0.9, 0.999), 0.0, 0, None, 0.1, 400_000)),
    (ImageNet512, "sit", "xl/2", (256, 1e-4, (0.9, 0.999), 0.0, 0, None, 0.1, 400_000)),
    (ImageNet256, "uvit", "h/2", (1024, 2e-4, (0.99, 0.99), 0.03, 5000, None, 0.1, 500_000)),
    (ImageNet256, "uvit", "l/2", (1024, 2e-4, (0.99, 0.99), 0.03, 5000, None, 0.15, 300_000)),
    (ImageNet512, "uvit", "h/4", (1024, 2e-4, (0.99, 0.99), 0.03, 5000, None, 0.1, 500_000)),
    (ImageNet512, "uvit", "l/4", (1024, 2e-4, (0.99, 0.99), 0.03, 5000, None, 0.15, 500_000)),
]


@pytest.mark.parametrize(("dataset", "family", "size", "expected"), PUBLISHED)
def test_presets_are_the_published_settings_of_each_backbone(
    dataset: type[Dataset], family: str, size: str, expected: tuple[object, ...]
) -> None:
    p = dataset.preset_for(family, size)
    found = (p.batch, p.lr, p.betas, p.weight_decay, p.warmup, p.clip, p.label_drop, p.steps)
    assert found == expected
    assert (p.ema_decay, p.ema_warmup, p.adam_eps) == (0.9999, False, 1e-8)
    if size[0] in "xh":
        assert dataset.preset_for(family).size == size
