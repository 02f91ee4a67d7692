"""Where a run was made, and what the hardware can do: devices, precisions, versions, git state."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from stbench.errors import UserError
from stbench.records import Environment

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


def pick_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:N" as a device that is there; else a UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device '{name}'; expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{name}' is not supported; expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UserError(f"device '{name}' is not here: {count} CUDA device(s) found; try --device cpu")
    return device


def pick_devices(names: str) -> list[torch.device]:
    """One device or several: "cuda:0,cuda:1", "all" for every CUDA device, "cpu,cpu" for two processes.

    Raises UserError for one that is not there and for a mixture of kinds.
    """
    if names == "all":
        names = ",".join(f"cuda:{index}" for index in range(torch.cuda.device_count())) or "cuda:0"
    devices = [pick_device(name.strip()) for name in names.split(",")]
    if len({device.type for device in devices}) > 1:
        raise UserError(f"expected devices of one kind, found {names}; a CPU and a GPU draw other pixels")
    return devices


def default_precision(device: torch.device) -> str:
    """bf16 on a GPU that multiplies it natively, else fp32.

    On a CPU always fp32: with the same avx512_bf16 flag bf16 steps took 0.6 times as long as fp32 on one
    processor and 1.45 times on another, and runs of two precisions cannot stand in one table.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "bf16"
    return "fp32"


def environment(device: torch.device, plugins: Mapping[str, str]) -> Environment:
    """This machine, these versions, this revision."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    revision = _git("rev-parse", "HEAD")
    return Environment(
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        device=str(device),
        hardware=f"{hardware}, {torch.get_num_threads()} threads",
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
