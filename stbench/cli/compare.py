"""`stbench compare`: read runs and journals, print or write their leaderboard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stbench.cli.options import RUNS
from stbench.core.errors import UserError
from stbench.core.files import absolute_path

if TYPE_CHECKING:
    from stbench.compare.leaderboard import Leaderboard
    from stbench.compare.published import PublishedValue
    from stbench.runs.journal import JournalEntry


class Format(str, Enum):
    """Output formats; `table` is the terminal's."""

    table = "table"
    md = "md"
    csv = "csv"
    json = "json"
    tex = "tex"


def compare(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders, or directories of them.")] = None,
    format: Annotated[Format, typer.Option(help="Output format.")] = Format.table,
    output: Annotated[Path | None, typer.Option(help="File to write instead of printing.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Image file for a plot of FID against training images, such as curves.png."),
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
    """Compare finished runs: one table per setting and evaluation protocol."""
    from stbench.cli.outputs import require_outputs
    from stbench.compare.plot import is_plot, plot_curves
    from stbench.compare.published import read_published
    from stbench.compare.terminal import print_leaderboard
    from stbench.compare.writers import is_leaderboard, render
    from stbench.core.files import atomic_write
    from stbench.core.outputs import Output

    remedy = "choose another path, or leave the option out"
    outputs = [
        Output(path, option, is_own=is_own, remedy=remedy)
        for path, option, is_own in ((output, "--output", is_leaderboard), (plot, "--plot", is_plot))
        if path is not None
    ]
    require_outputs(outputs, [reported_file])

    # Read and render everything before anything is written
    published: Sequence[PublishedValue] = ()
    if reported or reported_file:
        published = read_published(reported_file)
    leaderboard = read_leaderboard(runs or [RUNS])
    text = ""
    if format is not Format.table:
        text = render(leaderboard, format.value, published)
    elif output is not None:
        text = render(leaderboard, "md", published)  # the terminal's table as a file is Markdown

    if plot is not None:
        plot_curves(leaderboard, plot)
    if output is not None:
        atomic_write(output, text)
    elif format is Format.table:
        print_leaderboard(leaderboard, published=published)
    else:
        print(text, end="")


def read_leaderboard(paths: Iterable[Path]) -> Leaderboard:
    """Build the leaderboard of run folders, or of directories of run folders with their journals.

    Raises:
        UserError: A path contains neither runs nor a journal, or a file is damaged.
    """
    from stbench.compare.build import build_leaderboard
    from stbench.runs.folder import find_runs, read_runs
    from stbench.runs.journal import JOURNAL_FILE, merge_journals, read_journal

    # Run folders, and the directories that may have a journal
    folders: list[Path] = []
    journals: dict[Path, None] = {}
    for path in paths:
        try:
            found = find_runs(path)
        except UserError:
            if not (path / JOURNAL_FILE).exists():
                raise
            found = []  # a sweep whose runs have not started yet
        folders += found
        # A run that is named by its own folder does not bring the journal of its siblings.
        journals |= dict.fromkeys([path, *(run.parent for run in found if run != path)])

    entries: list[JournalEntry] = []
    for folder in journals:
        entries = merge_journals(entries, read_journal(folder))
    unique = list({absolute_path(folder): folder for folder in folders}.values())
    return build_leaderboard(read_runs(sorted(unique)), entries)
