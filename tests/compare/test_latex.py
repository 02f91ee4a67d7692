"""The LaTeX output compiles, with booktabs alone, and shows text as it is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from stbench.cli.compare import read_leaderboard
from stbench.compare.blocks import View
from stbench.compare.build import build_leaderboard
from stbench.compare.leaderboard import Leaderboard
from stbench.compare.published import read_published
from stbench.compare.writers import render
from tests.fake_runs import make_digits_records, make_entry, make_record

ROOT = Path(__file__).parents[2]
HOSTILE = "a_b & c% #1 $x^2$ ~ \\input{x} {y} [z] *w* <v> 'u' `t` \"s\" | é"


def missing() -> str:
    """Say what is missing to compile; "" if nothing is."""
    if not (shutil.which("pdflatex") and shutil.which("kpsewhich")):
        return "pdflatex is not installed (Debian: texlive-latex-base)"
    found = subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True)
    return "" if found.stdout.strip() else "booktabs is not installed (Debian: texlive-latex-recommended)"


def hostile() -> Leaderboard:
    records = [make_record(HOSTILE, seed, [16.0, 4.0, 1.0], options={"x": HOSTILE}) for seed in range(3)]
    records += [make_record("vanilla", 0, [16.0, 4.0, 2.0], changes={"dataset": HOSTILE})]
    return build_leaderboard(records, [make_entry(HOSTILE)])


@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize("details", [False, True], ids=["compact", "details"])
def test_latex_compiles(tmp_path: Path, details: bool) -> None:
    boards = [
        read_leaderboard([ROOT / "results/digits/runs"]),
        build_leaderboard(make_digits_records()),
        hostile(),
    ]
    published = read_published(ROOT / "results/reported.csv")
    names = []
    for i, board in enumerate(boards):
        text = render(board, "tex", published if i == 0 else (), View(details=details))
        (tmp_path / f"table{i}.tex").write_text(text)
        names.append(f"\\input{{table{i}}}")
    document = [
        "\\documentclass{article}",
        "\\usepackage{booktabs}",
        "\\begin{document}",
        *names,
        "\\end{document}",
    ]
    (tmp_path / "paper.tex").write_text("\n".join(document))
    command = ["pdflatex", "-no-shell-escape", "-halt-on-error", "-interaction=nonstopmode", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").stat().st_size > 10_000
