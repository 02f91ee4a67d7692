"""The `compare` command: reads runs and journals, prints or writes their leaderboard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from stbench.compare.build import build_leaderboard
from stbench.compare.leaderboard import Leaderboard
from stbench.compare.published import PublishedValue, read_published
from stbench.compare.terminal import print_leaderboard
from stbench.compare.writers import Format, render
from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.runs.folder import find_runs, read_runs
from stbench.runs.journal import JOURNAL_FILE, JournalEntry, merge_journals, read_journal


def compare(
    paths: Sequence[Path],
    *,
    form: Format | None = None,
    output: Path | None = None,
    plot: Path | None = None,
    reported: bool = False,
    reported_file: Path | None = None,
) -> None:
    """Print the leaderboard of the runs in `paths`, or write it to a file.

    Args:
        paths: Run folders, or directories of run folders and journals.
        form: Output format; None selects the terminal's table, or Markdown if there is an `output`.
        output: File to write instead of printing.
        plot: File for a plot of the learning curves.
        reported: Add the published values of results/reported.csv.
        reported_file: Read the published values from this file; implies `reported`.

    Raises:
        UserError: A path contains neither runs nor a journal, or a file is damaged.
    """
    # Read everything before anything is written
    published: Sequence[PublishedValue] = ()
    if reported or reported_file:
        published = read_published(reported_file)
    leaderboard = read_leaderboard(paths)
    text = render(leaderboard, form or "md", published) if form or output else ""

    if plot is not None:
        from stbench.compare.plot import plot_curves  # loads matplotlib

        plot_curves(leaderboard, plot)
    if output is not None:
        atomic_write(output, text)
    elif form:
        print(text, end="")
    else:
        print_leaderboard(leaderboard, published=published)


def read_leaderboard(paths: Iterable[Path]) -> Leaderboard:
    """Build the leaderboard of run folders, or directories of run folders with their journals.

    Raises:
        UserError: A path contains neither runs nor a journal, or a file is damaged.
    """
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
    unique = list({folder.resolve(): folder for folder in folders}.values())
    return build_leaderboard(read_runs(sorted(unique)), entries)
