"""Shared by the evaluation tests: the digits, and a cache of their reference statistics."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from stbench.data.dataset import Dataset, get_dataset


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return get_dataset("digits")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def with_extractor(dataset: Dataset, extractor: str, **changes: object) -> Dataset:
    """A copy of a data set that is measured by another extractor, with other attributes replaced."""
    other = copy.copy(dataset)
    for name, value in {"extractor": extractor, **changes}.items():
        setattr(other, name, value)
    return other
