"""Guides in leaderboards: what counts as no guidance, the best guidance, and rows of guiding networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from stbench.compare.blocks import View
from stbench.compare.build import build_leaderboard
from stbench.compare.next_step import next_step
from stbench.compare.run_report import curves
from stbench.compare.writers import Format, render
from stbench.report.content import page_content
from stbench.runs.folder import RunFolder
from stbench.runs.records import RunRecord
from tests.fake_runs import make_point, make_record, write_run
from tests.leaderboards import only_row, only_table

NETWORK = "network=sit-ti-2-vanilla-100-0123abcd"
NAME = NETWORK.partition("=")[2]
COST = {"images": 6400.0, "seconds": 10.0, "flops": 1e14}


def with_guides(
    record: RunRecord, fids: Mapping[tuple[float, str], float], cost: Mapping[str, float] | None = None
) -> RunRecord:
    """Add evaluations after the last step: scale and guides -> FID."""
    last = record.curve[-1]
    points = [
        replace(make_point(last.step, fid, scale), guides=guides, guide_cost=cost or {}, stage_index=0)
        for (scale, guides), fid in fids.items()
    ]
    return replace(record, curve=[*record.curve, *points])


def seeds(recipe: str, fid: float, grid: Mapping[float, float], **options: float) -> list[RunRecord]:
    return [
        make_record(recipe, seed, [16 * f, 4 * f, fid * f], guided={s: v * f for s, v in grid.items()})
        for seed, f in enumerate((1.0, 1.1, 0.9))
    ]


def test_points_with_guides_are_not_without_guidance() -> None:
    (record,) = [with_guides(make_record("deep", 0, [16, 4, 1]), {(1.0, "head:1.4"): 0.5})]
    row = only_row([record], "deep")
    assert row.student.value is not None and row.student.value.values == (1.0,)
    assert [point.value.mean for point in row.curve] == [16, 4, 1]
    # With its guides alone, the row has a choice of two.
    assert row.student.guided is not None
    assert (row.student.guided.guides, row.student.guided.value.mean) == ("head:1.4", 0.5)


def test_the_best_guidance_is_chosen_over_the_shared_scales_and_the_own_guides() -> None:
    records = seeds("vanilla", 1.0, {1.5: 0.5, 2.0: 0.7})
    fids = {(1.0, "head:1.4"): 0.6, (1.5, "head:1.4"): 0.3, (1.5, "head:2"): 0.9, (3.0, "head:1.4"): 0.1}
    records += [with_guides(record, fids) for record in seeds("deep", 1.0, {1.5: 0.6, 2.0: 0.8})]
    plain, deep = (only_row(records, recipe).student.guided for recipe in ("vanilla", "deep"))
    assert plain is not None and (plain.scale, plain.guides, plain.edge) == (1.5, "", False)
    # Scale 3 is not shared. A guide of one recipe does not take the others' grid away.
    assert deep is not None and (deep.scale, deep.guides) == (1.5, "head:1.4")
    assert only_row(records, "deep").student.best.ratio == pytest.approx(0.3 / (0.5 * (1.1 * 0.9) ** (1 / 3)))


def test_guides_that_a_seed_lacks_are_no_candidates() -> None:
    records = seeds("deep", 1.0, {1.5: 0.6})
    records[0] = with_guides(records[0], {(1.5, "head:1.4"): 0.1})
    guided = only_row(records, "deep").student.guided
    assert guided is not None and guided.guides == ""


def autoguided() -> list[RunRecord]:
    """Vanilla, guided by a network of the same seed, and another recipe."""
    fids = {(1.0, "#{}:1.5"): 0.4, (1.5, "#{}:1.5"): 0.45, (1.0, "#{}:2"): 0.8}
    records = [
        with_guides(record, {(s, NETWORK + g.format(f"{seed:08x}")): v for (s, g), v in fids.items()}, COST)
        for seed, record in enumerate(seeds("vanilla", 1.0, {1.5: 0.5}))
    ]
    return records + seeds("taught", 0.9, {1.5: 0.45})


def test_another_network_makes_a_row_that_pays_for_it() -> None:
    plain = only_row(autoguided(), "vanilla")
    row = only_row(autoguided(), f"vanilla + autoguidance by {NAME}")
    assert row.student.value is None and row.curve == () and row.area is None
    assert row.student.plain.verdict == "guided only" and row.student.reach is None
    assert row.student.guided is not None and row.seeds == (0, 1, 2)
    assert (row.student.guided.scale, row.student.guided.guides) == (1.0, f"{NETWORK}:1.5")
    assert plain.student.guided is not None and plain.student.guided.guides == ""
    assert row.student.best.ratio == pytest.approx(0.4 / (0.5 * (1.1 * 0.9) ** (1 / 3)))
    assert (plain.earlier_images, row.earlier_images, row.needs) == (0, 6400, "")
    assert plain.student.flops_total is not None and row.student.flops_total is not None
    assert row.student.flops_total.mean == pytest.approx(plain.student.flops_total.mean + 1e14)
    assert row.student.flops_student == plain.student.flops_student


def test_a_row_of_another_network_changes_no_other_row() -> None:
    without = [
        replace(record, curve=[point for point in record.curve if not point.guides])
        for record in autoguided()
    ]
    for recipe in ("vanilla", "taught"):
        before, after = only_row(without, recipe), only_row(autoguided(), recipe)
        assert replace(after, student=replace(after.student, best=before.student.best)) == replace(
            before, paid=after.paid
        )
        assert after.paid.value == before.paid.value
        assert after.student.best.ratio == before.student.best.ratio  # Holm covers one row more
    assert only_table(autoguided()).paid_images == only_table(without).paid_images


def test_the_next_step_names_each_run_once() -> None:
    records = [record for record in autoguided() if record.seed == 0 and record.recipe == "vanilla"]
    assert next_step(only_table(records)).count(records[0].path) == 1


def test_a_network_of_unknown_cost_is_named_and_missing_seeds_are_noted() -> None:
    records = seeds("vanilla", 1.0, {1.5: 0.5})
    records[1] = with_guides(records[1], {(1.0, f"{NETWORK}#00000000:1.5"): 0.4})
    row = only_row(records, f"vanilla + autoguidance by {NAME}")
    assert row.needs == f"the network {NAME}" and row.seeds == (1,)
    note = f"vanilla + autoguidance by {NAME}: no samples of seed 0, 2"
    assert note in only_table(records).notes


@pytest.mark.parametrize("form", ["md", "csv", "json", "tex"])
def test_every_format_names_the_guides(form: Format) -> None:
    board = build_leaderboard(autoguided())
    for details in (False, True):
        text = render(board, form, view=View(details=details)).replace("\\", "")
        assert f"autoguidance by {NAME}" in text
        assert (f"{NETWORK}:1.5" if form in ("csv", "json") else "network:1.5") in text


def test_records_and_pages_keep_guides(tmp_path: Path) -> None:
    record = write_run(tmp_path, "deep", 0, [16, 4, 1])
    folder = RunFolder(Path(record.path))
    assert '"guide' not in (folder.path / "curve.jsonl").read_text().replace('"guidance"', "")
    folder.append_points(
        with_guides(record, {(1.0, "head:1.4"): 0.5, (1.0, f"{NETWORK}#0:2"): 0.6}, COST).curve
    )
    read = folder.record()
    assert [point.guides for point in read.curve[-2:]] == ["head:1.4", f"{NETWORK}#0:2"]
    assert read.curve[-1].guide_cost == COST
    assert "head:1.4" in {cell for section in curves(read) for row in section.rows for cell in row}
    content = page_content(build_leaderboard([read]), [read])
    (table,), (run,) = content["tables"], content["runs"]
    assert [row["name"] for row in table["rows"]] == ["deep"]  # no second row with the same curve
    assert list(run["curves"]["aaaa1111"]) == ["none", "1, head:1.4", f"1, {NETWORK}#0:2"]
