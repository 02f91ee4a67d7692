"""The report page as text: its numbers, its escaping, its limits, and that it requests nothing."""

from __future__ import annotations

import base64
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from stbench.cli.report import report
from stbench.compare import compact
from stbench.compare.build import build_leaderboard
from stbench.compare.published import PublishedValue
from stbench.core.errors import UserError
from stbench.report import pictures
from stbench.report.page import is_report
from stbench.runs.folder import RunFolder, find_runs, read_runs
from tests.conftest import Command
from tests.fake_runs import LONG_STEPS, make_point, write_run
from tests.report.pages import Tags, data_of, render, write_inspection, write_runs, write_sample

ROOT = Path(__file__).parents[2]
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
FETCHING = {"src", "href", "srcset", "action", "data", "poster"}


def test_the_page_has_the_numbers_of_the_compact_table(tmp_path: Path) -> None:
    records = write_runs(tmp_path)
    (table,) = build_leaderboard(records).tables
    section = compact.section(compact.entries(table), "")
    cells = re.findall(r"<t[hd][^>]*>(?:<button[^>]*>)?([^<]*)", render(records))
    first = cells.index("recipe")
    expected = [*section.header, *(cell for row in section.rows for cell in row)]
    assert [cell.replace("&gt;", ">") for cell in cells[first : first + len(expected)]] == expected


def test_curves_and_costs_of_a_run(tmp_path: Path) -> None:
    data = data_of(render(write_runs(tmp_path)))
    (table,) = data["tables"]
    (taught,) = [row for row in table["rows"] if row["name"] == "taught"]
    run = data["runs"][taught["runs"][0]]
    columns = run["curves"][table["protocol"]]["none"]
    assert columns["metrics"]["fid"] == [5.0, 1.5, 0.45, 0.225]
    assert columns["images"] == [step * 64 for step in LONG_STEPS]
    assert columns["seconds"] == [step / 16 for step in LONG_STEPS]
    assert run["earlier"] == [800 * 64, 50, 800e12]
    assert data["shared"][run["environment"]] == {"device": "cpu"}


def test_the_command_of_a_run_repeats_it(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stbench: Command
) -> None:
    """With the same weights and metrics, when it is typed where the page was written."""
    records = [RunFolder(trained_run).record()]
    (run,) = data_of(render(records))["runs"]
    monkeypatch.chdir(tmp_path)
    name, *arguments = shlex.split(run["command"])
    assert name == "stbench"
    code, _, err = stbench(*arguments, "--device", "cpu")
    assert code == 0, err
    (again,) = read_runs(find_runs(tmp_path / "reproduced"))
    assert again.run_id == records[0].run_id
    assert [stage.sha256["ema"] for stage in again.stages] == [
        stage.sha256["ema"] for stage in records[0].stages
    ]
    assert [point.metrics for point in again.curve] == [point.metrics for point in records[0].curve]


def test_the_budget_is_in_its_own_unit(tmp_path: Path) -> None:
    write_runs(tmp_path / "runs")
    tables = []
    for at in ("25.6k", "0.01h"):
        report([tmp_path / "runs"], output=tmp_path / "report.html", at=at)
        tables += data_of((tmp_path / "report.html").read_text())["tables"]
    assert [table["unit"] for table in tables] == ["images", "seconds"]
    assert [table["budgets"] for table in tables] == [[25_600, 76_800], [36, 36]]


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    records = write_runs(tmp_path)
    point = replace(make_point(1600, 0.5, 3.0), metrics={"fid": 0.5, "is": float("nan")})
    records[0] = replace(records[0], curve=[*records[0].curve, point])
    columns = data_of(render(records))["runs"][0]["curves"][point.protocol]["3"]
    assert columns["metrics"] == {"fid": [0.5], "is": [None], "val_loss": [0.4]}


