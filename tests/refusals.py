"""Combinations that are refused because backbone or objective lack what the recipe needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from stbench.core.errors import UserError


@contextmanager
def skip_if_refused() -> Iterator[None]:
    """Skip the test if the backbone lacks a capability that the recipe needs, or the objective a velocity."""
    try:
        yield
    except UserError as error:
        reasons = ("needs a backbone with the capability", "needs an objective")
        if not any(reason in str(error) for reason in reasons):
            raise
        pytest.skip(str(error))
