"""Jobs of a sweep for tests. Nothing is trained: their run folders come from tests.fake_runs."""

from __future__ import annotations

from collections.abc import Sequence

from stbench.runs.journal import JournalEntry
from stbench.sweep.executor import Job
from tests import fake_runs


def job(recipe: str, seed: int = 0, stages: Sequence[str] = ()) -> Job:
    """A job that `fake_runs.write_run` can finish. Without `stages` it has one, which no other job shares."""
    spec = fake_runs.make_spec(recipe, seed, fake_runs.STEPS[-1], {})
    entry = JournalEntry(
        run_id=spec["run_id"],
        dataset="digits",
        backbone="sit-ti/2",
        objective="linear",
        recipe=recipe,
        options={},
        seed=seed,
        steps=fake_runs.STEPS[-1],
        setting_hash="1" * 8,
        row_hash="2" * 8,
    )
    return Job(entry, ("run",), tuple(stages) or (f"{recipe}-{seed}-last",))
