"""Seeded damages to every file of data sets, references and samples: reported, or without any effect.

A damage is reported if opening raises a UserError of one line that names the damaged file or its folder.
It has no effect if everything that is read afterwards equals what was read before.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stbench.core.errors import UserError
from stbench.data.open import open_data
from stbench.data.prepare import PrepareOptions
from stbench.data.spec import DataSpec
from stbench.data.verify import verify
from stbench.evaluate.extractors import tensors_hash
from stbench.evaluate.image_sets import open_images
from stbench.evaluate.reference import load_reference, reference_size, write_statistics
from stbench.models import autoencoder
from tests.datafiles import make_images, make_repa, make_vae, run_prepare
from tests.measuring import CheapNetwork, pictures

pytestmark = pytest.mark.slow

KINDS = ("flip", "flip header", "truncate", "zero page", "append", "empty", "delete", "swap", "other type")


def damage(file: Path, kind: str, seed: int) -> None:
    """Damage a file; "swap" exchanges it with a neighbour of the same suffix."""
    draw, content = random.Random(f"{kind}{seed}{file.name}"), bytearray(file.read_bytes())
    others = sorted(f for f in file.parent.iterdir() if f.suffix == file.suffix and f != file)
    if kind in ("flip", "flip header"):
        place = draw.randrange(min(len(content), 128) if kind == "flip header" else len(content))
        content[place] ^= 1 << draw.randrange(8)
    elif kind == "truncate":
        content = content[: draw.randrange(1, len(content))]
    elif kind == "zero page":
        start = draw.randrange(len(content))
        content[start : start + 512] = bytes(len(content[start : start + 512]))
    elif kind == "append":
        content += b"\0" * 7
    elif kind == "empty":
        content = bytearray()
    elif kind == "swap" and others:
        other = draw.choice(others)
        second = other.read_bytes()
        other.write_bytes(content)
        content = bytearray(second)
    elif kind == "other type":
        content = bytearray(b"PK\x03\x04 not what the name says")
    if kind == "delete":
        file.unlink()
    else:
        file.write_bytes(content)


def outcome(read: Callable[[], Any], before: Any, place: Path) -> str:
    """Return "reported" or "no effect"; fails for a damage that is used silently."""
    try:
        after = read()
    except UserError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        assert str(place) in str(error), f"the message does not name a file in {place}: {error}"
        return "reported"
    assert after == before, "the damage was used silently"
    return "no effect"


def contents(folder: Path, **options: Any) -> tuple[Any, ...]:
    """Everything that training and evaluation read of a data set."""
    found = open_data(DataSpec(path=str(folder), **options))
    kept = np.arange(len(found.labels)) if found.has_all_pixels else np.flatnonzero(found.split)
    rows = np.concatenate([np.asarray(part) for part in found.rows.parts()])
    arrays = [torch.from_numpy(np.array(a)) for a in (found.labels, found.split, rows, found.pixels(kept))]
    return tensors_hash(arrays), found.scale, found.shift, found.classes, found.fingerprint


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def prepared(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    images = make_images(root / "images", 24, 16)
    options = PrepareOptions(images, root / "set", str(vae), 16, shards=2, batch=12, references=6)
    run_prepare(options)
    return root / "set"


PREPARED_FILES = [f"0000{k}-{a}.npy" for k in (0, 1) for a in ("moments", "labels", "split", "ids", "images")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*PREPARED_FILES, "manifest.json"])
def test_prepared_set(prepared: Path, tmp_path: Path, name: str, kind: str) -> None:
    target = tmp_path / "set"
    shutil.copytree(prepared, target)
    before = contents(target)
    damage(target / name, kind, 0)
    found = outcome(lambda: contents(target), before, target)
    if found == "reported" and name != "manifest.json":
        _, problems = verify(target)
        assert any(name in problem for problem in problems)


@pytest.mark.parametrize("seed", range(30))
def test_prepared_set_flips_anywhere(prepared: Path, tmp_path: Path, seed: int) -> None:
    target = tmp_path / "set"
    shutil.copytree(prepared, target)
    before = contents(target)
    damage(target / random.Random(seed).choice(PREPARED_FILES), "flip", seed)
    assert outcome(lambda: contents(target), before, target) == "reported"


REPA_FILES = (
    "vae-sd/dataset.json",
    "vae-sd/00000/img-mean-std-00000003.npy",
    "vae-sd/00000/img-mean-std-00000011.npy",
    "images/00000/img00000005.png",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REPA_FILES)
def test_repa_folder(tmp_path: Path, vae: Path, name: str, kind: str) -> None:
    folder = make_repa(tmp_path / "repa", 20, 2)
    before = contents(folder, vae=str(vae))
    damage(folder / name, kind, 1)
    outcome(lambda: contents(folder, vae=str(vae)), before, folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["class0/img00000.jpg", "class3/img00013.png"])
def test_image_folder_of_a_run(tmp_path: Path, name: str, kind: str) -> None:
    """Pixels of other images give another fingerprint, which a run refuses; see `get_dataset`."""
    folder = make_images(tmp_path / "images", 20, 16)
    before = contents(folder, vae="none")
    damage(folder / name, kind, 2)

    def read() -> Any:
        after = contents(folder, vae="none")
        if after[-1] != before[-1]:
            raise UserError(f"{folder} changed since the run started")
        return after

    outcome(read, before, folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.json", autoencoder.WEIGHTS])
def test_autoencoder_of_a_prepared_set(vae: Path, tmp_path: Path, name: str, kind: str) -> None:
    other = tmp_path / "vae"
    shutil.copytree(vae, other)
    before = autoencoder.find_vae(str(other)).sha256
    autoencoder.find_vae.cache_clear()
    damage(other / name, kind, 3)

    def read() -> str:
        found = autoencoder.find_vae(str(other)).sha256
        if found != before:
            raise UserError(f"{other} is not the autoencoder")  # see PathDataset._vae
        return found

    outcome(read, before, tmp_path)


def reference_contents(file: Path) -> tuple[Any, ...]:
    found = load_reference(file, [CheapNetwork()], batch=16)
    features = [] if found.features is None else [found.features]
    tensors = [t for pair in found.moments.values() for t in pair] + features
    return tensors_hash(tensors), found.count, found.size, reference_size(file)


@pytest.mark.parametrize("kind", [*(f"flip {k}" for k in range(40)), *KINDS])
@pytest.mark.parametrize("form", ["statistics", "adm", "images", "compressed"])
def test_reference_npz(tmp_path: Path, form: str, kind: str) -> None:
    images, network, file = pictures(1, 60, 8), CheapNetwork(), tmp_path / "reference.npz"
    (tmp_path / "elsewhere").mkdir()
    np.savez(tmp_path / "elsewhere" / "images.npz", images)
    if form in ("statistics", "adm"):
        done = write_statistics(open_images(tmp_path / "elsewhere" / "images.npz"), [network], file)
    if form == "adm":
        (mu, sigma), (mu_s, sigma_s) = done.moments["pool"], done.moments["spatial"]
        np.savez(file, images, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    elif form != "statistics":
        (np.savez if form == "images" else np.savez_compressed)(file, images)
    before = reference_contents(file)
    what, _, seed = kind.partition(" ")
    damage(file, kind if kind in KINDS else what, int(seed) if seed.isdigit() else 0)
    outcome(lambda: reference_contents(file), before, tmp_path)
