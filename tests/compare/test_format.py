"""Numbers with units."""

from __future__ import annotations

import pytest

from stbench.compare.format import count, duration, flop, number, spread
from stbench.compare.stats import seed_stats


@pytest.mark.parametrize(
    ("value", "text"),
    [(800, "800"), (51200, "51.2k"), (102400, "102.4k"), (1_281_167, "1.28M"), (999_990, "1M")],
)
def test_count(value: float, text: str) -> None:
    assert count(value) == text


def test_units() -> None:
    assert [flop(x) for x in (0, 1.234e15, 8e14)] == ["0 FLOP", "1.23 PFLOP", "800 TFLOP"]
    assert [duration(x) for x in (45.2, 300, 10_000)] == ["45.2 s", "5 min", "2.78 h"]
    assert [number(x) for x in (0.01234, 0.5, 12.345, 123.45)] == ["0.0123", "0.500", "12.35", "123.5"]


def test_spread_has_the_decimals_of_the_mean() -> None:
    assert spread(seed_stats([10.0, 20.0])) == "15.00 ± 7.07"
    assert spread(seed_stats([15.0])) == "15.00"
    assert spread(None) == "-"
