"""The options of `stbench evaluate` that change the evaluation settings of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stbench.cli import options
from stbench.core.errors import UserError

if TYPE_CHECKING:
    from stbench.config.spec import EvalSpec
    from stbench.evaluate.run_plugins import PluginChoice


@dataclass(frozen=True)
class RunOptions:
    """The options of `stbench evaluate` that apply to a run only."""

    guidance: str | None = None
    samples: int | None = None
    overrides: tuple[str, ...] = ()
    plugins: tuple[Path, ...] = ()
    allow_changed_plugin: bool = False
    inception: Path | None = None
    inception_sha256: str | None = None
    ema_decays: tuple[float, ...] = ()
    guides: tuple[str, ...] = ()
    """One evaluation each; none for the guides of the run."""

    def choice(self) -> PluginChoice:
        """The plug-ins that may be executed."""
        from stbench.evaluate.run_plugins import PluginChoice

        return PluginChoice(self.plugins, self.allow_changed_plugin)


def evaluation_settings(path: Path, run_options: RunOptions) -> list[EvalSpec]:
    """Return a run's evaluation settings with the options applied, validated; once for each --guide."""
    from stbench.config.build import build_objective
    from stbench.config.evaluation import evaluation_spec
    from stbench.config.guides import complete_guides
    from stbench.config.resolve import parse_scales
    from stbench.core.registry import load_builtins
    from stbench.evaluate.past_run import open_run

    load_builtins()
    run = open_run(path, run_options.choice())
    spec = run.prepared.spec
    changes = _evaluation_overrides(run_options)
    if changes.get("extractor", spec.eval.extractor) != spec.eval.extractor:
        changes = {"extractor_file": None, "extractor_sha256": None} | changes  # those of the old extractor
    if run_options.guidance is not None:
        changes["guidance"] = parse_scales(run_options.guidance)
    if run_options.samples is not None:
        changes["samples"] = run_options.samples
    objective = build_objective(spec.objective, spec.objective_options)
    settings = evaluation_spec(spec.eval.model_dump() | changes, objective, spec.train.steps)
    declared = run.last_stage.definition.guides
    texts = run_options.guides or (settings.guides,)
    completed = dict.fromkeys(complete_guides(text, declared) for text in texts)
    return [settings.model_copy(update={"guides": text}) for text in completed]


def _evaluation_overrides(run_options: RunOptions) -> dict[str, Any]:
    """Return the values of --set without their prefix; UserError for anything but evaluation settings."""
    from stbench.config.overrides import parse_set

    settings = parse_set(run_options.overrides)
    settings |= options.inception_settings(run_options.inception, run_options.inception_sha256, settings)
    for name in settings:
        if not name.startswith("eval.") or name == "eval.points":
            raise UserError(
                f"`stbench evaluate` can change eval.* only, except eval.points; found '{name}'; "
                f"for example --set eval.steps=50"
            )
    return {name.removeprefix("eval."): value for name, value in settings.items()}
