"""The services that a run can be tracked with, each through its backend of mmengine's Visualizer.

The backends differ in what mmengine leaves to the caller: W&B ignores steps and has no notion of resuming,
and MLflow restricts names and never changes a parameter. Credentials are those that the service's own client
finds; nothing is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.core.text import visible
from stbench.runs.folder import RunFolder

RUN_ID = "run-id"
"""File with the name that the service knows the run by, so that a resumed run continues there."""
OFFLINE = ("offline", "disabled", "dryrun")
"""Values of WANDB_MODE for which no login is needed."""


class Service(ABC):
    """A tracking service for one run."""

    package: str
    """What has to be installed."""
    backend: str
    """Class of mmengine."""
    requirement: str
    """What pip takes to install it: an extra of stbench, or the package if stbench depends on it."""

    def __init__(self, folder: RunFolder, stages: tuple[str, ...], config: Mapping[str, Any]) -> None:
        """`stages` are the names of the stages, and `config` the flat settings of the run."""
        self.folder, self.stages, self.config = folder, stages, config

    def require(self) -> None:
        """Raise UserError if the package or the login is missing."""
        if importlib.util.find_spec(self.package) is None:
            raise UserError(
                f"--track {self.package} requires the package {self.package}, which is not installed; "
                f"type `pip install {self.requirement}`"
            )

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Arguments of the backend."""

    def begin(self, visualizer: Any) -> str:
        """Start or resume tracking and record the settings; returns where the result can be looked at."""
        visualizer.add_config(Config(self.config))
        return ""

    def scalars(self, stage: str, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Values by the name that the service accepts."""
        return {visible(f"{stage}/{name}"): value for name, value in values.items()}

    def image(self, stage: str, step: int, guidance: str) -> str:
        """Name of a picture of samples with guidance such as "g1.5"."""
        return f"{stage}/samples/{guidance}"

    def run_id(self) -> str:
        """The stored name of the run; "" if it was not tracked before."""
        file = self.path / RUN_ID
        return file.read_text().strip() if file.is_file() else ""

    def store_run_id(self, name: str) -> None:
        """Store the name of the run."""
        self.path.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path / RUN_ID, f"{name}\n")

    @property
    def path(self) -> Path:
        """Local files of the service."""
        return self.folder.tracking(self.package)


class Config:
    """Settings in the form that mmengine's backends read."""

    work_dir = ""
    """Folder whose files MLflow would upload."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by dotted name."""
        return self._values

    @property
    def pretty_text(self) -> str:
        """One setting per line, indented, which Markdown shows as it is."""
        return "\n".join(f"    {name} = {visible(str(value))}" for name, value in self._values.items())


class TensorBoard(Service):
    """Event files in the run folder."""

    package, backend, requirement = "tensorboard", "TensorboardVisBackend", "tensorboard"

    def options(self) -> dict[str, Any]:
        """The folder of the event files."""
        return {"save_dir": str(self.path / "vis_data")}

    def begin(self, visualizer: Any) -> str:
        """Record the settings."""
        super().begin(visualizer)
        return f"tensorboard --logdir {self.path}"


class WandB(Service):
    """Weights & Biases: a run of the project WANDB_PROJECT, by default "stbench"."""

    package, backend, requirement = "wandb", "WandbVisBackend", "'stbench[wandb]'"

    def require(self) -> None:
        """Raise UserError if wandb is missing, or if it has no API key and is not offline."""
        super().require()
        if os.environ.get("WANDB_MODE", "") in OFFLINE:
            return
        try:
            login = importlib.import_module("wandb").login
            # Earlier versions of wandb cannot check without a prompt; there, wandb.init asks or fails.
            found = "prompt" not in signature(login).parameters or login(prompt=False, verify=False)
        except Exception as error:  # such as a setting that wandb does not know
            raise UserError(
                f"--track wandb cannot check the login: {reason(error)}; correct the settings of wandb, or "
                f"drop --track wandb"
            ) from error
        if not found:
            raise UserError(
                "--track wandb found no API key; type `wandb login`, or set WANDB_MODE=offline and upload "
                "later with `wandb sync`"
            )

    def options(self) -> dict[str, Any]:
        """Arguments of wandb.init, and the x axis of every stage."""
        if not self.run_id():
            self.store_run_id(secrets.token_hex(4))
        settings = {"console": "off", "silent": True, "save_code": False}
        arguments = {
            "project": os.environ.get("WANDB_PROJECT", "stbench"),
            "name": self.folder.path.name,
            "id": self.run_id(),
            "resume": "allow",
            # Here, because the backend's add_config also uploads the Python files of the current directory.
            "config": dict(self.config),
            "allow_val_change": True,
            "settings": settings,
        }
        axes = [{"name": f"{stage}/*", "step_metric": f"{stage}/step"} for stage in self.stages]
        # wandb makes a folder "wandb" in this one.
        return {"save_dir": str(self.path.parent), "init_kwargs": arguments, "define_metric_cfg": axes}

    def begin(self, visualizer: Any) -> str:
        """Start or resume the run."""
        run = visualizer.get_backend(self.backend).experiment.run
        return f"wandb sync {Path(run.dir).parent}" if run.offline else str(run.url)

    def scalars(self, stage: str, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """The values and the step, because the backend passes no step on."""
        return super().scalars(stage, step, {"step": step, **values})


class MLflow(Service):
    """A run at MLFLOW_TRACKING_URI, by default in a database in the run folder."""

    package, backend, requirement = "mlflow", "MLflowVisBackend", "'stbench[mlflow]'"

    def options(self) -> dict[str, Any]:
        """Where the run is kept."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "stbench")
        # No file of the work_dir is uploaded.
        common = {"save_dir": str(self.path), "exp_name": name, "artifact_suffix": ()}
        if uri := os.environ.get("MLFLOW_TRACKING_URI"):
            return common | {"tracking_uri": uri}
        artifacts = (self.path / "artifacts").resolve()
        return common | {"tracking_uri": self._database, "artifact_location": artifacts.as_uri()}

    @property
    def _database(self) -> str:
        return f"sqlite:///{(self.path / 'mlflow.db').resolve()}"

    def begin(self, visualizer: Any) -> str:
        """Start or resume the run; only parameters that it lacks are recorded."""
        from mmengine.logging import MMLogger

        importlib.import_module("mlflow")  # sets the levels of its loggers
        self.path.mkdir(parents=True, exist_ok=True)
        with _quiet(MMLogger.get_current_instance(), *map(logging.getLogger, ("mlflow", "alembic"))):
            mlflow = visualizer.get_backend(self.backend).experiment
            stored = self.run_id()
            run = mlflow.start_run(run_id=stored or None, run_name=None if stored else self.folder.path.name)
        self.store_run_id(run.info.run_id)
        known = run.data.params
        config = {mlflow_name(name): str(value)[:500] for name, value in self.config.items()}
        missing = Config({name: value for name, value in config.items() if name not in known})
        # The backend searches this folder for files to upload when it closes.
        missing.work_dir = str(self.path)
        visualizer.add_config(missing)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or self._database
        return f"mlflow ui --backend-store-uri {uri}"

    def scalars(self, stage: str, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Values by names of letters, digits, spaces and - _ . : / only."""
        return {mlflow_name(f"{stage}/{name}"): value for name, value in values.items()}

    def image(self, stage: str, step: int, guidance: str) -> str:
        """Path of the picture among the artifacts."""
        return f"samples/{stage}-{step:08d}-{guidance}.png"


SERVICES: Mapping[str, type[Service]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
"""The services by the word of --track."""


def reason(error: Exception) -> str:
    """An error of a service in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def mlflow_name(name: str) -> str:
    """A name with every character that MLflow refuses replaced by an underscore."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


@contextmanager
def _quiet(*loggers: logging.Logger) -> Iterator[None]:
    """Suppress what these loggers say about the set-up of a service."""
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
