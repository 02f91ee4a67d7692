"""What is printed and drawn: pinned text, formats that parse, a figure that is not blank."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from stbench.compare import terminal, writers
from stbench.compare.all_backbones import summaries
from stbench.compare.build import leaderboard
from stbench.compare.format import count, duration, flop, number
from stbench.compare.leaderboard import Leaderboard
from stbench.compare.tables import sampling
from stbench.core.errors import UserError
from stbench.runs.folder import RunFolder
from stbench.runs.records import RunRecord
from tests.fake_runs import LONG, build, digits, point

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Leaderboard:
    """Three recipes of three seeds, of which two were trained twice as long."""
    return leaderboard(digits(tmp_path_factory.mktemp("runs")))


def test_markdown_is_pinned(board: Leaderboard) -> None:
    assert writers.render(board, "md") == (FIXTURES / "leaderboard.md").read_text()


def test_terminal_is_pinned_and_fits_100_columns(
    board: Leaderboard, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.print_leaderboard(board)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert (
        "\n".join(map(str.rstrip, printed.splitlines())) + "\n" == (FIXTURES / "leaderboard.txt").read_text()
    )


def test_json_holds_every_figure(board: Leaderboard) -> None:
    content = json.loads(writers.render(board, "json"), parse_constant=lambda name: pytest.fail(name))
    (table,) = content["tables"]
    assert content["schema"] == 1
    assert [row["recipe"] for row in table["rows"]] == [row.recipe for row in board.tables[0].rows]
    row = board.tables[0].rows[1]
    assert table["rows"][1]["student"]["fid"]["values"] == list(row.student.fid.values)  # type: ignore[union-attr]
    assert table["rows"][1]["student"]["reach"]["speedup_paid"] == row.student.reach.speedup_paid  # type: ignore[union-attr]
    assert table["rows"][1]["paid"]["best"]["p"] == row.paid.best.p is not None


def test_json_stays_strict_with_a_diverged_seed(tmp_path: Path) -> None:
    text = writers.render(leaderboard([build(tmp_path, "vanilla", 0, [1.0, 1.0, math.nan])]), "json")
    content = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert content["tables"][0]["rows"][0]["student"]["fid"]["mean"] == "nan"


def test_csv_has_a_line_a_row_at_full_precision(board: Leaderboard) -> None:
    lines = list(csv.DictReader(io.StringIO(writers.render(board, "csv"))))
    rows = board.tables[0].rows
    assert [line["recipe"] for line in lines] == [row.recipe for row in rows]
    for name, side in (("student", lambda row: row.student), ("paid", lambda row: row.paid)):
        fids, flops = f"{name}_fid_mean", f"{name}_flops_total_mean"
        assert [float(line[fids]) for line in lines] == [side(row).fid.mean for row in rows]
        assert [float(line[flops]) for line in lines] == [side(row).flops_total.mean for row in rows]
        assert [line[f"{name}_best_verdict"] for line in lines] == [side(row).best.verdict for row in rows]
    assert lines[0]["seeds"] == "0 1 2" and lines[0]["protocol"] == "aaaa1111"


def test_tex_is_balanced_and_escaped(tmp_path: Path) -> None:
    records = [build(tmp_path, "a_b&c%", 0, [16.0, 4.0, 1.0], options={"x": "{1}"})]
    text = writers.render(leaderboard(records), "tex")
    code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert code.count("\\begin{tabular}") == code.count("\\end{tabular}") == 5
    assert r"a\_b\&c\% (x=\{1\})" in code
    for grid in code.split("\\begin{tabular}{")[1:]:
        columns = grid.index("}")
        for line in grid.splitlines():
            if line.endswith(r"\\"):
                assert line.replace(r"\&", "").count("&") == columns - 1


def test_a_bound_says_how_many_seeds_arrived(tmp_path: Path) -> None:
    records = [build(tmp_path, "vanilla", seed, [16.0, 4.0, 1.0]) for seed in (0, 1)]
    records += [build(tmp_path, "slow", seed, [16.0, 4.0, fid]) for seed, fid in enumerate([0.5, 1.1])]
    assert "| > 51.2k (1 of 2 seeds) | - | > 51.2k (1 of 2 seeds) | - |" in writers.render(
        leaderboard(records), "md"
    )


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    text = writers.render(leaderboard([build(tmp_path, "vanilla", 0, [16.0, 4.0, 1.0])]), "md")
    assert "| vanilla | 0 | 1.000 | 5.000 |" in text


def test_an_unfinished_seed_is_in_the_row_and_in_a_note(tmp_path: Path) -> None:
    records = [
        build(tmp_path, "vanilla", 0, [16.0, 4.0, 1.0]),
        build(tmp_path, "vanilla", 1, [16.0], status="failed"),
    ]
    text = writers.render(leaderboard(records), "md")
    assert "| vanilla | 0 (1) |" in text and "- vanilla seed 1: failed at step 200 of 800" in text


def test_no_finished_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_leaderboard(Leaderboard((), ()))
    assert capsys.readouterr().out == "no finished run to compare\n"


def test_both_budgets_stand_side_by_side(board: Leaderboard) -> None:
    text = writers.render(board, "md")
    assert "**Equal last-stage steps (student only): step 800, 51.2k images**" in text
    assert "**Everything paid: 102.4k images of all stages together**" in text
    first, second = text.split("**Everything paid: 102.4k")
    assert "| vanilla | 0 1 2 | 0.909" in first and "| vanilla | 102.4k | 0.433" in second


def test_one_budget_is_shown_once(tmp_path: Path) -> None:
    text = writers.render(leaderboard([build(tmp_path, "vanilla", 0, [16.0, 4.0, 1.0])]), "md")
    assert "no row has an earlier stage, so this is also everything paid" in text
    assert "**Everything paid" not in text and "Cost of everything paid" not in text


def test_a_row_that_needs_something_is_marked(tmp_path: Path) -> None:
    recipe = {"name": "repa", "options": {}, "resolved": {}, "needs": "an encoder"}
    records = [build(tmp_path, "repa", 0, [16.0, 4.0, 1.0], changes={"recipe": recipe})]
    text = writers.render(leaderboard(records), "md")
    assert "| repa† | 0 | 1.000 |" in text and "- repa† needs an encoder" in text
    assert "| repa† | an encoder |" in text
    assert r"repa$\dagger$ & 0" in writers.render(leaderboard(records), "tex")


def test_the_sampler_is_stated_with_its_evaluations() -> None:
    assert sampling({"sampler": "ddim", "steps": 20}) == ["ddim sampler with 20 function evaluations"]
    assert sampling({"sampler": "heun", "steps": 10}) == ["heun sampler with 19 function evaluations"]
    assert sampling({}) == []


def test_the_evaluations_are_those_the_samplers_count() -> None:
    from stbench.diffusion.sample import SAMPLERS, nfe

    for name in SAMPLERS.module_dict:
        assert sampling({"sampler": name, "steps": 20}) == [
            f"{name} sampler with {nfe(name, 20)} function evaluations"
        ]


def test_many_options_wrap_and_nothing_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "coefficient": 0.25,
        "guidance": 7,
        "interval": [0.4, 0.7],
        "teacher": "vanilla",
        "time": "native",
    }
    records = [build(tmp_path, "vanilla", seed, [16.0, 4.0, 1.0]) for seed in range(3)]
    records.append(build(tmp_path, "self-transcendence", 0, [16.0, 4.0, 1.0], options=options))
    terminal.print_leaderboard(leaderboard(records))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100 and "…" not in printed
    for name, value in options.items():
        assert f"{name}={str(value).partition(' ')[0]}" in printed
    assert "1.000 ± 0.000" in printed and "too few seeds" in printed


def backbones(root: Path) -> list[RunRecord]:
    """Vanilla and one more recipe on two backbones, three seeds each, under one protocol."""
    records = []
    for backbone, f in (("dit", 3.0), ("sit", 1.0)):
        changes = {"backbone": {"name": backbone, "size": "ti/2", "options": {}}, "setting_hash": backbone}
        for seed, g in enumerate((1.0, 1.01, 0.99)):
            plain, taught = [16.0, 4.0, f * g, f * g / 2], [16.0, 4.0, f / 2]
            made = {"guided": {1.5: f * g / 4, 2.0: f}, "changes": changes}
            records.append(build(root / backbone, "vanilla", seed, plain, steps=LONG, **made))  # type: ignore[arg-type]
            records.append(build(root / backbone, "taught", seed, taught, teacher=800, **made))  # type: ignore[arg-type]
    return records


def test_the_summary_stands_backbones_side_by_side(tmp_path: Path) -> None:
    (summary,) = summaries(leaderboard(backbones(tmp_path)))
    assert "all backbones under linear" in summary.heading and "20 function evaluations" in summary.heading
    assert "not ranked" in summary.text
    student, paid = summary.sections
    names = [(backbone, recipe) for backbone in ("dit-ti/2", "sit-ti/2") for recipe in ("vanilla", "taught")]
    assert [row[:2] for row in student.rows] == names
    ours = {row[:2]: row[2:] for row in student.rows}
    assert ours["dit-ti/2", "taught"][:2] == ("1.500 ± 0.000", "0.50 better")
    assert ours["sit-ti/2", "taught"][:2] == ("0.500 ± 0.000", "0.50 better")
    assert {row[:2]: row[3] for row in paid.rows}["sit-ti/2", "taught"] == "1.00 n.d."
    assert "51.2k" in student.title and "102.4k" in paid.title


def test_other_objectives_or_protocols_are_not_summed_up(tmp_path: Path) -> None:
    records = backbones(tmp_path)
    flow = [replace(r, objective="iddpm") if r.backbone == "dit-ti/2" else r for r in records]
    assert summaries(leaderboard(flow)) == []
    assert summaries(leaderboard([r for r in records if r.backbone == "dit-ti/2"])) == []


def test_settings_of_one_backbone_are_told_apart(tmp_path: Path) -> None:
    records = [replace(r, backbone="sit-ti/2") for r in backbones(tmp_path)]
    (summary,) = summaries(leaderboard(records))
    assert "all settings under linear" in summary.heading
    assert {row[0] for row in summary.sections[0].rows} == {"sit-ti/2 [dit]", "sit-ti/2 [sit]"}


def test_show_prints_settings_stages_and_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"interval": [0.4, 0.7]}
    record = build(tmp_path, "taught", 0, [7.74, 1.79, 0.75], teacher=400, options=options)
    terminal.show(record)
    printed = capsys.readouterr().out
    for expected in ("taught: interval=[0.4, 0.7]", "400 TFLOP", "teacher", "25.6k", "7.740", "aaaa1111"):
        assert expected in printed


def test_show_says_why_a_run_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = build(tmp_path, "vanilla", 0, [], status="failed")
    RunFolder(Path(record.path)).write_status("failed", error="FloatingPointError: loss is nan")
    terminal.show(record)
    assert "FloatingPointError: loss is nan" in capsys.readouterr().out


def test_a_curve_of_many_metrics_fits_100_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = build(tmp_path, "vanilla", 0, [16.0, 4.0, 1.0])
    basic = {"fid": 10.27, "fid_all": 10.31, "is": 5.213, "accuracy": 0.908}
    extras = {
        "kid": 0.0123,
        "precision": 0.71,
        "recall": 0.52,
        "nn_distance": 0.11,
        "nn_distance_heldout": 0.12,
    }
    points = [replace(p, metrics=basic) for p in record.curve] + [
        replace(point(800, 1.0, 1.5), metrics=basic | extras)
    ]
    terminal.print_curve(replace(record, curve=points))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    first, further = printed.split("Further metrics")
    assert "accuracy" in first and "kid" not in first and "0.0123" in further


def test_a_curve_under_two_protocols_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = build(tmp_path, "vanilla", 0, [16.0])
    terminal.print_curve(
        replace(record, curve=[*record.curve, replace(record.curve[0], protocol="bbbb2222")])
    )
    printed = capsys.readouterr().out
    assert "aaaa1111" in printed and "bbbb2222" in printed


@pytest.mark.parametrize(
    ("value", "text"),
    [(800, "800"), (51200, "51.2k"), (102400, "102.4k"), (1_281_167, "1.28M"), (999_990, "1M")],
)
def test_counts(value: float, text: str) -> None:
    assert count(value) == text


def test_units() -> None:
    assert [flop(x) for x in (0, 1.234e15, 8e14)] == ["0 FLOP", "1.23 PFLOP", "800 TFLOP"]
    assert [duration(x) for x in (45.2, 300, 10_000)] == ["45.2 s", "5 min", "2.78 h"]
    assert [number(x) for x in (0.01234, 0.5, 12.345, 123.45)] == ["0.0123", "0.500", "12.35", "123.5"]


def test_the_figure_shows_every_recipe_in_its_colour(board: Leaderboard, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    from stbench.compare.plot import COLOURS, GREY

    writers.plot(board, tmp_path / "deep" / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "deep" / "curves.png").convert("RGB")).astype(int)
    assert pixels.shape[1] == 1200 and pixels.shape[0] < 700
    for colour in (GREY, *COLOURS[:2]):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        halves = np.array_split((pixels == wanted).all(axis=-1), 2, axis=1)
        assert all(half.sum() > 100 for half in halves), colour


def test_several_tables_share_one_figure(tmp_path: Path) -> None:
    from PIL import Image

    writers.plot(leaderboard(backbones(tmp_path)), tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] == 1200
    assert 700 < Image.open(tmp_path / "curves.png").size[1] < 1100


def test_the_figure_takes_records_too(tmp_path: Path) -> None:
    writers.plot([build(tmp_path, "vanilla", 0, [16.0, 4.0, 1.0])], tmp_path / "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_a_figure_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected finished runs to plot"):
        writers.plot(Leaderboard((), ()), tmp_path / "curves.png")


def test_an_unknown_figure_format_is_refused(board: Leaderboard, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found .*curves\.doc; try curves\.png"):
        writers.plot(board, tmp_path / "curves.doc")
