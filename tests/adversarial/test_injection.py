"""Hostile text in run folders, journals and published values: every field in every output format.

A payload may not reach a terminal as a control sequence, a web page as markup, a TeX run as a command, a
spreadsheet as a formula or matplotlib as mathematics; and no payload may end a command with a traceback.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from stbench.compare.blocks import View
from stbench.compare.build import build_leaderboard
from stbench.compare.leaderboard import Leaderboard
from stbench.compare.plot import plot_curves
from stbench.compare.published import PublishedValue
from stbench.compare.terminal import print_leaderboard, print_run
from stbench.compare.writers import render
from stbench.config.plan import prepare
from stbench.core.errors import UserError
from stbench.core.recipe import NoSupervision, Stage
from stbench.core.registry import BACKBONES, DATASETS, OBJECTIVES, RECIPES, SAMPLERS
from stbench.core.text import check_name, print_line, to_csv, to_latex, to_markdown, to_plot, visible
from stbench.report.content import page_content
from stbench.report.markup import leaderboard_markup, published_markup
from stbench.runs.folder import OutputFolder, RunFolder, find_runs
from stbench.runs.journal import JournalEntry
from stbench.runs.records import RunRecord
from tests.conftest import tiny_spec
from tests.fake_runs import make_entry, make_point, make_record, make_stage, write_run
from tests.report.pages import Tags

pytestmark = pytest.mark.slow

PAYLOADS = {
    "colour": "a\x1b[31mb",
    "clear screen": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "hyperlink": "\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "8-bit csi": "a\x9b31mb",
    "bell and backspace": "safe\x08\x08\x08\x08\x07evil",
    "nul": "a\x00b",
    "delete": "a\x7fb",
    "newline": "a\n% b\n\\input{evil}\n# heading\n| cell |",
    "carriage return": "safe\rhidden",
    "vertical": "a\x0bb\x0cc\x1cd\x85e",
    "tab": "\t=1+1",
    "line separators": "a\u2028b\u2029c",
    "bidi override": "a\u202eb\u202dc",
    "bidi isolates": "\u2066a\u2067b\u2068c\u2069",
    "bidi marks": "a\u200eb\u200fc\u061cd",
    "zero width": "a\u200bb\u200cc\u200dd\u2060e\ufefff\u00adg",
    "fillers": "a\u115fb\u3164c\u2800d\ufe0fe\U000e0041f",
    "lone surrogates": "a\ud800b\udcffc",
    "private use": "a\ue000b\U0010ffffc",
    "script": "<script>alert(1)</script>",
    "image tag": '<img src=x onerror="alert(1)">',
    "comment": "<!-- a --> <!DOCTYPE x> <?php x ?>",
    "closing": "</td></table><a href='http://evil.example'>x</a>",
    "autolink": "<http://evil.example> and <a@evil.example>",
    "bare link": "http://evil.example www.evil.example HTTPS://evil.example",
    "markdown link": "[x](http://evil.example) ![y](http://evil.example/p.png) [z]: http://evil.example",
    "markdown link with spaces": "[x] (y) [a][b] [javascript](javascript:alert(1))",
    "pipes": "a | b || c \\| d",
    "backticks": "`a` ``b`` ```c",
    "emphasis": "*a* **b** _c_ __d__ ~~e~~ ***",
    "entities": "&lt;script&gt; &#60;b&#62; &amp;",
    "blocks": "- a",
    "heading": "# a",
    "quotation": "> a",
    "number": "1. a",
    "rule": "---",
    "backslashes": "\\<b> \\\\[x](y) a\\",
    "tex input": "\\input{/etc/passwd} \\write18{id} \\def\\x{y}",
    "tex specials": "a&b%c$d$#e_f{g}h~i^j^^5cinput",
    "tex rows": "[2in] b",
    "tex star": "* b",
    "mathematics": "$\\frac{1}{0}$ $x $$",
    "odd mathematics": "$\\undefined{ $",
    "csv command": "=cmd|' /C calc'!A0",
    "csv plus": "+1+1",
    "csv minus": "-2+3",
    "csv at": "@SUM(1+1)",
    "csv wide": "\uff1d1+1",
    "csv space": "  =1+1",
    "csv quotes": '"=1+1","x\n=2',
    "rich markup": "[red]a[/red] [[x]] [/] [bold",
    "rich link": "[link=http://evil.example]x[/link] :bomb:",
    "legend": "_hidden",
    "empty": "",
    "long": "x" * 5000,
    "long words": "a b " * 2000,
}

FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")


# --- Checks of one format each ---


def check_printable(text: str) -> None:
    """Every character is visible, and lines end only where the writer ends them."""
    for letter in text:
        assert letter == "\n" or unicodedata.category(letter) not in {
            *("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        }, f"U+{ord(letter):04X}"
    text.encode()  # also as bytes


def check_markdown(text: str) -> None:
    """CommonMark with tables finds only what the writer made: no HTML, links, images, code or emphasis."""
    check_printable(text)
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    allowed = {
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "heading",
        "paragraph",
        "bullet_list",
        "list_item",
    }
    for token in parser.parse(text):
        if token.type == "inline":
            for child in token.children or ():
                assert child.type in {"text", "text_special", "strong_open", "strong_close"}, child
        else:
            assert token.type.removesuffix("_open").removesuffix("_close") in allowed, token
            assert token.type != "heading_open" or token.tag == "h2"
    assert not re.search(r"(?i)(https?|ftp)://|\bwww\.\w", text), "GitHub would make a link of this"
    assert not re.search(r"(?<!\\)\$", text), "GitHub would make mathematics of this"
    for line in text.splitlines():
        if line.startswith("| "):
            cells = re.split(r"(?<!\\)(?:\\\\)*\|", line)
            assert len(cells) > 3


def check_latex(text: str) -> None:
    """Outside comments there are the writer's own commands only; a row cannot change the one before."""
    check_printable(text)
    rules = ("toprule", "midrule", "bottomrule")
    own = {"begin", "end", "pm", "dagger", *rules}
    own |= {"textbackslash", "textasciicircum", "textasciitilde"}
    for line in text.splitlines():
        if line.startswith("%") or not line:
            continue
        is_frame = line.startswith(("\\begin{tabular}", "\\end{tabular}", *(f"\\{rule}" for rule in rules)))
        assert is_frame or line.endswith(r" \\")
        assert set(re.findall(r"\\([A-Za-z@]+)", line)) <= own, line
        assert not line.startswith(("[", "*")) and "^" not in line
        cells = re.sub(r"\\[&%$#_{}]", "", line)
        assert not re.search(r"(?<!\\)[%#_~]", cells), line
        assert cells.count("$") % 2 == 0 and cells.count("{") == cells.count("}")


