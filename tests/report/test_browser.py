"""The report page in headless Chromium: what a reader can do, and that the page stays by itself."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stbench.compare.build import build_leaderboard
from stbench.report.page import render_page
from stbench.report.serve import ReportServer
from stbench.runs.folder import find_runs, read_runs
from tests.fake_runs import write_run
from tests.report.browser import Browser, chromium, missing
from tests.report.pages import render, write_inspection, write_runs

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

NAMES = "#leaderboard tbody tr th"
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
RIGHT = "\ue014"
LEFT = "\ue012"


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    """One browser for all tests."""
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of nine runs."""
    folder = tmp_path_factory.mktemp("page")
    path = folder / "report.html"
    records = write_runs(folder / "runs")
    path.write_text(render(records, inspection=write_inspection(folder / "inspect")))
    return path


@pytest.fixture()
def browser(chrome: Browser, page: Path) -> Iterator[Browser]:
    """The page in a window of its own size; fails if the page prints to the console or requests anything."""
    chrome.window(1280, 1200)
    chrome.requests()
    chrome.open(page.as_uri())
    yield chrome
    assert chrome.messages() == []
    assert [url for url in chrome.requests() if not url.startswith(("data:", page.as_uri()))] == []


def click(browser: Browser, selector: str, index: int = 0) -> None:
    browser.run("arguments[0].scrollIntoView({block: 'center'})", browser.find(selector)[index])
    browser.find(selector)[index].click()


def test_sorting_by_clicking_and_by_key(browser: Browser) -> None:
    assert browser.texts(NAMES) == ["vanilla", "taught", "aligned"]
    click(browser, ".ranking thead button", 2)  # FID
    assert browser.texts(NAMES) == ["taught", "aligned", "vanilla"]
    click(browser, ".ranking thead button", 2)
    assert browser.texts(NAMES) == ["vanilla", "aligned", "taught"]
    browser.find(".ranking thead button")[0].send_keys("\n")
    assert browser.texts(NAMES) == ["aligned", "taught", "vanilla"]
    assert browser.find("th[aria-sort=ascending]")[0].text.startswith("recipe")


def test_filtering_rows_and_runs(browser: Browser) -> None:
    browser.find("#filter")[0].send_keys("sit TAUGHT")
    assert browser.texts(NAMES) == ["taught"]
    assert browser.find("#filter-count")[0].text == "1 of 3 rows"
    assert len(browser.find("details.run")) == 3
    browser.find("#filter")[0].send_keys(" nothing")
    assert browser.texts(NAMES) == [] and browser.find("details.run") == []


def readout(browser: Browser) -> str:
    return browser.find(".readout")[0].text.replace("\n", " ")


