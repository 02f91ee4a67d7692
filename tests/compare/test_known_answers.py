"""Statistics on synthetic records whose answers are known: speed-ups, error rates, areas and ranks.

The curves fall as a power of the images. Their log is only approximately linear between evaluations, which
are therefore dense.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from stbench.compare.leaderboard import Row, Table
from stbench.compare.question import Question
from stbench.compare.ranks import mean_ranks
from stbench.compare.stats import curve_mean
from stbench.runs.records import RunRecord
from tests.fake_runs import make_record, make_seeds
from tests.leaderboards import only_table

SLOPE = 0.8
STEPS = tuple(range(100, 1001, 50))
NOISE = 0.05
"""Standard deviation of log FID over seeds."""


def curve(step: int, speed: float, noise: float) -> float:
    return 100 * math.exp(noise) * (step * speed / 10) ** -SLOPE


def runs(
    recipe: str, seeds: Sequence[int], speed: float, draw: random.Random, **more: object
) -> list[RunRecord]:
    """Return runs that learn `speed` times as fast, with one draw of noise per seed."""
    records = []
    for seed in seeds:
        noise = draw.gauss(0, NOISE)
        fids = [curve(step, speed, noise) for step in STEPS]
        records.append(make_record(recipe, seed, fids, steps=STEPS, **more))  # type: ignore[arg-type]
    return records


def row(table: Table, recipe: str) -> Row:
    return next(row for row in table.rows if row.recipe == recipe)


# --- A true speed-up of 2 ---


def test_a_speed_up_of_two_is_found_exactly_without_noise() -> None:
    draw = random.Random(0)
    draw.gauss = lambda mu, sigma: 0.0  # type: ignore[method-assign, assignment]
    table = only_table([*runs("vanilla", range(3), 1.0, draw), *runs("fast", range(3), 2.0, draw)])
    reach = row(table, "fast").student.reach
    assert reach is not None and reach.speedup_student == pytest.approx(2, abs=0.005)
    assert reach.interval_student == pytest.approx((2, 2), abs=0.005)
    assert row(table, "fast").student.plain.ratio == pytest.approx(2**-SLOPE, rel=1e-6)


def test_an_earlier_stage_of_equal_length_halves_it() -> None:
    draw = random.Random(1)
    records = [*runs("vanilla", range(3), 1.0, draw), *runs("taught", range(3), 2.0, draw, teacher=500)]
    reach = row(only_table(records), "taught").student.reach
    assert reach is not None and reach.interval_paid is not None
    assert reach.speedup_paid == pytest.approx(1, rel=0.1)
    assert reach.interval_paid[0] < 1 < reach.interval_paid[1]


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("target", [None, 4.0])
def test_the_interval_contains_a_speed_up_of_two_as_often_as_it_says(
    seeds: int, target: float | None
) -> None:
    """In 95 % of the comparisons, within three standard errors."""
    draw, trials, hits = random.Random(seeds), 250, 0
    estimates = []
    for _ in range(trials):
        records = [*runs("vanilla", range(seeds), 1.0, draw), *runs("fast", range(seeds), 2.0, draw)]
        reach = row(only_table(records, question=Question(target=target)), "fast").student.reach
        assert reach is not None and reach.interval_student is not None and reach.speedup_student is not None
        low, high = reach.interval_student
        hits += low <= 2.0 <= high
        estimates.append(math.log(reach.speedup_student))
    error = math.sqrt(0.95 * 0.05 / trials)
    assert abs(hits / trials - 0.95) < 3 * error
    assert math.exp(sum(estimates) / trials) == pytest.approx(2, rel=0.01)


def test_no_interval_without_enough_seeds_or_beyond_the_curve() -> None:
    draw = random.Random(2)
    two = only_table([*runs("vanilla", range(2), 1.0, draw), *runs("fast", range(2), 2.0, draw)])
    slow = only_table([*runs("vanilla", range(3), 1.0, draw), *runs("slow", range(3), 0.5, draw)])
    bound = only_table([*runs("vanilla", range(3), 1.0, draw), *runs("fast", range(3), 20.0, draw)])
    for table in (two, slow, bound):
        reach = table.rows[1].student.reach
        assert reach is not None and reach.interval_student is None
    assert bound.rows[1].student.reach is not None and bound.rows[1].student.reach.bound


def test_no_interval_after_a_failed_seed() -> None:
    draw = random.Random(3)
    records = [*runs("vanilla", range(3), 1.0, draw), *runs("fast", range(3), 2.0, draw)]
    records.append(make_record("fast", 3, [1.0], steps=STEPS, status="failed"))
    reach = row(only_table(records), "fast").student.reach
    assert reach is not None and reach.speedup_student is not None and reach.interval_student is None


# --- Equal recipes ---


@pytest.mark.parametrize("seeds", [3, 5])
def test_equal_recipes_are_called_different_no_more_often_than_stated(seeds: int) -> None:
    """5 % of the comparisons of one recipe and of the tables of four, within three standard errors."""
    draw, trials = random.Random(seeds), 1000
    one = family = 0
    for _ in range(trials):
        records = [
            make_record(recipe, seed, [math.exp(draw.gauss(0, NOISE))], steps=(800,))
            for recipe in ("vanilla", "a", "b", "c", "d")
            for seed in range(seeds)
        ]
        single = only_table([record for record in records if record.recipe in ("vanilla", "a")])
        one += row(single, "a").student.plain.verdict in ("better", "worse")
        verdicts = {row.student.plain.verdict for row in only_table(records).rows}
        family += bool(verdicts & {"better", "worse"})
    error = math.sqrt(0.95 * 0.05 / trials)
    assert abs(one / trials - 0.05) < 3 * error
    assert family / trials < 0.05 + 3 * error


def test_a_large_difference_is_found_with_five_seeds() -> None:
    draw, found = random.Random(7), 0
    for _ in range(100):
        records = [*runs("vanilla", range(5), 1.0, draw), *runs("fast", range(5), 1.5, draw)]
        found += row(only_table(records), "fast").student.plain.verdict == "better"
    assert found > 95


# --- Area under the curve ---


def test_the_area_of_an_exponential_is_its_value_in_the_middle() -> None:
    """The log of exp(-x) is linear, so its mean over an interval is that of the middle."""
    images = [0, 100, 250, 400]
    values = [math.exp(-x / 100) for x in images]
    assert curve_mean(images, values, 100, 400) == pytest.approx(math.exp(-2.5))
    assert curve_mean(images, values, 50, 350) == pytest.approx(math.exp(-2.0))  # ends between evaluations
    assert curve_mean(images, values, 0, 500) is None and curve_mean(images, values, 100, 100) is None


def test_the_area_covers_what_all_rows_were_evaluated_at() -> None:
    records = make_seeds("vanilla", [1.0] * 3)
    records += [make_record("late", seed, [4.0, 1.0], steps=(400, 800)) for seed in range(3)]
    table = only_table(records)
    assert table.area_start == 400 * 64
    for found in table.rows:
        assert found.area is not None and found.area.values == pytest.approx((2.0,) * 3)


def test_a_diverged_seed_has_no_area() -> None:
    records = make_seeds("vanilla", [1.0, math.nan])
    area = only_table(records).rows[0].area
    assert area is not None and math.isnan(area.mean)


# --- Mean ranks ---


def test_mean_ranks_by_hand() -> None:
    """Ranks 2, 1, 3 and, with a tie, 1.5, 3, 1.5; `extra` is missing in the second table."""
    first = make_seeds("vanilla", [1.0] * 3) + make_seeds("a", [0.5] * 3) + make_seeds("b", [2.0] * 3)
    first += make_seeds("extra", [0.1] * 3)
    second = make_seeds("vanilla", [1.0] * 3) + make_seeds("a", [3.0] * 3) + make_seeds("b", [1.0] * 3)
    ranks = mean_ranks([only_table(first), only_table(second)], Question())
    assert {rank.recipe: rank.student for rank in ranks} == {"vanilla": 1.75, "a": 2.0, "b": 2.25}
    assert all(rank.tables == 2 and rank.guided is None for rank in ranks)
    assert mean_ranks([only_table(first)], Question()) == ()