def check_csv(text: str) -> None:
    """No cell starts a formula unless it is a number; every row has the same number of cells."""
    check_printable(text)
    lines = list(csv.reader(io.StringIO(text)))
    assert len({len(line) for line in lines}) == 1
    for cell in (cell for line in lines for cell in line if FORMULA.match(cell)):
        float(cell)


def check_json(text: str) -> None:
    """Plain ASCII that parses."""
    assert text.isascii()
    json.loads(text, parse_constant=pytest.fail)


PAGE_TAGS = {
    *("article", "h2", "h3", "p", "div", "table", "thead", "tbody", "tr", "th", "td", "button", "ul", "li"),
    *("details", "summary", "section"),
}
PAGE_ATTRIBUTES = {
    *("class", "scope", "aria-sort", "aria-label", "type", "title", "tabindex", "role", "id"),
    *("data-words", "data-value"),
}


def check_html(text: str) -> None:
    """A browser finds only the writer's own elements and attributes."""
    check_printable(text)
    for tag, attributes in Tags(text).found:
        assert tag in PAGE_TAGS and set(attributes) <= PAGE_ATTRIBUTES, (tag, attributes)
    assert "<!" not in text and "<?" not in text


CHECKS: Mapping[str, Callable[[str], None]] = {
    "md": check_markdown,
    "tex": check_latex,
    "csv": check_csv,
    "json": check_json,
}


# --- Fields ---


def spec_change(*path: str) -> Callable[[RunRecord, str], RunRecord]:
    """Put a payload in a field of spec.json and in the record's field that is read from it."""

    def change(record: RunRecord, text: str) -> RunRecord:
        return replace(record, **{path[0]: text}) if len(path) == 1 else record

    return change


RECORD_FIELDS: Mapping[str, Callable[[RunRecord, str], RunRecord]] = {
    **{
        name: spec_change(name)
        for name in (
            *("run_id", "path", "dataset", "backbone", "objective", "recipe", "needs", "precision"),
            *("setting_hash", "train_hash"),
        )
    },
    "option name": lambda r, text: replace(r, options={text: 1}),
    "option value": lambda r, text: replace(r, options={"x": text, "y": [text]}),
    "resolved option": lambda r, text: replace(
        r, spec={**r.spec, "recipe": {**r.spec["recipe"], "resolved": {"x": text, text: 1}}}
    ),
    "metric": lambda r, text: replace(
        r, curve=[replace(p, metrics={**p.metrics, text or "m": 1.0}) for p in r.curve]
    ),
    "stage of a point": lambda r, text: replace(r, curve=[replace(p, stage=text) for p in r.curve]),
    "protocol": lambda r, text: replace(
        r,
        curve=[replace(p, protocol=text) for p in r.curve],
        protocols={text: {"sampler": "euler", "steps": 20}},
    ),
    "protocol field": lambda r, text: replace(
        r, protocols={"aaaa1111": {"sampler": text, "steps": 20, text: 1, "decoder": text}}
    ),
    "name of a stage": lambda r, text: replace(r, stages=[replace(make_stage(0, 800), name=text)]),
}
JOURNAL_FIELDS = ("run_id", "dataset", "backbone", "objective", "recipe", "setting_hash", "error")
PUBLISHED_FIELDS = tuple(PublishedValue.__dataclass_fields__)


