"""The options of a finished or started run, to train it again with another seed, recipe or length."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from stbench.runs.folder import RunFolder

DATA_OPTIONS = ("vae", "size", "flip", "resident")
"""Fields of `data` in spec.json that `--set data.*` takes."""


def options_of_run(folder: Path, typed: Collection[str] = ()) -> dict[str, Any]:
    """Return the options of `stbench run` that make the run in `folder`, in the form of a config file.

    Args:
        folder: A run folder.
        typed: Options that the command line replaces. What belongs to the replaced ones is left out: the
            options of the recipe or the backbone, and the evaluation points of another length.

    Raises:
        UserError: The folder is damaged.
    """
    spec = RunFolder(folder).record().spec
    backbone, recipe, train, evaluation = spec["backbone"], spec["recipe"], spec["train"], spec["eval"]
    values = {
        "backbone": f"{backbone['name']}-{backbone['size']}",
        "recipe": recipe["name"],
        "dataset": spec["dataset"],
        "objective": spec["objective"],
        "steps": train["steps"],
        "seed": spec["seed"],
        "precision": train["precision"],
    }
    # Earlier versions computed teachers in fp32. With another precision of the student, theirs follows it.
    train = {"teacher_precision": "fp32", **train}
    follows = ("teacher_precision",) if "precision" in typed else ()
    settings = _section("train", train, without=("steps", "precision", *follows))
    unset = [name for name, value in evaluation.items() if value in (None, "") and name != "channels"]
    unset += ["guides"] if "recipe" in typed else []  # the names of guides belong to the recipe
    settings |= _section("eval", evaluation, without=("guidance", *unset))
    if "guidance" in evaluation:
        values["eval_guidance"] = evaluation["guidance"]
    if "backbone" not in typed:
        settings |= _section("backbone", backbone["options"])
    if "objective" not in typed:
        settings |= _section("objective", spec.get("objective_options", {}))
    if "recipe" not in typed:
        settings |= _section("recipe", recipe["options"])
    if "steps" in typed:
        settings = {name: v for name, v in settings.items() if name not in ("eval.points", "eval.extras")}
    if data := spec.get("data"):
        values["data"] = data["path"]
        settings |= _section("data", {name: data[name] for name in DATA_OPTIONS if data.get(name)})
    if init := spec.get("init"):
        values |= {"init_from": init["file"], "init_weights": init["weights"]}
        values |= {"original": init["original"]} if init.get("original") else {}
    return {**values, "set": settings}


def _section(name: str, fields: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
    return {f"{name}.{key}": value for key, value in fields.items() if key not in without}