def test_hostile_names_are_text(tmp_path: Path) -> None:
    records = write_runs(tmp_path)
    records = [
        replace(r, run_id=EVIL, recipe=EVIL, dataset=EVIL, backbone=EVIL, needs=EVIL) for r in records[::3]
    ]
    page = render(records)
    tags = Tags(page)
    assert [tag for tag, _ in tags.found].count("script") == 3
    assert "img" not in {tag for tag, _ in tags.found}
    assert not any(name.startswith("on") for _, attributes in tags.found for name in attributes)
    assert EVIL in tags.text
    assert data_of(page)["runs"][0]["id"] == EVIL


def test_the_page_requests_nothing(tmp_path: Path) -> None:
    page = render(write_runs(tmp_path))
    addresses = [
        value for _, attributes in Tags(page).found for name, value in attributes.items() if name in FETCHING
    ]
    assert addresses and all(value and value.startswith(("#", "data:")) for value in addresses)
    assert "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page and "connect-src 'none'" in page


def test_published_values_are_apart(tmp_path: Path) -> None:
    value = PublishedValue(
        "SiT-XL/2", "", "", "ImageNet", "256", "", "", "", "", "FID", "2.06", "", "paper <b>", "stated", ""
    )
    page = render(write_runs(tmp_path), published=[value])
    before, after = page.split('<section id="published">')
    assert "not measured here" in after and "2.06" in after and "SiT-XL/2" not in before
    assert "paper &lt;b&gt;" in after
    assert 'id="published"' not in render(write_runs(tmp_path / "again"))


def test_the_samples_of_a_row(tmp_path: Path) -> None:
    records = write_runs(tmp_path)
    (row,) = data_of(render(records))["samples"]
    assert row["title"].startswith("vanilla, sit-ti/2, seed 0")
    assert [picture[:3] for picture in row["pictures"]] == [[200, 12800, 1], [400, 25600, 1], [800, 51200, 1]]
    files = RunFolder(Path(records[0].path)).samples(0)
    for step, _, scale, uri in row["pictures"]:
        content = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
        assert content == files[step, scale].read_bytes()


def test_only_pictures_within_the_limits_are_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = write_runs(tmp_path)
    (tmp_path / "secret").write_text("not a picture")
    sample = write_sample(records[0], 400)
    sample.unlink()
    sample.symlink_to(tmp_path / "secret")
    size = write_sample(records[0], 200).stat().st_size
    monkeypatch.setattr(pictures, "MAX_TOTAL", size)
    data = data_of(render(records))
    assert [picture[0] for picture in data["samples"][0]["pictures"]] == [200]
    assert data["pictures_left_out"] == 2
    assert data_of(render(records, pictures=False))["samples"] == []


def test_the_features_are_means_over_seeds(tmp_path: Path) -> None:
    features = data_of(render([], inspection=write_inspection(tmp_path)))["features"]
    assert features["rows"] == ["vanilla", "taught"] and features["common_step"] == 200
    assert "cknna:digits" in features["measures"]
    _, taught = features["points"]["probe"][1]
    assert [point["images"] for point in taught] == [6400, 12800]
    assert taught[1]["mean"] == pytest.approx([0.35, 0.45, 0.55])
    assert taught[1]["std"] == pytest.approx([0.05 * 2**0.5] * 3, rel=1e-4)
    assert features["points"]["cka:digits"][0][0][0]["mean"] == [0.5, 0.6, None]
    assert features["scales"]["separation"][0][0] == {
        "scale": [0.0, 1.0, 10.0], "mean": [0.5, 1.5, 10.5], "std": [None] * 3
    }  # fmt: skip
    assert "Seeds: vanilla 1, taught 2." in features["notes"]


def test_maps_are_embedded_by_the_names_of_the_runs(tmp_path: Path) -> None:
    file = write_inspection(tmp_path / "inspect")
    sets = data_of(render([], inspection=file))["features"]["maps"]
    assert [maps["title"] for maps in sets] == ["digits-vanilla-s0", "digits-taught-s0"]
    assert data_of(render([], inspection=file, pictures=False))["features"]["maps"] == []