def hostile_entry(field: str, text: str) -> JournalEntry:
    """A failed run of a journal with a payload in a field."""
    return replace(make_entry("taught", state="failed", error="loss is nan"), **{field: text})


@lru_cache(maxsize=1)
def leaderboards(text: str) -> dict[str, Leaderboard]:
    """A leaderboard for every field of a record or journal that the payload can be in."""
    finished = make_record("vanilla", 0, [16.0, 4.0, 1.0], guided={1.5: 0.5})
    failed = make_record("taught", 1, [16.0], status="failed")
    found = {}
    for field, change in RECORD_FIELDS.items():
        found[field] = build_leaderboard([change(finished, text), change(failed, text)])
    for field in JOURNAL_FIELDS:
        found[f"journal {field}"] = build_leaderboard([finished], [hostile_entry(field, text)])
    return found


def published(text: str) -> list[PublishedValue]:
    """Published values with the payload in one field each, and in all of them."""
    fields = {name: "1" for name in PUBLISHED_FIELDS}
    return [
        *(PublishedValue(**{**fields, name: text}) for name in PUBLISHED_FIELDS),
        PublishedValue(**dict.fromkeys(PUBLISHED_FIELDS, text)),
    ]


# --- The matrix ---


@pytest.mark.parametrize("form", CHECKS)
@pytest.mark.parametrize("name", PAYLOADS)
def test_no_field_reaches_a_file_unescaped(name: str, form: Any) -> None:
    for field, leaderboard in leaderboards(PAYLOADS[name]).items():
        try:
            for details in (False, True):
                CHECKS[form](render(leaderboard, form, view=View(details=details)))
        except AssertionError as error:
            raise AssertionError(f"{field}: {error}") from error


