"""Whether the tensors of a file fit a network of ours: keys, shapes, number of heads, finite values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from stbench.core.errors import UserError
from stbench.models.external import shown
from stbench.models.repositories import shorten
from stbench.models.weights import State


@contextmanager
def fitting(family: str, where: str) -> Iterator[None]:
    """Turn the exceptions of shapes and keys that no network of a family has into a UserError."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(
            f"expected the weights of a {family} in {where}, found none under {error}; "
            f"give an official checkpoint"
        ) from error
    except Exception as error:  # shapes from a file may break any computation with them
        raise UserError(
            f"expected the weights of a {family} in {where}, found shapes that fit none "
            f"({shown(' '.join(str(error).split()), 120)}); give an official checkpoint"
        ) from error


def require_heads(options: Mapping[str, Any], heads: int | None, where: str) -> None:
    """Raise UserError for a number of heads that the file contradicts, or that does not divide the width."""
    if heads not in (None, options["heads"]):
        raise UserError(
            f"expected {heads} attention heads in {where}, found {options['heads']}, which follow from its "
            f"q_norm; leave --heads out, or in a run --set backbone.heads"
        )
    if options["heads"] < 1 or options["width"] % options["heads"]:
        raise UserError(
            f"expected a number of heads that divides the width {options['width']} of {where}, found "
            f"{options['heads']}; change --heads, or in a run --set backbone.heads"
        )


def require_same_keys(expected: set[str], found: set[str], family: str, where: str) -> None:
    """Raise UserError unless both sets of keys are equal."""
    for what, keys in (("unknown", found - expected), ("missing", expected - found)):
        if keys:
            raise UserError(
                f"expected the keys of a {family} in {where}, found {what} keys: {shorten(keys)}; "
                f"give an official checkpoint"
            )


def require_same_shapes(expected: State, found: State, family: str, where: str) -> None:
    """Raise UserError for a tensor that is not floating-point or has another shape than expected."""
    for key, value in found.items():
        if value.shape != expected[key].shape or not value.is_floating_point():
            raise UserError(
                f"expected floating-point {key} {tuple(expected[key].shape)} of a {family} in {where}, "
                f"found {value.dtype} {tuple(value.shape)}; give an official checkpoint"
            )
