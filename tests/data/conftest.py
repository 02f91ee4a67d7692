"""Data that the tests of this folder share. Tests that change files copy them first."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from stbench.data.prepare import PrepareOptions
from tests.datafiles import make_images, make_vae, run_prepare

COUNT, SIZE = 60, 32


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder of SD's shape: 3 channels to 4, factor 8."""
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of different sizes in ten class folders."""
    return make_images(tmp_path_factory.mktemp("images"), COUNT, SIZE, mixed=True)


@pytest.fixture(scope="session")
def finished(images: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> PrepareOptions:
    """The options of a prepared data set with mirror images, 3 shards and 10 references; read-only."""
    target = tmp_path_factory.mktemp("finished") / "set"
    options = PrepareOptions(images, target, str(vae), SIZE, flip=True, shards=3, batch=8, references=10)
    run_prepare(options)
    return options


@pytest.fixture
def options(finished: PrepareOptions, tmp_path: Path) -> PrepareOptions:
    """The same options, with a new folder as their target."""
    return replace(finished, target=tmp_path / "set")


@pytest.fixture
def copied(finished: PrepareOptions, tmp_path: Path) -> PrepareOptions:
    """The same options, with a copy of the prepared data set as their target."""
    shutil.copytree(finished.target, tmp_path / "set")
    return replace(finished, target=tmp_path / "set")
