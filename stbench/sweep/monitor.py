"""Monitors of a sweep: a live table on a terminal, plain lines elsewhere. Both read the logs of the runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stbench.core.text import visible
from stbench.runs.folder import OutputFolder
from stbench.runs.journal import JournalEntry
from stbench.sweep.executor import last_line
from stbench.sweep.queue import Monitor

STYLES = {"waiting": "dim", "running": "bold", "failed": "red", "finished": "green"}
MAX_ROWS = 12
"""Waiting and finished runs that are shown at once. Running and failed runs are always shown."""


class Stopwatch:
    """Measures how long each run has been running in this sweep."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._took: dict[str, float] = {}

    def update(self, entries: Sequence[JournalEntry]) -> None:
        """Start and stop the times of the runs that changed their state."""
        now = time.monotonic()
        for entry in entries:
            if entry.state == "running":
                self._started.setdefault(entry.run_id, now)
            elif entry.run_id in self._started:
                self._took[entry.run_id] = now - self._started.pop(entry.run_id)

    def elapsed(self, run_id: str) -> str:
        """Time of the current or last attempt, such as "1:15"; "" if the run was not started."""
        took = self._took.get(run_id)
        if run_id in self._started:
            took = time.monotonic() - self._started[run_id]
        return "" if took is None else format_duration(took)


def format_duration(seconds: float) -> str:
    """Format seconds: 75 -> "1:15", 3675 -> "1:01:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe(entry: JournalEntry) -> str:
    """Describe a run by backbone, objective, recipe with its options, and seed."""
    return f"{entry.backbone} {entry.objective} {entry.label} seed {entry.seed}"


def count_states(entries: Sequence[JournalEntry]) -> str:
    """Count runs by state: "2 running, 5 waiting, 1 failed, 3 finished"."""
    states = [entry.state for entry in entries]
    return ", ".join(f"{states.count(name)} {name}" for name in ("running", "waiting", "failed", "finished"))


class LineMonitor(Monitor):
    """Prints one line whenever a run changes its state."""

    def __init__(self, console: Console) -> None:
        self._console, self._stopwatch = console, Stopwatch()
        self._printed: dict[str, str] = {}
        """State of each run that was printed last."""

    def __enter__(self) -> LineMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to release."""

    def update(self, entries: Sequence[JournalEntry], reasons: Mapping[str, str]) -> None:
        """Print what changed since the last call. The first call prints the number of runs by state."""
        self._stopwatch.update(entries)
        if not self._printed:
            self._print(f"sweep of {len(entries)} runs: {count_states(entries)}")
            # The first jobs are already running at the first call; they still get a line each.
            self._printed = {entry.run_id: entry.state for entry in entries if entry.state != "running"}
        for entry in entries:
            if self._printed.get(entry.run_id) != entry.state:
                self._printed[entry.run_id] = entry.state
                took = self._stopwatch.elapsed(entry.run_id) if entry.state != "running" else ""
                parts = [f"{entry.state}: {entry.run_id}", took, entry.error]
                self._print("  ".join(part for part in parts if part))

    def stopping(self, message: str) -> None:
        """Print the message."""
        self._print(message)

    def _print(self, text: str) -> None:
        self._console.print(Text(visible(text)), soft_wrap=True)


class TableMonitor(Monitor):
    """A table that is redrawn at every update."""

    def __init__(self, root: Path, console: Console) -> None:
        self._output, self._stopwatch, self._started = OutputFolder(root), Stopwatch(), time.monotonic()
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> TableMonitor:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last table on the terminal."""
        self._live.__exit__(kind, error, trace)

    def update(self, entries: Sequence[JournalEntry], reasons: Mapping[str, str]) -> None:
        """Redraw the table."""
        self._stopwatch.update(entries)
        self._live.update(self.table(entries, reasons), refresh=True)

    def stopping(self, message: str) -> None:
        """Print the message above the table."""
        self._live.console.print(Text(visible(message)))

    def table(self, entries: Sequence[JournalEntry], reasons: Mapping[str, str]) -> Table:
        """The last finished runs, all failed and running runs, and the next waiting runs."""
        title = f"{count_states(entries)}  {format_duration(time.monotonic() - self._started)}"
        table = Table("state", "run", "elapsed", "details", title=title, expand=True)
        table.columns[1].overflow = "fold"
        for entry in _visible(entries):
            details = Text(visible(self._details(entry, reasons)), overflow="ellipsis", no_wrap=True)
            state = Text(entry.state, STYLES[entry.state])
            table.add_row(
                state, Text(visible(describe(entry))), self._stopwatch.elapsed(entry.run_id), details
            )
        return table

    def _details(self, entry: JournalEntry, reasons: Mapping[str, str]) -> str:
        if entry.state == "running":
            return last_line(self._output.run_log(entry.run_id))
        return entry.error or reasons.get(entry.run_id, "")


def _visible(entries: Sequence[JournalEntry]) -> list[JournalEntry]:
    by_state = {state: [entry for entry in entries if entry.state == state] for state in STYLES}
    waiting, finished = by_state["waiting"], by_state["finished"]
    half = MAX_ROWS // 2
    return [*finished[-half:], *by_state["failed"], *by_state["running"], *waiting[:half]]


def make_monitor(root: Path) -> LineMonitor | TableMonitor:
    """A table if standard error is a terminal, lines otherwise."""
    console = Console(stderr=True)
    return TableMonitor(root, console) if sys.stderr.isatty() else LineMonitor(console)
