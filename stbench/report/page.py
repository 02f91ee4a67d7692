"""The report page: one HTML file with its style, scripts and data, which requests nothing.

A content security policy allows only the page's own style and scripts, by their hashes, and pictures in it.
The data are compressed: the curves of 500 runs would be more than a megabyte.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from stbench import __version__
from stbench.compare.leaderboard import Leaderboard
from stbench.compare.published import PublishedValue
from stbench.report.content import page_content
from stbench.report.markup import leaderboard_markup, published_markup, text
from stbench.runs.records import RunRecord

MARK = "<!doctype html>\n<!-- written by stbench report -->\n"
"""The beginning of every page."""
SCRIPTS = (
    "dom.js",
    "leaderboard.js",
    "series.js",
    "charts.js",
    "curves.js",
    "samples.js",
    "features.js",
    "runs.js",
    "live.js",
)
"""Scripts in the order in which they are joined."""
_PLACE = re.compile(r"\{\{(\w+)\}\}")


def render_page(
    leaderboard: Leaderboard,
    records: Sequence[RunRecord],
    published: Sequence[PublishedValue] = (),
    *,
    pictures: bool = True,
    inspection: Path | None = None,
    live: str = "",
) -> str:
    """Return the page.

    Args:
        leaderboard: The tables.
        records: The runs.
        published: Values of papers, shown apart.
        pictures: Whether to embed pictures.
        inspection: A file written by `stbench inspect`, to be shown with its figures.
        live: For a served page, the version with which it asks its server whether it is up to date.

    Raises:
        UserError: If the environment of a run, or the inspection, is damaged.
    """
    style = _asset("uplot.css") + _asset("page.css")
    library = f"/*\n{_asset('uplot-LICENSE.txt')}*/\n{_asset('uplot.js')}"
    script = _joined_scripts()
    data = page_content(leaderboard, records, pictures=pictures, inspection=inspection)
    finished = sum(record.status == "finished" for record in records)
    parts = {
        "policy": _policy(style, (library, script), live=bool(live)),
        "style": style,
        "live": text(live),
        "summary": f"{finished} finished of {len(records)} runs, stbench {text(__version__)}",
        "leaderboard": leaderboard_markup(leaderboard),
        "published": published_markup(published),
        "data": pack(data),
        "library": library,
        "script": script,
    }
    # One pass, so that text with braces in the data is not replaced.
    return MARK + _PLACE.sub(lambda place: parts[place[1]], _asset("page.html"))


def error_page(message: str) -> str:
    """Return a page with the message of an error, which tries again every few seconds."""
    body = f"<title>stbench report</title><h1>stbench report</h1><p>{text(message)}</p>"
    return (
        f'{MARK}<html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="3">{body}</html>\n'
    )


def is_report(path: Path) -> bool:
    """Whether a file begins as a report page does."""
    with path.open("rb") as file:
        return file.read(len(MARK)) == MARK.encode()


def pack(data: object) -> str:
    """Return `data` as compressed JSON in base64, of which no character ends a script element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _joined_scripts() -> str:
    return '"use strict";\n(async () => {\n' + "\n".join(map(_asset, SCRIPTS)) + "\n})();\n"


def _policy(style: str, scripts: Sequence[str], *, live: bool) -> str:
    allowed = " ".join(map(_hash, scripts))
    connect = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; style-src {_hash(style)}; script-src {allowed}; img-src data:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return (files("stbench.report") / "assets" / name).read_text(encoding="utf-8")
