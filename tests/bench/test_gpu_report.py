"""scripts/gpu_report.sh, with tiny networks on the CPU: every step ends well, and a cut leaves a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def report(folder: Path, seconds: int) -> str:
    settings = {"PYTHON": sys.executable, "REPORT_SECONDS": str(seconds), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [ROOT / "scripts" / "gpu_report.sh", "--tiny", folder],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return (folder / "README.md").read_text()


def test_the_report_has_tests_timings_and_the_digits(tmp_path: Path) -> None:
    text = report(tmp_path / "report", 270)
    for name in ("tests", "digits", "sit-vanilla", "sit-sra"):
        assert f"- {name}: done, " in text, text
    assert "| sit vanilla, batch 8, fp32 |" in text and "| sit sra, batch 8, fp32 |" in text
    assert "needs a GPU" in text and "Curve of digits-sit-custom-vanilla" in text
    (row,) = json.loads((tmp_path / "report" / "sit-vanilla.json").read_text())["results"]
    assert row["ratio_to_plain"] > 0.0


def test_a_report_without_time_says_what_it_lacks(tmp_path: Path) -> None:
    text = report(tmp_path / "report", 1)
    assert text.count("skipped: out of time") == 4 and "- sit-sra: skipped" in text
