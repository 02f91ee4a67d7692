"""The environment of a run: versions, hardware and git revision."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from stbench.runs.records import Environment

PACKAGES = (
    "stbench",
    "torch",
    "torchvision",
    "timm",
    "diffusers",
    "mmengine",
    "torch-fidelity",
    "numpy",
    "scipy",
)


def environment(device: torch.device, plugins: Mapping[str, str], ranks: int = 1) -> Environment:
    """Describe this machine, the number of ranks, the installed versions and the git revision."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    revision = _git("rev-parse", "HEAD")
    return Environment(
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        device=device.type if ranks > 1 else str(device),
        hardware=f"{hardware}, {torch.get_num_threads()} threads" + (f", {ranks} ranks" if ranks > 1 else ""),
        git_revision=revision,
        git_dirty=bool(revision and _git("status", "--porcelain", "--untracked-files=no")),
        plugins=plugins,
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
