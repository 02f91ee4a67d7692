"""The command that makes a table comparable: a missing baseline, or missing seeds."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from stbench.compare.leaderboard import Table
from stbench.compare.question import BASELINE
from stbench.compare.targets import MIN_SEEDS


def next_step(table: Table) -> str:
    """Return the command that makes a table comparable; "" if it has a baseline and enough seeds."""
    if not table.rows:
        return ""
    baseline = next((row for row in table.rows if row.student.plain.verdict == "baseline"), None)
    if baseline is None and any(row.recipe == table.baseline for row in table.rows):
        return f"no value of {table.baseline} there; next: choose another --at, or train with more --steps"
    if baseline is None and table.baseline != BASELINE:
        return ""  # its options are not known
    if baseline is None and not any(row.recipe == BASELINE for row in table.absent):
        seeds = sorted({*range(MIN_SEEDS), *(seed for row in table.rows for seed in row.seeds)})
        command = _run([table.rows[0].paths[0]], seeds, f" --recipe {BASELINE}")
        return f"no {BASELINE} run to compare with; next: {command}"

    # A test needs pairs: the seeds of the baseline, if it has enough of them
    enough = baseline is not None and len(baseline.seeds) >= MIN_SEEDS
    wanted = set(baseline.seeds) if baseline is not None and enough else set(range(MIN_SEEDS))
    short = []
    for row in table.rows:
        counted = wanted & set(row.seeds) if enough else row.seeds
        if len(counted) < MIN_SEEDS and not row.unfinished and row.curve:  # not of another network's guidance
            short.append(row)
    if not short:
        return ""
    missing = sorted({seed for row in short for seed in wanted if seed not in row.seeds})
    command = _run([row.paths[0] for row in short], missing)
    return f"fewer than {MIN_SEEDS} common seeds, so no verdict; next: {command}"


def _run(configs: Sequence[str], seeds: Sequence[int], more: str = "") -> str:
    """Return a command for a shell that runs the settings of run folders at other seeds."""
    config = shlex.quote(configs[0]) if len(configs) == 1 else '"$r"'
    command = f"stbench run --config {config}{more} --seed $s"
    folder = configs[0].rpartition("/")[0]
    if folder and folder != "results/runs":
        command += f" --output {shlex.quote(folder)}"
    command = f"for s in {' '.join(map(str, seeds))}; do {command}; done"
    if len(configs) > 1:
        command = f"for r in {' '.join(map(shlex.quote, configs))}; do {command}; done"
    return command
