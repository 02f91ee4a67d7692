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
    from stbench.compare.question import Question
    from stbench.compare.select import Where
    from stbench.runs.journal import JournalEntry
    from stbench.runs.records import RunRecord


class Format(str, Enum):
    """Output formats; `table` is the terminal's."""

    table = "table"
    md = "md"
    csv = "csv"
    json = "json"
    tex = "tex"


class Group(str, Enum):
    """Choices of --group-by."""

    setting = "setting"
    recipe = "recipe"
    backbone = "backbone"
    dataset = "dataset"
    objective = "objective"


class Sort(str, Enum):
    """Choices of --sort."""

    recipe = "recipe"
    metric = "metric"
    inception = "is"
    guided = "guided"
    ratio = "ratio"
    speedup = "speed-up"
    paid = "paid"
    cost = "cost"


def compare(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run folders, or directories of them; default: results/runs.")
    ] = None,
    details: Annotated[
        bool, typer.Option("--details", help="Print every number: hashes, costs, tests, curves and notes.")
    ] = False,
    where: Annotated[
        list[str],
        typer.Option(
            help="Rows to show, as FIELD=PATTERN: recipe=sra,repa, backbone=sit*, train.lr=1e-3; repeatable. "
            "Tests and budgets stay those of all rows."
        ),
    ] = [],  # noqa: B006
    group_by: Annotated[
        Group, typer.Option(help="What the rows of a compact table have in common.")
    ] = Group.setting,
    sort: Annotated[
        Sort | None,
        typer.Option(help="Order of the rows, best first; default: the baseline, then by the metric."),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="Metric to compare: fid, is, kid, or another one of the runs.")
    ] = "fid",
    baseline: Annotated[
        str, typer.Option(help="Row to compare with: a recipe, or a row's full name.")
    ] = "vanilla",
    at: Annotated[
        str | None,
        typer.Option(
            help="Training of the last stage at which rows are compared: images such as 51.2k, hours such "
            "as 2.5h, or FLOPs such as 3EFLOP; default: the last evaluation that they share."
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="Value of the metric to which speed-ups are measured; default: the baseline's at the budget."
        ),
    ] = "baseline",
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Say in which fields two runs differ, and whether they share a table."
        ),
    ] = False,
    format: Annotated[Format, typer.Option(help="Output format.")] = Format.table,
    output: Annotated[Path | None, typer.Option(help="File to write instead of printing.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Image file for plots against training images, such as curves.png; more than two tables "
            "continue in curves-2.png."
        ),
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
    from stbench.compare.blocks import View
    from stbench.compare.plot import is_plot, plot_curves, plot_paths
    from stbench.compare.published import read_published
    from stbench.compare.question import Question, parse_amount, parse_target
    from stbench.compare.select import parse_where
    from stbench.compare.terminal import print_leaderboard
    from stbench.compare.writers import is_leaderboard, render
    from stbench.core.files import atomic_write
    from stbench.core.outputs import Output

    paths = runs or [RUNS]
    if explain:
        _explain(paths, output or plot)
        return
    remedy = "choose another path, or leave the option out"
    outputs = [
        Output(path, option, is_own=is_own, remedy=remedy)
        for path, option, is_own in ((output, "--output", is_leaderboard), (plot, "--plot", is_plot))
        if path is not None
    ]
    require_outputs(outputs, [reported_file])
    _require_printed(format, details=details, group_by=group_by)
    question = Question(metric, baseline, parse_amount(at) if at else None, parse_target(target))
    conditions = parse_where(where)

    # Read and render everything before anything is written
    published: Sequence[PublishedValue] = ()
    if reported or reported_file:
        published = read_published(reported_file)
    leaderboard = _selected(read_leaderboard(paths, question), conditions, sort, question)
    view = View(details, group_by.value, sort.value if sort else None, question)
    text = ""
    if format is not Format.table:
        text = render(leaderboard, format.value, published, view)
    elif output is not None:
        text = render(leaderboard, "md", published, view)  # the terminal's tables, as a file
    if plot is not None:
        files = plot_paths(leaderboard, plot)
        more = [Output(path, "--plot", is_own=is_plot, remedy=remedy) for path in files[1:]]
        require_outputs([*outputs, *more], [reported_file])

    if plot is not None:
        plot_curves(leaderboard, plot)
    if output is not None:
        atomic_write(output, text)
    elif format is Format.table:
        print_leaderboard(leaderboard, published=published, view=view)
    else:
        print(text, end="")


def _require_printed(format: Format, *, details: bool, group_by: Group) -> None:
    """Raise UserError if --group-by was given for an output without compact tables."""
    if group_by is Group.setting:
        return
    if details or format in (Format.csv, Format.json):
        what = "--details" if details else f"--format {format.value}"
        raise UserError(f"--group-by applies to compact tables, not to {what}; leave one of them out")


def _selected(leaderboard: Leaderboard, where: Where, sort: Sort | None, question: Question) -> Leaderboard:
    """Return the rows that are shown, in their order."""
    from stbench.compare.select import require_baseline, select_rows, sort_rows

    require_baseline(leaderboard, question)
    leaderboard = select_rows(leaderboard, where)
    return sort_rows(leaderboard, sort.value, question) if sort else leaderboard


def _explain(paths: Sequence[Path], output: Path | None) -> None:
    """Print how two runs differ."""
    from stbench.compare.difference import explain_runs
    from stbench.compare.terminal import print_section
    from stbench.core.text import print_line
    from stbench.runs.folder import RunFolder

    if len(paths) != 2:
        raise UserError(f"--explain takes two run folders, found {len(paths)}; try --explain RUN_A RUN_B")
    if output is not None:
        raise UserError("--explain only prints; leave --output and --plot out")
    explained = explain_runs(*(RunFolder(path).record() for path in paths))
    print_line(explained.verdict)
    if explained.section.rows:
        print_section(explained.section)


def read_leaderboard(paths: Iterable[Path], question: Question | None = None) -> Leaderboard:
    """Build the leaderboard of run folders, or of directories of run folders with their journals.

    Without a `question`, it is the default one.

    Raises:
        UserError: A path contains neither runs nor a journal, or a file is damaged.
    """
    from stbench.compare.build import build_leaderboard
    from stbench.compare.question import QUESTION

    return build_leaderboard(*read_records(paths), question or QUESTION)


def read_records(paths: Iterable[Path]) -> tuple[list[RunRecord], list[JournalEntry]]:
    """Read run folders, or directories of run folders with their journals.

    Raises:
        UserError: A path contains neither runs nor a journal, or a file is damaged.
    """
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
    return read_runs(sorted(unique)), entries
