"""Map files: labels by folder or by file name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stbench.core.errors import UserError
from stbench.data.class_map import label_images, read_class_map

IDS = ["class0/a b.jpg", "class0/img10.jpg", "class9/img09.png"]
MAP = {"class0": 0, "class9": 1, "a b.jpg": 1}


def test_folders_in_sorted_order_are_the_classes(tmp_path: Path) -> None:
    assert label_images(IDS, None, tmp_path) == ([0, 0, 1], ["class0", "class9"])


def test_a_file_name_takes_precedence_over_its_folder(tmp_path: Path) -> None:
    labels, classes = label_images(IDS, MAP, tmp_path)
    assert labels == [1, 0, 1]
    assert classes == ["class0", "1"]  # two names share label 1


def test_json_and_lines_give_the_same_map(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps(MAP))
    (tmp_path / "map.txt").write_text("\n\n".join(f"{name}  {label}" for name, label in MAP.items()))
    assert read_class_map(tmp_path / "map.json") == read_class_map(tmp_path / "map.txt") == MAP


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("map.json", "{", "cannot read map file .*expected JSON"),
        ("map.json", "[1]", "cannot read map file .*expected JSON"),
        ("map.txt", "class0 0\nclass1", "no label after 'class1'"),
        (
            "map.json",
            '{"class0": 0, "class1": 2}',
            "0..K-1 without a gap, found 2 labels from 0 to 2",
        ),
    ],
)
def test_a_malformed_map_is_refused_in_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_class_map(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_images_without_a_label_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no label for 'class9/img09.png' or its folder"):
        label_images(IDS, {"class0": 0}, tmp_path)
    with pytest.raises(UserError, match="found 'loose.png' outside of any; give a map file with --classes"):
        label_images([*IDS, "loose.png"], None, tmp_path)
