"""Markdown, CSV, JSON and LaTeX: pinned text, and formats that parse."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest

from stbench.compare.blocks import View
from stbench.compare.build import build_leaderboard
from stbench.compare.leaderboard import Leaderboard
from stbench.compare.writers import render
from tests.fake_runs import make_digits_records, make_record

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def leaderboard() -> Leaderboard:
    """Three recipes with three seeds; two of them were trained twice as long."""
    return build_leaderboard(make_digits_records())


def not_strict(name: str) -> None:
    """Fail on the constants NaN and Infinity, which are not JSON."""
    pytest.fail(name)


def test_markdown_is_pinned(leaderboard: Leaderboard) -> None:
    assert render(leaderboard, "md", view=View(details=True)) == (FIXTURES / "leaderboard.md").read_text()


def test_json_contains_all_values(leaderboard: Leaderboard) -> None:
    content = json.loads(render(leaderboard, "json"), parse_constant=not_strict)
    (table,) = content["tables"]
    assert content["schema"] == 3
    assert [row["recipe"] for row in table["rows"]] == [row.recipe for row in leaderboard.tables[0].rows]
    row = leaderboard.tables[0].rows[1]
    assert row.student.value is not None and row.student.reach is not None
    assert table["rows"][1]["student"]["value"]["values"] == list(row.student.value.values)
    assert table["rows"][1]["student"]["reach"]["speedup_paid"] == row.student.reach.speedup_paid
    assert table["rows"][1]["paid"]["best"]["p"] == row.paid.best.p is not None


def test_json_is_strict_with_a_diverged_seed() -> None:
    text = render(build_leaderboard([make_record("vanilla", 0, [1.0, 1.0, math.nan])]), "json")
    content = json.loads(text, parse_constant=not_strict)
    assert content["tables"][0]["rows"][0]["student"]["value"]["mean"] == "nan"


def test_csv_has_one_line_per_row_at_full_precision(leaderboard: Leaderboard) -> None:
    lines = list(csv.DictReader(io.StringIO(render(leaderboard, "csv"))))
    rows = leaderboard.tables[0].rows
    assert [line["recipe"] for line in lines] == [row.recipe for row in rows]
    for line, row in zip(lines, rows, strict=True):
        for budget, values in (("student", row.student), ("paid", row.paid)):
            assert values.value is not None and values.flops_total is not None
            assert float(line[f"{budget}_value_mean"]) == values.value.mean
            assert float(line[f"{budget}_flops_total_mean"]) == values.flops_total.mean
            assert line[f"{budget}_best_verdict"] == values.best.verdict
    assert lines[0]["seeds"] == "0 1 2" and lines[0]["protocol"] == "aaaa1111"


def test_latex_is_balanced_and_escaped() -> None:
    record = make_record("a_b&c%", 0, [16.0, 4.0, 1.0], options={"x": "{1}"})
    text = render(build_leaderboard([record]), "tex", view=View(details=True))
    code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert code.count("\\begin{tabular}") == code.count("\\end{tabular}") == 5
    assert r"a\_b\&c\% (x=\{1\})" in code
    for grid in code.split("\\begin{tabular}{")[1:]:
        columns = grid.index("}")
        for line in grid.splitlines():
            if line.endswith(r"\\"):
                assert line.replace(r"\&", "").count("&") == columns - 1


def test_a_row_with_needs_is_marked_and_noted() -> None:
    recipe = {"name": "repa", "options": {}, "effective": {}, "needs": "an encoder"}
    leaderboard = build_leaderboard([make_record("repa", 0, [16.0, 4.0, 1.0], changes={"recipe": recipe})])
    text = render(leaderboard, "md", view=View(details=True))
    assert "| repa† | 0 | 1.000 |" in text and "- repa† needs an encoder" in text
    assert "| repa† | an encoder |" in text
    assert r"repa$\dagger$ & 0" in render(leaderboard, "tex", view=View(details=True))
