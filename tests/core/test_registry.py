"""Lookup by name, suggestions, and plug-in loading with its error messages."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mmengine.registry import Registry  # noqa: TID251

from stbench.core.errors import UserError
from stbench.core.registry import BACKBONES, RECIPES, load_plugins, lookup, names, plugin_hash, suggest
from stbench.core.renamed import RENAMED, renamed_imports

SUPERVISION = '''
from dataclasses import dataclass
from stbench.core.recipe import Stage, Supervision
from stbench.core.registry import RECIPES

@dataclass
class Nothing(Supervision):
    """No terms."""
    def terms(self, step):
        return {}

@RECIPES.register_module(name="from-a-file")
def from_a_file(info):
    """Nothing."""
    return [Stage("nothing", lambda earlier: Nothing())]
'''


@pytest.fixture()
def plugin(tmp_path: Path) -> Iterator[Path]:
    """A sound plug-in file; what it registers is removed afterwards."""
    file = tmp_path / "mine.py"
    file.write_text(SUPERVISION)
    yield file
    RECIPES.module_dict.pop("from-a-file", None)
    sys.modules.pop(f"stbench_plugin_{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}", None)


def test_names_are_in_order_of_registration() -> None:
    registry = Registry("thing")
    for name in ("b", "a"):
        registry.register_module(name=name, module=type(name, (), {}))
    assert names(registry) == ["b", "a"]


def test_lookup_suggests_the_closest_name() -> None:
    assert lookup(BACKBONES, "sit").__name__ == "SiT"
    with pytest.raises(UserError, match=r"unknown backbone 'sitt'; did you mean 'sit'\?"):
        lookup(BACKBONES, "sitt")


@pytest.mark.parametrize(
    ("name", "known", "prefix", "expected"),
    [
        ("lr_", ["lr", "warmup"], "train.", "; did you mean 'train.lr'?"),
        ("xyz", ["lr", "warmup"], "train.", "; known: train.lr, train.warmup"),
        ("xyz", ["lr", "warmup"], "", "; known: lr, warmup"),
        ("xyz", [], "", "; none is known"),
    ],
)
def test_suggest(name: str, known: list[str], prefix: str, expected: str) -> None:
    assert suggest(name, known, prefix=prefix) == expected


def test_a_plugin_file_registers_under_its_hash(plugin: Path) -> None:
    sha256 = hashlib.sha256(plugin.read_bytes()).hexdigest()
    assert load_plugins([plugin]) == {str(plugin): sha256}
    assert plugin_hash(lookup(RECIPES, "from-a-file")) == sha256
    assert plugin_hash(lookup(RECIPES, "vanilla")) == ""
    # A second command in the same process loads the same file without registering twice.
    assert load_plugins([plugin]) == {str(plugin): sha256}


def test_plugins_of_installed_packages_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "installed_plugin.py"
    module.write_text("def register():\n    pass\n")
    metadata = tmp_path / "installed_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: installed-plugin\nVersion: 1.0\n")
    points = "whole = installed_plugin\nfunction = installed_plugin:register\n"
    (metadata / "entry_points.txt").write_text(f"[stbench.test_plugins]\n{points}")
    sha256 = hashlib.sha256(module.read_bytes()).hexdigest()
    assert load_plugins(group="stbench.test_plugins") == {
        "installed_plugin": sha256,
        "installed_plugin:register": sha256,
    }


def test_a_failed_import_leaves_no_module(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("1 / 0\n")
    before = set(sys.modules)
    with pytest.raises(UserError, match=r"broken\.py failed to import: ZeroDivisionError: division by zero"):
        load_plugins([file])
    assert set(sys.modules) == before


def test_a_missing_file_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not found: .*none\.py; expected a Python file after --plugin"):
        load_plugins([tmp_path / "none.py"])
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match=r"mine\.txt is not a Python file; expected a name that ends in \.py"):
        load_plugins([tmp_path / "mine.txt"])


@pytest.mark.parametrize(
    ("statement", "renamed"),
    [
        (
            "from stbench.contracts import Recipe",
            "stbench.contracts.Recipe is now stbench.core.recipe.Supervision",
        ),
        (
            "from stbench.contracts import Plain",
            "stbench.contracts.Plain is now stbench.core.recipe.NoSupervision",
        ),
        (
            "from stbench.contracts import Method",
            "stbench.contracts.Method is now stbench.core.recipe.Recipe",
        ),
        ("from stbench import layers", "stbench.layers is now stbench.models.layers"),
        ("import stbench.teachers", "stbench.teachers is now stbench.models.encoders"),
        ("from stbench.objectives import LinearFlow", "stbench.objectives is now stbench.diffusion"),
        ("from stbench.data import Dataset", "stbench.data.Dataset is now stbench.data.dataset.Dataset"),
    ],
)
def test_a_plugin_with_an_old_name_is_told_the_new_one(tmp_path: Path, statement: str, renamed: str) -> None:
    file = tmp_path / "old.py"
    file.write_text(f"{statement}\n")
    with pytest.raises(UserError) as caught:
        load_plugins([file])
    assert str(caught.value) == f"plug-in {file} imports old names: {renamed}; rename them and run again"


def test_all_old_names_of_a_plugin_are_listed_at_once(tmp_path: Path) -> None:
    file = tmp_path / "old.py"
    file.write_text("from stbench import align\nfrom stbench.contracts import Stage, Term\n")
    with pytest.raises(UserError, match=r"align is now .*, .*Stage is now .*, .*Term is now .*; rename"):
        load_plugins([file])


def test_an_old_name_in_a_module_of_the_plugin_is_found_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helper_with_old_name.py").write_text("from stbench.registry import RECIPES\n")
    file = tmp_path / "new.py"
    file.write_text("import helper_with_old_name\n")
    with pytest.raises(UserError, match=r"new\.py imports old names: stbench\.registry is now stbench\.core"):
        load_plugins([file])


def test_other_import_errors_are_reported_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("from stbench.core.recipe import Nonsense\n")
    with pytest.raises(UserError, match=r"broken\.py failed to import: ImportError: cannot import name"):
        load_plugins([file])


@pytest.mark.parametrize("new", RENAMED.values())
def test_every_new_name_exists(new: str) -> None:
    module, _, name = new.rpartition(".")
    found = getattr(importlib.import_module(module), name, None)
    assert found is not None or importlib.import_module(new)


@pytest.mark.parametrize("old", RENAMED)
def test_no_old_name_exists(old: str) -> None:
    module, _, name = old.rpartition(".")
    with pytest.raises((ImportError, AttributeError)):
        getattr(importlib.import_module(module), name)


def test_imports_of_new_names_are_not_renamed() -> None:
    assert renamed_imports("import torch\nfrom stbench.core.recipe import Stage\nfrom . import x\n") == {}
