"""`stbench report`: write or serve the comparison as an HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stbench.cli.options import RUNS
from stbench.core.errors import UserError

if TYPE_CHECKING:
    from stbench.compare.published import PublishedValue
    from stbench.compare.question import Question
    from stbench.compare.select import Where

REPORT = Path("report.html")
"""Default output."""
PORT = 8765
"""Default port of --serve."""


def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run folders, or directories of them; default: results/runs.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file to write; default: report.html.")
    ] = None,
    serve: Annotated[
        bool,
        typer.Option(
            "--serve", help="Serve the page on this machine instead, and reload it when the runs change."
        ),
    ] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of --serve; 0 chooses a free one.")
    ] = PORT,
    host: Annotated[
        str,
        typer.Option(help="Address of --serve. With another one than 127.0.0.1, other machines can read it."),
    ] = "127.0.0.1",
    where: Annotated[
        list[str], typer.Option(help="Rows to show, as FIELD=PATTERN; see `stbench compare --help`.")
    ] = [],  # noqa: B006
    metric: Annotated[
        str, typer.Option(help="Metric of the leaderboard: fid, is, kid, or another one of the runs.")
    ] = "fid",
    baseline: Annotated[
        str, typer.Option(help="Row to compare with: a recipe, or a row's full name.")
    ] = "vanilla",
    at: Annotated[
        str | None,
        typer.Option(help="Training of the last stage at which rows are compared: 51.2k, 2.5h or 3EFLOP."),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="Value of the metric to which speed-ups are measured; default: the baseline's at the budget."
        ),
    ] = "baseline",
    samples: Annotated[
        bool,
        typer.Option(
            "--samples/--no-samples", help="Embed pictures: samples of the rows, and maps of --inspection."
        ),
    ] = True,
    inspection: Annotated[
        Path | None,
        typer.Option(help="Show what `stbench inspect` wrote: its output folder, or inspect.json."),
    ] = None,
    reported: Annotated[
        bool, typer.Option("--reported", help="Add published values in a separate section.")
    ] = False,
    reported_file: Annotated[
        Path | None,
        typer.Option(
            help="CSV file of published values, instead of results/reported.csv; implies --reported."
        ),
    ] = None,
) -> None:
    """Write the leaderboard, curves, samples and runs as one HTML page that needs no network."""
    from stbench.cli.outputs import require_outputs
    from stbench.compare.published import read_published
    from stbench.compare.question import Question, parse_amount, parse_target
    from stbench.compare.select import parse_where
    from stbench.core.files import atomic_write
    from stbench.core.outputs import Output
    from stbench.core.text import print_line
    from stbench.report.features import inspection_file
    from stbench.report.page import is_report

    inspection = inspection_file(inspection) if inspection else None
    if serve and output is not None:
        raise UserError("--serve writes no file; leave out --output or --serve")
    if not serve:
        page = Output(output or REPORT, is_own=is_report, remedy="choose another --output")
        require_outputs([page], [reported_file, inspection])
    published = read_published(reported_file) if reported or reported_file else ()
    paths = runs or [RUNS]
    question = Question(metric, baseline, parse_amount(at) if at else None, parse_target(target))
    render = _renderer(paths, question, parse_where(where), published, samples, inspection)
    if serve:
        _serve([*paths, *([inspection] if inspection else [])], render, host, port)
        return
    atomic_write(page.path, render(""))
    print_line(f"wrote {page.path}; open it in a browser")


def _renderer(
    paths: Sequence[Path],
    question: Question,
    where: Where,
    published: Sequence[PublishedValue],
    pictures: bool,
    inspection: Path | None,
) -> Callable[[str], str]:
    """Return a function that reads the runs and renders the page; its argument is `live` of render_page."""
    from stbench.cli.compare import read_records
    from stbench.compare.build import build_leaderboard
    from stbench.compare.select import require_baseline, select_rows
    from stbench.report.page import render_page

    def render(live: str) -> str:
        records, entries = read_records(paths)
        leaderboard = build_leaderboard(records, entries, question)
        require_baseline(leaderboard, question)
        leaderboard = select_rows(leaderboard, where)
        if where:
            shown = {path for table in leaderboard.tables for row in table.rows for path in row.paths}
            records = [record for record in records if record.path in shown]
        return render_page(
            leaderboard, records, published, pictures=pictures, inspection=inspection, live=live
        )

    return render


def _serve(paths: Sequence[Path], render: Callable[[str], str], host: str, port: int) -> None:
    from stbench.core.text import print_line
    from stbench.report.serve import ReportServer, is_loopback

    render("")  # report mistakes before the server starts
    with ReportServer(paths, render, host, port) as server:
        if not is_loopback(host):
            print_line(f"anyone who can reach port {server.server_port} of this machine can read the page")
        print_line(f"serving {server.url}; stop with Ctrl-C")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print_line("stopped")
