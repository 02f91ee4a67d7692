"""The split into training, held-out and reference images."""

from __future__ import annotations

import pytest

from stbench.core.errors import UserError
from stbench.data.split import HELDOUT, REFERENCE, assign_split


def test_five_percent_are_held_out_at_least_one_and_at_most_a_thousand() -> None:
    for count, expected in ((2, 1), (300, 15), (40_000, 1000)):
        assert int((assign_split([str(k) for k in range(count)], 0) == HELDOUT).sum()) == expected


def test_the_split_depends_on_the_names_only() -> None:
    names = [f"a/{k}.png" for k in range(300)]
    split = dict(zip(names, assign_split(names, 50), strict=True))
    assert sum(part == REFERENCE for part in split.values()) == 50
    assert dict(zip(names[::-1], assign_split(names[::-1], 50), strict=True)) == split


def test_more_references_do_not_change_what_is_held_out() -> None:
    names = [f"a/{k}.png" for k in range(300)]
    few, many = assign_split(names, 50), assign_split(names, 100)
    assert ((few == HELDOUT) == (many == HELDOUT)).all()
    assert (many[few == REFERENCE] == REFERENCE).all()


def test_fewer_than_two_images_are_refused() -> None:
    with pytest.raises(UserError, match="expected at least 2 images .one is held out., found 1"):
        assign_split(["one"], 5)