def test_hovering_shows_values_and_the_axis_switches(browser: Browser) -> None:
    chart = browser.find(".u-over")[0]
    browser.run("arguments[0].scrollIntoView({block: 'center'})", chart)
    browser.hover(chart, x=chart.size["width"] // 2 - 2)
    assert "vanilla 0.455±0.021" in readout(browser) and "@ 102.4k" in readout(browser)
    browser.choose("x-axis", "seconds")
    browser.choose("seeds", "lines")
    chart = browser.find(".u-over")[0]
    browser.hover(chart, x=chart.size["width"] // 2 - 3)
    assert "vanilla s1 0.477 @ 0.0278" in readout(browser)  # 100 s
    browser.choose("x-axis", "flops")
    browser.choose("metric", "is")
    chart = browser.find(".u-over")[0]
    browser.hover(chart, x=chart.size["width"] // 2 - 3)
    assert "taught s0 5.000 @ 1.6P" in readout(browser)


def test_everything_paid_moves_the_row_with_an_earlier_stage(browser: Browser) -> None:
    browser.choose("paid", "paid")
    chart = browser.find(".chart")[0]
    browser.run("arguments[0].scrollIntoView({block: 'center'})", chart)
    browser.run("arguments[0].focus()", chart)
    browser.press(LEFT)
    assert "taught 0.227±0.010 @ 153.6k" in readout(browser)
    assert "vanilla 0.455±0.021 @ 102.4k" in readout(browser)


def test_arrow_keys_move_the_cursor(browser: Browser) -> None:
    browser.run("arguments[0].focus()", browser.find(".chart")[0])
    browser.press(RIGHT)
    assert readout(browser).startswith("at 12.8k")
    browser.press(RIGHT)
    assert readout(browser).startswith("at 25.6k")
    browser.press(LEFT)
    assert readout(browser).startswith("at 12.8k")


def test_scales_and_guidance(browser: Browser) -> None:
    for control in ("log-x", "log-y"):
        browser.find(f"#{control}")[0].click()
        assert browser.find(".u-over")
    browser.choose("guidance", "1.5")
    browser.run("arguments[0].focus()", browser.find(".chart")[0])
    browser.press(RIGHT)
    assert "vanilla 0.300" in readout(browser) and "taught" not in readout(browser)


def test_hiding_a_curve(browser: Browser) -> None:
    (button,) = [button for button in browser.find("#legend button") if button.text == "taught"]
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    browser.run("arguments[0].focus()", browser.find(".chart")[0])
    browser.press(RIGHT)
    assert "aligned" in readout(browser) and "taught" not in readout(browser)
    browser.find("#legend .every")[1].click()
    assert "No values" in browser.find(".chart")[0].text


def test_the_slider_changes_the_samples(browser: Browser) -> None:
    before = browser.find("#sample-grid img")[0].get_attribute("src")
    assert "step 800" in browser.find("#sample-grid figcaption")[0].text
    browser.find("#sample-step")[0].send_keys(LEFT)
    assert "step 400" in browser.find("#sample-grid figcaption")[0].text
    assert browser.find("#sample-grid img")[0].get_attribute("src") != before
    assert browser.run("return document.querySelector('#sample-grid img').naturalWidth") == 64


def test_a_run_opens(browser: Browser) -> None:
    click(browser, "details.run summary", 2)
    text = browser.find("details.run[open]")[0].text
    for expected in ("stbench run --config", "teacher", "51.2k", "euler", "device", "cpu", "0.225"):
        assert expected in text


def test_features_by_block_along_training_and_by_scale(browser: Browser) -> None:
    chart, rows = "#feature-chart .chart", "#feature-table tbody tr"
    assert browser.texts(rows) == [
        "vanilla 0.100 0.200 0.300",
        "taught 0.350 ±0.071 0.450 ±0.071 0.550 ±0.071",
    ]
    browser.run("arguments[0].focus()", browser.find(chart)[0])
    browser.press(RIGHT)
    browser.press(RIGHT)
    assert browser.find("#feature-chart .readout")[0].text.startswith("at 1\n")
    assert "taught 0.450±0.071 @ 1" in browser.find("#feature-chart .readout")[0].text
    browser.choose("feature-where", "100")
    assert browser.texts(rows)[1].startswith("taught 0.225")
    browser.choose("feature-view", "images")
    assert browser.texts(rows)[0] == "vanilla 0.200 0.200"  # block 1
    browser.choose("feature-view", "scale")
    browser.choose("feature-measure", "separation")
    assert browser.texts(rows)[0] == "vanilla 0.500 1.500 10.50"
    assert browser.find("#feature-where") == []
    click(browser, "#feature-maps summary")
    assert browser.run("return document.querySelector('#feature-maps img').naturalWidth") == 640


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 380])
def test_accessibility_and_layout(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.window(width, dark=dark)
    browser.open(page.as_uri())
    browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    browser.wait(lambda: browser.find("details.run dl"))
    browser.run("arguments[0].focus()", browser.find(".chart")[0])
    browser.press(RIGHT)
    assert browser.violations() == []
    assert browser.run("return document.documentElement.scrollWidth") <= width


def test_hostile_text_is_shown_and_never_runs(chrome: Browser, tmp_path: Path) -> None:
    records = write_runs(tmp_path / "runs")
    records = [replace(r, run_id=EVIL, recipe=EVIL + r.recipe, dataset=EVIL, needs=EVIL) for r in records]
    inspection = write_inspection(tmp_path / "inspect")
    inspection.write_text(inspection.read_text().replace('"taught"', json.dumps(EVIL)))
    path = tmp_path / "evil.html"
    path.write_text(render(records, inspection=inspection))
    chrome.open(path.as_uri())
    chrome.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert EVIL in chrome.find("summary .id")[0].text
    assert EVIL in chrome.find("#feature-table")[0].text
    assert chrome.run("return document.querySelectorAll('script').length") == 3
    assert chrome.run("return document.querySelectorAll('img[src=x]').length") == 0
    assert chrome.messages() == []


def test_an_empty_store(chrome: Browser, tmp_path: Path) -> None:
    path = tmp_path / "empty.html"
    path.write_text(render([]))
    chrome.open(path.as_uri())
    assert "No finished runs to compare." in chrome.find("#leaderboard")[0].text
    assert "No finished runs yet." in chrome.find("#curves")[0].text
    assert chrome.violations() == [] and chrome.messages() == []


def test_five_hundred_runs(chrome: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    records = [
        write_run(tmp_path, f"recipe-{i // 5}" if i > 4 else "vanilla", i % 5, [16.0, 4.0, 1 + i / 500])
        for i in range(500)
    ]
    path = tmp_path / "many.html"
    path.write_text(render(records))
    chrome.open(path.as_uri())
    assert chrome.run("return document.querySelectorAll('details.run').length") == 500
    chrome.find("#filter")[0].send_keys("recipe-77")
    assert chrome.texts(NAMES) == ["recipe-77"]
    assert "88 rows are hidden" in chrome.find("#curves-note")[0].text
    assert chrome.messages() == []


def test_a_served_page_reloads_and_keeps_the_choices(chrome: Browser, tmp_path: Path) -> None:
    write_runs(tmp_path)

    def render_live(live: str) -> str:
        records = read_runs(find_runs(tmp_path))
        return render_page(build_leaderboard(records), records, live=live)

    with ReportServer([tmp_path], render_live, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        chrome.requests()
        chrome.open(server.url)
        chrome.choose("x-axis", "flops")
        chrome.find("#filter")[0].send_keys("late")
        write_run(tmp_path, "late", 0, [8.0, 2.0, 0.5])
        chrome.wait(lambda: chrome.texts(NAMES) == ["late"])
        assert chrome.run("return document.getElementById('x-axis').value") == "flops"
        assert all(url.startswith((server.url, "data:")) for url in chrome.requests())
        server.shutdown()
        thread.join()
    assert chrome.messages() == []
