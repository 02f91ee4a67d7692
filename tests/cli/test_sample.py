"""`stbench sample` on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Command

MISTAKES = {
    "nothing": ((), "expected a run folder or --checkpoint FILE, found neither"),
    "both": (("nowhere", "--checkpoint", "x.pt"), "found both"),
    "original of a run": (("nowhere", "--original", "repa"), "apply to --checkpoint"),
    "objective of a run": (("nowhere", "--objective", "linear"), "apply to --checkpoint"),
    "weights": (("--checkpoint", "x.pt", "--weights", "mean"), "--weights must be ema or raw, found 'mean'"),
    "suffix": (("nowhere", "--output", "x.png"), "must be a folder or a file that ends in .npz"),
    "twice": (("nowhere", "--output", "x", "--output", "./x"), "give each output a path of its own"),
    "no decoder": (("--checkpoint", "x.pt"), "official weights need a decoder: add --vae"),
    "guidance": (("nowhere", "--cfg", "0.5"), "Invalid value for '--cfg'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(
    stbench: Command, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[name]
    code, _, err = stbench("sample", *arguments, "--device", "cpu")
    assert code == 2 and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_guidance_has_two_names(trained_run: Path, stbench: Command, tmp_path: Path) -> None:
    common = ("sample", trained_run, "-n", 5, "--device", "cpu", "--interval", 0, 0.7, "--steps", 2)
    images = []
    for option in ("--cfg", "--guidance"):
        file = tmp_path / f"{option}.npz"
        code, out, err = stbench(*common, option, 1.8, "--output", file)
        assert code == 0 and f"5 images: {file}" in out, err
        images.append(np.load(file)["arr_0"])
    assert np.array_equal(*images)
