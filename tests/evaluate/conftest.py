"""Shared by the evaluation tests: the digits, and a cache of their reference statistics."""

from __future__ import annotations

from pathlib import Path

import pytest

from stbench.data.dataset import Dataset, get_dataset


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return get_dataset("digits")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")
