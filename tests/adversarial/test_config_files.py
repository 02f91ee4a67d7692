"""Hostile config and suite files through the command line: exit code 2, one line, nothing executed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adversarial.test_bad_inputs import one_line
from tests.conftest import Command
from tests.core.test_safe_load import MALFORMED_JSON, MALFORMED_YAML

pytestmark = pytest.mark.slow

COMMANDS = {
    "config": ("run", "--backbone", "sit", "--recipe", "vanilla", "--device", "cpu", "--dry-run", "--config"),
    "suite": ("sweep", "--device", "cpu", "--dry-run", "--suite"),
}
CONTENTS: dict[str, str | bytes] = {
    **{f"{name}.yaml": text for name, (text, _) in MALFORMED_YAML.items()},
    **{f"{name}.json": text for name, (text, _) in MALFORMED_JSON.items()},
    "nothing.yaml": "",
    "comment.yaml": "# nothing",
    "list.yaml": "[1, 2]",
    "text.yaml": "text",
    "null.json": "null",
    "number.json": "5",
    "unknown.yaml": "steps: 5\nstpes: 6",
    "imports.yaml": "custom_imports: {imports: [antigravity]}",
    "environment.yaml": "precision: '{{$HOME:x}}'\ngroups: '{{$HOME:x}}'",
    "outside.yaml": "_base_: ../outside.yaml",
    "absolute.yaml": "_base_: /etc/passwd",
    "itself.yaml": "_base_: itself.yaml",
    "python.yaml": "_base_: code.py",
    "scope.yaml": "_base_: 'mmengine::default.py'",
    "base number.yaml": "_base_: 7",
    "suffix.toml": "steps = 5",
    "object.py": "import os\nraise ValueError('odd')",
}
TYPES = (
    *("null", "true", "-1", "1.5", ".inf", "''", "[]", "{}", "[[[]]]"),
    *("{a: {b: 1}}", "2001-01-01", "'\\e[31m'"),
)
PLACES = ("set: VALUE", "set: {train.lr: VALUE}", "set: {train: VALUE}", "set: {eval.points: VALUE}")
SUITE = (
    "groups: VALUE",
    "groups: [VALUE]",
    "groups: [{runs: VALUE}]",
    "groups: [{runs: [VALUE]}]",
    "groups: [{with: VALUE, runs: [{backbone: sit, recipe: x}]}]",
    "defaults: VALUE\ngroups: [{runs: [{backbone: sit, recipe: x}]}]",
    "groups: [{runs: [{backbone: VALUE, recipe: vanilla}]}]",
    "groups: [{runs: [{backbone: sit, recipe: VALUE}]}]",
    "groups: [{runs: [{backbone: sit, recipe: x, seeds: VALUE}]}]",
)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", CONTENTS)
def test_a_hostile_file_is_one_line(
    stbench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    (tmp_path / "outside.yaml").write_text("recipe: secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "code.py").write_text("import os\nos.mkdir('hacked')")
    content = CONTENTS[name]
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    line = one_line(*stbench(*COMMANDS[command], folder / name))
    assert "secret:" not in line and "/root" not in line
    assert {file.name for file in folder.iterdir()} == {"code.py", name}


@pytest.mark.parametrize("value", TYPES)
@pytest.mark.parametrize("place", SUITE)
def test_a_value_of_another_type_in_a_suite_is_one_line(
    stbench: Command, tmp_path: Path, place: str, value: str
) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(place.replace("VALUE", value))
    one_line(*stbench(*COMMANDS["suite"], file))


@pytest.mark.parametrize("value", TYPES)
@pytest.mark.parametrize("place", PLACES)
def test_a_value_of_another_type_in_a_config_is_accepted_or_one_line(
    stbench: Command, tmp_path: Path, place: str, value: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(place.replace("VALUE", value))
    one_line(*stbench(*COMMANDS["config"], file), allowed=(0, 2))
