"""The `compare` command: what it reads, and where its leaderboard goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from stbench.compare import terminal, writers
from stbench.compare.build import leaderboard
from stbench.compare.leaderboard import Leaderboard
from stbench.compare.published import Figure, read_reported
from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.runs.folder import find_runs, read_runs
from stbench.runs.journal import JOURNAL_FILE, JournalEntry, merge_journals, read_journal


def compare(
    paths: Sequence[Path],
    form: writers.Format | None,
    output: Path | None,
    plot: Path | None,
    published: Path | bool,
) -> None:
    """Print the leaderboard of the runs at `paths`, or write it to `output`; no `form` is the terminal's.

    `published` adds reported numbers: of that file, or with True of the clone's own.
    """
    figures: Sequence[Figure] = ()
    if published:
        figures = read_reported(published if isinstance(published, Path) else None)
    board = read_board(paths)
    text = writers.render(board, form or "md", figures) if form or output else ""
    if plot is not None:
        writers.plot(board, plot)
    if output is not None:
        atomic_write(output, text)
    elif form:
        print(text, end="")
    else:
        terminal.print_leaderboard(board, figures=figures)


def read_board(paths: Iterable[Path]) -> Leaderboard:
    """The leaderboard of run folders, or folders of them with their journals.

    UserError for a path that holds neither, and for a damaged file.
    """
    folders: list[Path] = []
    journals: dict[Path, None] = {}
    for path in paths:
        try:
            found = find_runs(path)
        except UserError:
            if not (path / JOURNAL_FILE).exists():
                raise
            found = []
        folders += found
        journals |= dict.fromkeys([path, *(run.parent for run in found if run != path)])
    entries: list[JournalEntry] = []
    for folder in journals:
        entries = merge_journals(entries, read_journal(folder))
    unique = list({folder.resolve(): folder for folder in folders}.values())
    return leaderboard(read_runs(sorted(unique)), entries)
