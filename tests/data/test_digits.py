"""The embedded digits: images, split, latents, order and decoder."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from stbench.core.errors import UserError
from stbench.data.dataset import Dataset, get_dataset
from stbench.data.digits import HELD_OUT, digits_images, stratified_split
from stbench.models.assets import asset_manifest, load_asset
from stbench.models.autoencoder import digits_autoencoder, to_float


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return get_dataset("digits")


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


def test_images_and_labels_are_the_same_on_every_machine() -> None:
    images, labels = digits_images()
    assert (images.shape, images.dtype, labels.dtype) == ((1797, 1, 32, 32), torch.uint8, torch.int64)
    assert (sha256(images), sha256(labels)) == ("18262877db6d822e", "a3c91c262eddcf7b")


def test_split_is_fixed_disjoint_and_complete() -> None:
    train, heldout = stratified_split(digits_images()[1], HELD_OUT)
    assert (len(train), len(heldout)) == (1500, 297)
    assert torch.equal(torch.cat([train, heldout]).sort().values, torch.arange(1797))
    assert (sha256(train), sha256(heldout)) == ("9423bc2ff489f0ab", "e5e86cca7538482a")


def test_split_is_stratified_to_within_one_image() -> None:
    labels = digits_images()[1]
    heldout = stratified_split(labels, HELD_OUT)[1]
    quota = labels.bincount() * HELD_OUT / len(labels)
    assert (labels[heldout].bincount() - quota).abs().max() <= 1.0


def test_reconstructions_of_held_out_digits_have_the_recorded_psnr(digits: Dataset) -> None:
    decoded = digits.decode(digits.heldout()[0])
    error = (decoded.double() - digits.heldout_images().double()).square().mean()
    psnr = float(10 * torch.log10(255**2 / error))
    assert psnr > 30
    assert psnr == pytest.approx(asset_manifest()["assets"]["digits_vae"]["heldout_psnr_db"], abs=0.1)


def test_latents_are_normalised_per_channel(digits: Dataset) -> None:
    noise = torch.randn(digits.size, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    z = digits.latents(torch.arange(digits.size), noise)
    assert z.shape == (1500, 4, 8, 8)
    assert z.mean((0, 2, 3)).abs().max() < 0.01
    assert (z.std((0, 2, 3)) - 1).abs().max() < 0.01


def test_latents_are_the_mean_plus_noise_times_std(digits: Dataset) -> None:
    rows, ones = torch.tensor([3, 3, 1499]), torch.ones(3, 4, 8, 8)
    mean, one, three = (digits.latents(rows, k * ones) for k in (0.0, 1.0, 3.0))
    assert (one > mean).all()
    assert torch.allclose(three - mean, 3 * (one - mean), atol=1e-5)
    assert torch.equal(mean[0], mean[1])


def test_the_mean_latent_is_that_of_the_posterior_means(digits: Dataset) -> None:
    rows = torch.arange(digits.size)
    means = digits.latents(rows, torch.zeros(digits.size, 4, 8, 8))
    torch.testing.assert_close(digits.mean_latent(), means.double().mean(0).float())


def test_rows_of_latents_labels_and_images_agree(digits: Dataset) -> None:
    rows = torch.tensor([0, 7, 749, 1499])
    decoded = digits.decode(digits.latents(rows, torch.zeros(4, 4, 8, 8)))
    distance = torch.cdist(decoded.flatten(1).float(), digits.train_images().flatten(1).float())
    assert torch.equal(distance.argmin(1), rows)
    images, labels = digits_images()
    train = stratified_split(labels, HELD_OUT)[0]
    assert torch.equal(digits.labels(rows), labels[train[rows]])
    assert torch.equal(digits.train_images()[rows], images[train[rows]])


def test_held_out_latents_decode_to_the_held_out_images(digits: Dataset) -> None:
    z, y = digits.heldout()
    assert (z.shape, y.shape) == ((297, 4, 8, 8), (297,))
    distance = torch.cdist(digits.decode(z).flatten(1).float(), digits.heldout_images().flatten(1).float())
    assert torch.equal(distance.argmin(1), torch.arange(297))
    assert torch.equal(y, digits_images()[1][stratified_split(digits_images()[1], HELD_OUT)[1]])


def test_references_are_the_training_images_and_all_images(digits: Dataset) -> None:
    assert list(digits.references) == ["train", "all"]
    assert torch.equal(digits.references["train"](), digits.train_images())
    assert torch.equal(digits.references["all"](), digits_images()[0])


def test_order_depends_on_seed_and_images_seen_only(digits: Dataset) -> None:
    late = digits.order(1, 64_000_000, 64)
    digits.order(1, 0, 64)
    assert torch.equal(digits.order(1, 64_000_000, 64), late)
    assert not torch.equal(digits.order(1, 0, 64), late)
    assert not torch.equal(digits.order(2, 64_000_000, 64), late)


def test_order_draws_every_row_with_replacement(digits: Dataset) -> None:
    rows = digits.order(0, 0, 30_000)
    assert (rows.min(), rows.max()) == (0, 1499)
    assert rows.bincount().float().std() == pytest.approx(20**0.5, rel=0.15)


def test_a_copy_on_another_device_does_not_move_the_original(digits: Dataset) -> None:
    moved = digits.to("meta")
    rows, noise = torch.tensor([1]), torch.zeros(1, 4, 8, 8)
    assert moved.latents(rows, noise).device.type == moved.labels(rows).device.type == "meta"
    assert {tensor.device.type for tensor in moved.heldout()} == {"meta"}
    assert moved.decode(torch.empty(1, 4, 8, 8, device="meta")).shape == (1, 1, 32, 32)
    assert digits.latents(rows, noise).device.type == digits.decode(noise).device.type == "cpu"


def test_building_does_not_change_the_global_random_state(digits: Dataset) -> None:
    before = torch.get_rng_state()
    digits_autoencoder.__wrapped__()
    rebuilt = type(digits)()
    assert torch.equal(torch.get_rng_state(), before)
    assert rebuilt.fingerprint == digits.fingerprint
    assert torch.equal(rebuilt.heldout()[0], digits.heldout()[0])


def test_unknown_data_set_is_a_user_error() -> None:
    with pytest.raises(UserError, match="unknown dataset 'digit'; did you mean 'digits'"):
        get_dataset("digit")


def test_the_shipped_encoder_has_one_token_per_patch_and_the_recorded_accuracy(digits: Dataset) -> None:
    from timm.models.vision_transformer import VisionTransformer

    recorded = asset_manifest()["assets"]["digits_encoder"]
    encoder = VisionTransformer(**recorded["config"]).eval()
    encoder.load_state_dict(load_asset("digits_encoder"))
    images, labels = to_float(digits.heldout_images()), digits.heldout()[1]
    with torch.no_grad():
        assert encoder.forward_features(images[:2]).shape == (2, 16, 96)
        accuracy = float((encoder(images).argmax(1) == labels).double().mean())
    assert accuracy == pytest.approx(recorded["heldout_accuracy"], abs=0.004)
    assert accuracy > 0.95
