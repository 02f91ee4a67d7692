"""The committed leaderboards are those of the committed runs, digit by digit."""

from __future__ import annotations

from pathlib import Path

import pytest

from stbench.cli.compare import read_leaderboard
from stbench.compare.blocks import View
from stbench.compare.writers import Format, render

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("form", ["md", "csv", "json"])
@pytest.mark.parametrize("name", ["digits", "digits-published"])
def test_committed_leaderboards_are_reproduced(
    name: str, form: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the leaderboards contain the relative paths of the runs
    folder = Path("results") / name
    expected = (folder / f"leaderboard.{form}").read_text()
    assert render(read_leaderboard([folder / "runs"]), form, view=View(details=True)) == expected, (
        f"run: stbench compare {folder}/runs --details --format {form} --output {folder}/leaderboard.{form}"
    )
