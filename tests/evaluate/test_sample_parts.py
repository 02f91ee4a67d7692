"""Writing sampled images to a folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stbench.core.errors import UserError
from stbench.evaluate.sample_parts import read_settings, write_pictures


def test_a_full_disk_while_writing_pictures_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Image.Image.save

    def full(self: Image.Image, target: Path, *rest: object) -> None:
        save(self, target)
        if target.name.startswith("000002"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="cannot write .*png: No space left on device"):
        write_pictures(tmp_path / "png", 4, [np.zeros((4, 2, 2, 3), np.uint8)], {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "message"), [("{", "contains damaged settings"), ("3", "no settings")])
def test_damaged_settings_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_settings(tmp_path)


def test_images_from_elsewhere_have_no_settings(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.zeros(3))
    assert read_settings(tmp_path) is None and read_settings(tmp_path / "a.npz") is None
