"""Jobs of a sweep for tests, whose run folders `fake_runs.write_run` can write. Nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence

from stbench.sweep.executor import Job
from tests.fake_runs import make_entry


def job(recipe: str, seed: int = 0, stages: Sequence[str] = ()) -> Job:
    """A job with these stage fingerprints; without `stages` it has one, which no other job shares."""
    return Job(make_entry(recipe, seed), ("run",), tuple(stages) or (f"{recipe}-{seed}-last",))
