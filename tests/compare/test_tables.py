"""The sections of one table as Markdown."""

from __future__ import annotations

from stbench.compare.blocks import View
from stbench.compare.build import build_leaderboard
from stbench.compare.tables import sampling
from stbench.compare.writers import render
from stbench.runs.records import RunRecord
from tests.fake_runs import make_digits_records, make_record, make_seeds


def markdown(records: list[RunRecord]) -> str:
    """Return the leaderboard of these records as Markdown."""
    return render(build_leaderboard(records), "md", view=View(details=True))


def test_both_budgets_are_shown() -> None:
    text = markdown(make_digits_records())
    assert "**Student only (equal last-stage steps): step 800, 51.2k images**" in text
    assert "**Everything paid: 102.4k images of all stages together**" in text
    student, paid = text.split("**Everything paid: 102.4k")
    assert "| vanilla | 0 1 2 | 0.909" in student and "| vanilla | 102.4k | 0.433" in paid


def test_equal_budgets_are_shown_once() -> None:
    text = markdown([make_record("vanilla", 0, [16.0, 4.0, 1.0])])
    assert "no row has an earlier stage, so this is also everything paid" in text
    assert "**Everything paid" not in text and "everything-paid budget" not in text


def test_a_single_seed_has_no_deviation() -> None:
    assert "| vanilla | 0 | 1.000 | 5.000 |" in markdown([make_record("vanilla", 0, [16.0, 4.0, 1.0])])


def test_an_unfinished_seed_is_in_the_row_and_in_a_note() -> None:
    records = [
        make_record("vanilla", 0, [16.0, 4.0, 1.0]),
        make_record("vanilla", 1, [16.0], status="failed"),
    ]
    text = markdown(records)
    assert "| vanilla | 0 (1) |" in text and "- vanilla seed 1: failed at step 200 of 800" in text


def test_a_limit_is_shown_with_the_number_of_seeds_that_reach_the_target() -> None:
    records = make_seeds("vanilla", [1.0, 1.0]) + make_seeds("slow", [0.5, 1.1])
    assert "| slow | > 51.2k (1 of 2 seeds) | - | > 51.2k (1 of 2 seeds) | - |" in markdown(records)


def test_a_bound_is_marked() -> None:
    records = [*make_seeds("vanilla", [1.0]), make_record("fast", 0, [0.5, 0.4, 0.3])]
    assert "| fast | <= 12.8k | >= 4.00x | <= 12.8k | >= 4.00x |" in markdown(records)


def test_the_sampler_is_named_with_its_function_evaluations() -> None:
    assert sampling({"sampler": "ddim", "steps": 20}) == ["ddim sampler with 20 function evaluations"]
    assert sampling({"sampler": "heun", "steps": 10}) == ["heun sampler with 19 function evaluations"]
    assert sampling({}) == sampling({"sampler": "ddim"}) == []


def test_the_function_evaluations_are_those_of_the_samplers() -> None:
    from stbench.diffusion.sample import SAMPLERS, nfe

    for name in SAMPLERS.module_dict:
        text = f"{name} sampler with {nfe(name, 20)} function evaluations"
        assert sampling({"sampler": name, "steps": 20}) == [text]