@pytest.mark.parametrize("form", ["md", "tex", "json"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_published_values_are_escaped(name: str, form: Any) -> None:
    CHECKS[form](render(Leaderboard((), ()), form, published(PAYLOADS[name])))


@pytest.mark.parametrize("name", PAYLOADS)
def test_no_field_controls_the_terminal(name: str) -> None:
    text = PAYLOADS[name]
    reported = published(text)
    for leaderboard in leaderboards(text).values():
        file = io.StringIO()
        console = Console(file=file, width=100, force_terminal=True, color_system=None)
        for details in (False, True):
            print_leaderboard(leaderboard, published=reported, view=View(details=details), console=console)
        reported = []  # once is enough
        printed = re.sub(r"\x1b\[[0-3]m", "", file.getvalue())  # the writer's own bold, dim and italic
        check_printable(printed)
        assert "\U0001f4a3" not in printed  # rich replaces :bomb: in text with markup


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_tables_of_a_page_have_no_foreign_markup(name: str) -> None:
    for field, leaderboard in leaderboards(PAYLOADS[name]).items():
        try:
            check_html(leaderboard_markup(leaderboard))
        except AssertionError as error:
            raise AssertionError(f"{field}: {error}") from error
    check_html(published_markup(published(PAYLOADS[name])))


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_data_of_a_page_are_visible_text(name: str, tmp_path: Path) -> None:
    path = write_run(tmp_path, "vanilla", 0, [16.0, 4.0, 1.0]).path
    for field, change in RECORD_FIELDS.items():
        record = change(make_record("vanilla", 0, [16.0, 4.0, 1.0]), PAYLOADS[name])
        if field != "path":
            record = replace(record, path=path)  # its environment is read from the folder
            content = page_content(build_leaderboard([record]), [record])
            check_printable(json.dumps(content, ensure_ascii=False))


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_run_is_shown_without_control(name: str, tmp_path: Path) -> None:
    text = PAYLOADS[name]
    path = write_run(tmp_path, "vanilla", 0, [16.0, 4.0, 1.0]).path
    RunFolder(Path(path)).write_status("failed", error=text)
    for field, change in RECORD_FIELDS.items():
        record = change(make_record("vanilla", 0, [16.0, 4.0, 1.0]), text)
        file = io.StringIO()
        print_run(replace(record, path=path), console=Console(file=file, width=100))
        try:
            check_printable(file.getvalue())
        except AssertionError as error:
            raise AssertionError(f"{field}: {error}") from error


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_plot_draws_every_label_as_text(name: str, tmp_path: Path) -> None:
    text = PAYLOADS[name]
    records = [make_record("vanilla", 0, [16.0, 4.0, 1.0])]
    records += [replace(make_record("other", seed, [9.0, 3.0, 1.0]), recipe=text) for seed in (0, 1)]
    records = [replace(record, dataset=text, objective=text) for record in records]
    plot_curves(build_leaderboard(records), tmp_path / "curves.svg")
    check_printable((tmp_path / "curves.svg").read_text())


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_line_is_one_visible_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_line(PAYLOADS[name])
    out = capsys.readouterr().out
    check_printable(out)
    assert out.count("\n") == 1


# --- Names ---


@pytest.mark.parametrize("registry", [BACKBONES, RECIPES, DATASETS, OBJECTIVES, SAMPLERS])
@pytest.mark.parametrize("name", [*PAYLOADS, "..", ".", "x/../../../y", "/tmp/x", ".hidden", "-o", "a b"])
def test_no_registry_takes_a_hostile_name(name: str, registry: Any) -> None:
    text = PAYLOADS.get(name, name)
    accepted = next(iter(registry.module_dict.values()))
    with pytest.raises(UserError, match="must be 1 to 48") as caught:
        registry.register_module(name=text or "\n")(accepted)
    check_printable(str(caught.value))
    assert text not in registry.module_dict


@pytest.mark.parametrize(
    "name", [*PAYLOADS, "..", "x/../../../y", "/tmp/x", "a/b/c", "a//b", "/", "x/", "x" * 49]
)
def test_names_of_stages_runs_and_sizes_are_checked(name: str) -> None:
    text = PAYLOADS.get(name, name)
    with pytest.raises(UserError):
        Stage(text, lambda earlier: NoSupervision())
    with pytest.raises(UserError):
        check_name(text, "a size", parts=2)
    if len(text) != 49:
        for path in (OutputFolder.run, OutputFolder.run_log, OutputFolder.run_config):
            with pytest.raises(UserError):
                path(OutputFolder(Path("runs")), text)


@pytest.mark.parametrize("name", ["sit", "self-transcendence", "my_recipe.v2", "0", "x" * 48])
def test_ordinary_names_are_taken_and_written_as_they_are(name: str) -> None:
    assert check_name(name, "a name") == visible(name) == to_markdown(name) == to_csv(name) == to_plot(name)
    assert to_latex(name).replace("\\", "") == name
    assert make_point(1, 1.0).stage == "student"


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (check_printable, "a\x1b[31m"),
        (check_printable, "\u202e"),
        (check_markdown, "| <b>x</b> | y |\n| :-- | --: |\n| 1 | 2 |"),
        (check_markdown, "- [x](y)"),
        (check_markdown, "## `x`"),
        (check_markdown, "- # x"),
        (check_latex, "\\input{x} & y \\\\"),
        (check_latex, "a\nb \\\\"),
        (check_latex, "[2in] \\\\"),
        (check_csv, "a,=1"),
        (check_json, '"\u2028"'),
    ],
)
def test_the_checks_can_fail(check: Callable[[str], None], text: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check(text)


def test_links_that_lead_back_are_followed_once(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "vanilla", 0, [16.0, 4.0, 1.0])
    for number in range(6):
        folder = tmp_path / "runs" / f"folder{number}"
        folder.mkdir()
        for other in range(6):
            (folder / f"link{other}").symlink_to(tmp_path / "runs", target_is_directory=True)
    assert len(find_runs(tmp_path)) == 1


@pytest.mark.parametrize("name", ["x/../../../y", "..", "a/b", "\n", "a\x1b", ""])
def test_names_from_records_are_checked_before_they_are_part_of_a_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        RunFolder(tmp_path).stage(0, name)
    with pytest.raises(UserError):
        OutputFolder(tmp_path).artifact(name)


@pytest.mark.parametrize("text", ["caf\udce9", "a\ud800", "a\0"])
def test_text_that_records_cannot_store_is_refused_before_training(text: str) -> None:
    spec = tiny_spec()
    for changed in (
        spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"options": {"x": [text]}})}),
        spec.model_copy(update={"objective": text}),
    ):
        with pytest.raises(UserError, match="not UTF-8"):
            prepare(changed)
