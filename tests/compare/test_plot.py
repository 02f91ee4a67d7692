"""The plot of a leaderboard."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stbench.compare.build import build_leaderboard
from stbench.compare.leaderboard import Leaderboard
from stbench.compare.plot import COLOURS, GREY, plot_curves, plot_paths
from stbench.core.errors import UserError
from tests.fake_runs import make_digits_records, make_record, make_seeds


def test_every_recipe_is_drawn_in_its_colour_on_both_sides(tmp_path: Path) -> None:
    plot_curves(build_leaderboard(make_digits_records()), tmp_path / "deep" / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "deep" / "curves.png").convert("RGB")).astype(int)
    assert pixels.shape[1] == 1200 and pixels.shape[0] < 700
    for colour in (GREY, *COLOURS[:2]):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        halves = np.array_split((pixels == rgb).all(axis=-1), 2, axis=1)
        assert all(half.sum() > 100 for half in halves), colour


def test_several_tables_share_one_plot(tmp_path: Path) -> None:
    records = make_seeds("vanilla", [1.0, 1.5])
    records += make_seeds("vanilla", [2.0], changes={"setting_hash": "other"})
    plot_curves(build_leaderboard(records), tmp_path / "curves.png")
    width, height = Image.open(tmp_path / "curves.png").size
    assert width == 1200 and 700 < height < 1100


def test_more_than_two_tables_continue_in_further_files(tmp_path: Path) -> None:
    """At most four panels per file; a row has the same colour in all of them."""
    records = []
    for setting in "abcde":
        records += make_seeds("vanilla", [1.0], changes={"setting_hash": setting})
        records += make_seeds(f"only-{setting}", [2.0], changes={"setting_hash": setting})
    leaderboard = build_leaderboard(records)
    names = ["curves.png", "curves-2.png", "curves-3.png"]
    assert [path.name for path in plot_paths(leaderboard, tmp_path / "curves.png")] == names
    plot_curves(leaderboard, tmp_path / "curves.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert all(Image.open(tmp_path / name).size[1] < 1100 for name in names)


def test_no_finished_runs_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected finished runs to plot"):
        plot_curves(Leaderboard((), ()), tmp_path / "curves.png")


def test_an_unknown_format_is_an_error(tmp_path: Path) -> None:
    leaderboard = build_leaderboard([make_record("vanilla", 0, [1.0])])
    with pytest.raises(UserError, match=r"found .*curves\.doc; try curves\.png"):
        plot_curves(leaderboard, tmp_path / "curves.doc")
