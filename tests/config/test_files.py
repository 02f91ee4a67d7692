"""Config files: data is data, `_base_` stays in its folder, and a Python file runs only when it is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stbench.config.files import read_file
from stbench.config.overrides import read_config
from stbench.core.errors import UserError


def write(folder: Path, **files: str) -> Path:
    """Write files such as a__yaml="..." and return the first one."""
    for name, content in files.items():
        file = folder / name.replace("__", ".").replace("_in_", "/")
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(content)
    return folder / next(iter(files)).replace("__", ".").replace("_in_", "/")


def failure(file: Path) -> str:
    with pytest.raises(UserError) as error:
        read_file(file, "config", "--config")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_config_extends_other_files(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        run__yaml="_base_: [bases/net.yaml, train.json]\nrecipe: repa\n"
        "set: {train.lr: 2e-3, eval: {steps: 4}}",
        bases_in_net__yaml="_base_: deeper/data.yml\nbackbone: sit\nset: {backbone.depth: 3}",
        bases_in_deeper_in_data__yml="dataset: digits",
        train__json='{"recipe": "vanilla", "steps": 7}',
    )
    assert read_config(file) == {
        "dataset": "digits",
        "backbone": "sit",
        "recipe": "repa",
        "steps": 7,
        "set": {"backbone.depth": 3, "train.lr": 0.002, "eval.steps": 4},
    }


@pytest.mark.parametrize(
    ("base", "child", "merged"),
    [
        ("set: {train.lr: 1, train.batch: 2}", "set: {train: {lr: 3}}", {"train.batch": 2, "train.lr": 3}),
        ("set: {train: {lr: 1, batch: 2}}", "set: {train.lr: 3}", {"train.batch": 2, "train.lr": 3}),
        ("set: {train: {lr: 1, batch: 2}}", "set: {train: {_delete_: true, lr: 3}}", {"train.lr": 3}),
        ("set: {train.lr: 1}", "set: {_delete_: true}", {}),
        ("set: {train.betas: [1, 2]}", "set: {train.betas: [3]}", {"train.betas": [3]}),
        ("set: {train.clip: 1}", "set: {train.clip: null}", {"train.clip": None}),
        ("recipe: vanilla", "set: {train: {_delete_: true, lr: 3}}", {"train.lr": 3}),
    ],
)
def test_mappings_are_merged_and_values_replaced(
    tmp_path: Path, base: str, child: str, merged: dict[str, Any]
) -> None:
    file = write(tmp_path, child__yaml=f"_base_: base.yaml\n{child}", base__yaml=base)
    assert read_config(file)["set"] == merged


def test_a_base_is_a_data_file_in_the_folder_of_the_config(tmp_path: Path) -> None:
    secret = write(tmp_path, secret__yaml="recipe: secret", run__py="raise SystemExit")
    inside = tmp_path / "inside"
    write(inside, link__yaml="")
    (inside / "link.yaml").unlink()
    (inside / "link.yaml").symlink_to(secret)
    (inside / "loop.yaml").symlink_to(inside / "loop.yaml")
    write(inside, run__py="raise SystemExit", note__txt="recipe: vanilla")
    wrong = {
        "../secret.yaml": "is outside of",
        str(secret): "is outside of",
        "link.yaml": "is outside of",
        "loop.yaml": "is not a file",
        "none.yaml": "is not a file",
        "": "must be a file name",
        ".": "is not a file",
        "run.py": "expected a name that ends in .yaml, .yml, .json",
        "note.txt": "expected a name that ends in .yaml",
        "mmengine::x.yaml": "is not a file",
    }
    for base, message in wrong.items():
        file = write(inside, child__yaml=f"_base_: '{base}'")
        assert message in failure(file) and "secret:" not in failure(file), base
    for value in ("5", "[5]", "{a: b}", "null"):
        assert "'_base_' must be a file name or a list" in failure(
            write(inside, child__yaml=f"_base_: {value}")
        )


def test_a_config_that_is_a_symbolic_link_extends_files_beside_the_link(tmp_path: Path) -> None:
    real = write(tmp_path / "real", run__yaml="_base_: base.yaml\nrecipe: vanilla")
    write(tmp_path / "own", base__yaml="backbone: sit")
    link = tmp_path / "own" / "run.yaml"
    link.symlink_to(real)
    assert read_config(link)["backbone"] == "sit"


def test_a_cycle_of_bases_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, a__yaml="_base_: b.yaml", b__yaml="_base_: [c.yaml]", c__yaml="_base_: ./b.yaml")
    assert "'_base_' is a cycle: b.yaml -> c.yaml -> b.yaml; remove one of them" in failure(file)
    assert "a cycle: d.yaml -> d.yaml" in failure(write(tmp_path, d__yaml="_base_: d.yaml"))


def test_the_number_of_bases_is_limited(tmp_path: Path) -> None:
    for level in range(30):
        write(tmp_path, **{f"level{level}__yaml": f"_base_: [level{level + 1}.yaml, level{level + 1}.yaml]"})
    write(tmp_path, level30__yaml="{}")
    assert "can be merged from at most 32 files" in failure(tmp_path / "level0.yaml")


def test_two_bases_or_two_spellings_with_one_option_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, a__yaml="_base_: [b.yaml, c.yaml]", b__yaml="recipe: x", c__yaml="recipe: y")
    assert "two files of '_base_' contain the key 'recipe'" in failure(file)
    file = write(tmp_path, a__yaml="set: {train.lr: 1, train: {lr: 2}}")
    assert "option 'train.lr' is given twice" in failure(file)
    file = write(tmp_path, a__yaml="_base_: b.yaml\nset: {train.lr: 1}", b__yaml="set: 5")
    assert "'set' is a mapping here and 5 in the file of '_base_'; add '_delete_: true'" in failure(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.yaml", "", "the file is empty; expected options such as 'recipe: vanilla'"),
        ("run.yaml", "# nothing", "the file is empty"),
        ("run.yaml", "- sit", "expected a mapping of options, found a list"),
        ("run.yaml", "text", "expected a mapping of options, found 'text'"),
        ("run.json", "", "line 1, column 1: expecting value"),
        ("run.json", "null", "the file is empty"),
        ("run.json", "[1]", "found a list"),
        ("run.json", '{"set": {"' + "a." * 5000 + 'b": 1}}', "unknown option 'a.a.a"),
        ("run.toml", "", "expected a name that ends in .yaml, .yml, .json"),
        ("run", "", "expected a name that ends in"),
        ("run.yaml", "x" * 300_000, "expected at most 262144 bytes, found 300000"),
        ("run.py", "1 / 0", "ZeroDivisionError: division by zero"),
        ("run.py", "raise SystemExit('out')", "SystemExit: out"),
        ("run.py", "recipe = object()", "'recipe' must be plain data, got object"),
        ("run.py", "recipe = []\nrecipe.append(recipe)", "RecursionError"),
        ("run.py", "(", "SyntaxError"),
    ],
)
def test_a_malformed_file_is_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    assert message in failure(file) and str(file) in failure(file)


def test_a_yaml_file_executes_nothing_and_reads_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "hunter2")
    for content in (
        "recipe: !!python/object/apply:os.mkdir [hacked]",
        "recipe: !!python/object/new:os.mkdir [hacked]",
        "recipe: !!python/module:antigravity",
    ):
        assert "is not supported" in failure(write(tmp_path, run__yaml=content))
    file = write(tmp_path, run__yaml="recipe: '{{$SECRET:x}}'\ncustom_imports: {imports: [antigravity]}")
    with pytest.raises(UserError, match="unknown option 'custom_imports'") as error:
        read_config(file)
    assert "hunter2" not in str(error.value)
    assert read_file(file, "config", "--config")["recipe"] == "{{$SECRET:x}}"
    assert not (tmp_path / "hacked").exists()


def test_a_python_file_that_is_named_runs_but_the_yaml_that_it_extends_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "hunter2")
    file = write(
        tmp_path,
        run__py="_base_ = 'base.yaml'\nsteps = 2 + 3\nset = dict(train=dict(betas=(0.9, 0.95)))",
        base__yaml="recipe: vanilla",
    )
    assert read_config(file) == {"recipe": "vanilla", "steps": 5, "set": {"train.betas": [0.9, 0.95]}}
    write(tmp_path, base__yaml="recipe: !!python/object/apply:os.mkdir [hacked]")
    assert "is not supported" in failure(file) and not (tmp_path / "hacked").exists()
    file = write(tmp_path, run__py="recipe = '{{$SECRET:x}}'\n")
    assert read_config(file)["recipe"] == "{{$SECRET:x}}"
