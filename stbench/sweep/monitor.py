"""What a person sees of a sweep: a live table on a terminal, plain lines elsewhere. Reads the runs' logs."""

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

from stbench.runs.journal import JournalEntry
from stbench.sweep.executor import last_line, log_file
from stbench.sweep.queue import Monitor

STYLES = {"waiting": "dim", "running": "bold", "failed": "red", "finished": "green"}
STOPPING = "stopping: the runs save and end; Ctrl-C again kills them"
ROWS = 12
"""Waiting and ended runs listed at once; running and failed ones always are."""


class Clock:
    """Since when each run is seen running, and for how long it was."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._took: dict[str, float] = {}

    def look(self, entries: Sequence[JournalEntry]) -> None:
        """Note who runs now."""
        now = time.monotonic()
        for entry in entries:
            if entry.state == "running":
                self._started.setdefault(entry.run_id, now)
            elif entry.run_id in self._started:
                self._took[entry.run_id] = now - self._started.pop(entry.run_id)

    def elapsed(self, run_id: str) -> str:
        """Minutes and seconds of its present or last try; "" if there was none in this sweep."""
        took = self._took.get(run_id)
        if run_id in self._started:
            took = time.monotonic() - self._started[run_id]
        return "" if took is None else duration(took)


def duration(seconds: float) -> str:
    """75 -> "1:15", 3675 -> "1:01:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def described(entry: JournalEntry) -> str:
    """What a run is, in words: backbone, objective, recipe with its options, seed."""
    return f"{entry.backbone} {entry.objective} {entry.label} seed {entry.seed}"


def counts(entries: Sequence[JournalEntry]) -> str:
    """ "2 running, 5 waiting, 1 failed, 3 finished"."""
    states = [entry.state for entry in entries]
    return ", ".join(f"{states.count(name)} {name}" for name in ("running", "waiting", "failed", "finished"))


class Lines(Monitor):
    """One line when a run changes its state."""

    def __init__(self, console: Console) -> None:
        self._console, self._clock = console, Clock()
        self._seen: dict[str, str] = {}

    def update(self, entries: Sequence[JournalEntry], reasons: Mapping[str, str]) -> None:
        """Print what changed since the last look; the first look says how many are finished already."""
        self._clock.look(entries)
        if not self._seen:
            self._print(f"sweep of {len(entries)} runs: {counts(entries)}")
            self._seen = {e.run_id: e.state for e in entries if e.state != "running"}
        for entry in entries:
            if self._seen.get(entry.run_id) != entry.state:
                self._seen[entry.run_id] = entry.state
                took = self._clock.elapsed(entry.run_id) if entry.state != "running" else ""
                words = [f"{entry.state}: {entry.run_id}", took, entry.error]
                self._print("  ".join(word for word in words if word))

    def stopping(self) -> None:
        """Say that it takes a moment."""
        self._print(STOPPING)

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to give back."""


class LiveTable(Monitor):
    """A table that is drawn again at every look."""

    def __init__(self, root: Path, console: Console) -> None:
        self._root, self._clock, self._began = root, Clock(), time.monotonic()
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> LiveTable:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last table on the terminal."""
        self._live.__exit__(kind, error, trace)

    def update(self, entries: Sequence[JournalEntry], reasons: Mapping[str, str]) -> None:
        """Draw."""
        self._clock.look(entries)
        self._live.update(self.table(entries, reasons), refresh=True)

    def stopping(self) -> None:
        """Say so above the table."""
        self._live.console.print(STOPPING)

    def table(self, entries: Sequence[JournalEntry], reasons: Mapping[str, str]) -> Table:
        """Running and failed runs, then the next ones that wait and the last ones that finished."""
        title = f"{counts(entries)}  {duration(time.monotonic() - self._began)}"
        table = Table("state", "run", "elapsed", "what", title=title, expand=True)
        table.columns[1].overflow = "fold"
        for entry in _chosen(entries):
            what = Text(self._what(entry, reasons), overflow="ellipsis", no_wrap=True)
            state = Text(entry.state, STYLES[entry.state])
            table.add_row(state, Text(described(entry)), self._clock.elapsed(entry.run_id), what)
        return table

    def _what(self, entry: JournalEntry, reasons: Mapping[str, str]) -> str:
        if entry.state == "running":
            return last_line(log_file(self._root, entry.run_id))
        return entry.error or reasons.get(entry.run_id, "")


def _chosen(entries: Sequence[JournalEntry]) -> list[JournalEntry]:
    by_state = {state: [e for e in entries if e.state == state] for state in STYLES}
    waiting, finished = by_state["waiting"], by_state["finished"]
    return [*finished[-ROWS // 2 :], *by_state["failed"], *by_state["running"], *waiting[: ROWS // 2]]


def monitor_of(root: Path) -> Lines | LiveTable:
    """A table on a terminal, lines elsewhere; both on standard error."""
    console = Console(stderr=True)
    return LiveTable(root, console) if sys.stderr.isatty() else Lines(console)