def test_a_hostile_inspection_is_text_and_reads_no_other_file(tmp_path: Path) -> None:
    file = write_inspection(tmp_path / "inspect")
    folder, content = file.parent, json.loads(file.read_text())
    content["runs"][0] |= {"label": EVIL, "name": f"/../../{EVIL}"}
    content["runs"][1] |= {"name": "/../../secret"}
    content["settings"]["encoders"] = [EVIL]
    (tmp_path / "secret.png").write_bytes((folder / "maps-digits-taught-s0.png").read_bytes())
    (folder / "maps-").mkdir()
    file.write_text(json.dumps(content))
    page = render([], inspection=file)
    assert [tag for tag, _ in Tags(page).found].count("script") == 3
    features = data_of(page)["features"]
    assert EVIL in features["rows"] and f"cka:{EVIL}" in features["measures"] and features["maps"] == []


def test_a_damaged_inspection_leaves_the_old_report(tmp_path: Path) -> None:
    write_runs(tmp_path / "runs")
    target, folder = tmp_path / "inspect/report.html", write_inspection(tmp_path / "inspect").parent
    report([tmp_path / "runs"], output=target, inspection=folder)
    before = target.read_text()
    assert data_of(before)["features"]["rows"] == ["vanilla", "taught"]
    (folder / "inspect.json").write_text("{}")
    for path in (folder, folder / "nothing"):
        with pytest.raises(UserError, match="run `stbench inspect` again"):
            report([tmp_path / "runs"], output=target, inspection=path)
    assert target.read_text() == before


def test_the_file_is_replaced_only_if_it_is_a_report(tmp_path: Path) -> None:
    write_runs(tmp_path / "runs")
    target = tmp_path / "report.html"
    report([tmp_path / "runs"], output=target)
    report([tmp_path / "runs"], output=target)
    assert is_report(target)
    target.write_text("<!doctype html>\nmine")
    with pytest.raises(UserError, match="not written by this command"):
        report([tmp_path / "runs"], output=target)
    assert target.read_text() == "<!doctype html>\nmine"


def test_the_committed_page_has_the_committed_runs() -> None:
    records = read_runs(find_runs(ROOT / "results/digits/runs"))
    runs = {run["id"]: run for run in data_of((ROOT / "results/digits/report.html").read_text())["runs"]}
    assert runs.keys() == {record.run_id for record in records}
    for record in records:
        last = record.final_points[-1]
        curve = runs[record.run_id]["curves"][last.protocol][f"{last.guidance:g}"]
        assert curve["metrics"]["fid"][-1] == pytest.approx(last.metrics["fid"], rel=1e-4)


def test_where_selects_rows_and_their_runs(tmp_path: Path) -> None:
    write_runs(tmp_path / "runs")
    report([tmp_path / "runs"], output=tmp_path / "report.html", where=["recipe=taught"])
    data = data_of((tmp_path / "report.html").read_text())
    assert [row["name"] for row in data["tables"][0]["rows"]] == ["vanilla", "taught"]
    assert {run["label"] for run in data["runs"]} == {"vanilla", "taught"}


def test_a_mistake_leaves_the_old_report(tmp_path: Path) -> None:
    write_runs(tmp_path / "runs")
    target = tmp_path / "report.html"
    report([tmp_path / "runs"], output=target)
    before = target.read_text()
    for mistake in ({"where": ["recipe=nothing"]}, {"metric": "nothing"}, {"baseline": "nothing"}):
        with pytest.raises(UserError):
            report([tmp_path / "runs"], output=target, **mistake)
    with pytest.raises(UserError, match="--serve writes no file"):
        report([tmp_path / "runs"], output=target, serve=True)
    assert target.read_text() == before


def test_runs_without_results_make_a_page(tmp_path: Path) -> None:
    record = write_run(tmp_path, "vanilla", 0, [10.0], status="running")
    page = render([record])
    assert "No finished runs to compare." in page
    assert data_of(page)["runs"][0]["state"] == "running"


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    records = write_runs(tmp_path)
    assert render(records) == render(records)
