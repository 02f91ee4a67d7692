"""`compare --explain`: whether two runs may meet, and why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stbench.cli.compare import compare
from stbench.compare.difference import Explanation, explain_runs
from stbench.core.errors import UserError
from tests.fake_runs import make_record, write_run

RUNS = Path(__file__).parents[2] / "results" / "digits" / "runs"


def explained(one: dict[str, Any], other: dict[str, Any]) -> Explanation:
    records = [
        make_record(fields.pop("recipe", "sra"), fields.pop("seed", 0), [16.0, 4.0, 1.0], **fields)
        for fields in (one, other)
    ]
    return explain_runs(*records)


def consequences(found: Explanation) -> dict[str, str]:
    return {row[0]: row[3] for row in found.section.rows}


def test_seeds_of_one_row() -> None:
    found = explained({}, {"seed": 1})
    assert found.verdict == "in one row, as two of its seeds"
    assert consequences(found) == {"seed": "another seed"}


def test_the_same_run_twice() -> None:
    found = explained({}, {})
    assert found.verdict.startswith("the same row and seed") and consequences(found) == {}


def test_rows_of_one_table() -> None:
    found = explained({}, {"recipe": "repa", "options": {"weight": 1.0}})
    assert found.verdict == "in one table, as different rows"
    assert consequences(found) == {"recipe.name": "another row", "recipe.weight": "another row"}


def test_another_setting() -> None:
    train = {"steps": 800, "batch": 128, "precision": "fp32", "lr": 2e-3}
    found = explained({}, {"changes": {"setting_hash": "other", "train": train}})
    assert found.verdict == "not in one table: the settings differ (5e771a60 and other)"
    assert ("train.batch", "64", "128", "another table") in found.section.rows


def test_a_field_that_an_old_record_lacks_has_no_effect_if_the_hashes_agree() -> None:
    train = {"steps": 800, "batch": 64, "precision": "fp32", "lr": 2e-3, "new": "default"}
    found = explained({}, {"seed": 1, "changes": {"train": train}})
    assert found.verdict == "in one row, as two of its seeds"
    assert consequences(found) == {"train.new": "none", "seed": "another seed"}


def test_another_protocol() -> None:
    found = explained({}, {"protocol": "bbbb2222"})
    assert found.verdict.startswith(
        "not in one table: the settings agree, but they share no evaluation protocol"
    )


def test_committed_runs_name_the_fields_of_the_protocol() -> None:
    found = explained({}, {"protocol": "bbbb2222", "recipe": "vanilla"})
    assert consequences(found) == {"recipe.name": "another row"}  # the fields of the fake protocols are equal


def test_the_command_prints_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    (sit,), (dit,) = (list(RUNS.glob(f"digits-{name}-ti-2-repa-s0-*")) for name in ("sit", "dit"))
    compare([sit, dit], explain=True)
    printed = capsys.readouterr().out
    assert printed.startswith("not in one table: the settings differ")
    assert "train.lr" in printed and "0.016" in printed and max(map(len, printed.splitlines())) <= 100


def test_two_runs_are_required(tmp_path: Path) -> None:
    run = Path(write_run(tmp_path, "vanilla", 0, [1.0], steps=(800,)).path)
    with pytest.raises(UserError, match="--explain takes two run folders, found 1"):
        compare([run], explain=True)
    with pytest.raises(UserError):
        compare([run, tmp_path / "nowhere"], explain=True)
    with pytest.raises(UserError, match="only prints"):
        compare([run, run], explain=True, output=tmp_path / "x")
