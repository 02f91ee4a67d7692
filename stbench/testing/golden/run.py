"""The golden runner: compares stbench with numbers that the published implementations produced.

A golden file is NAME.safetensors (tensors; weights under `sd/`, with official key names) with its sidecar
NAME.json (settings, and the shapes of the tensors).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from stbench.core.errors import UserError

# Imported by `run`, so that their checkers are registered
CHECK_MODULES = (
    "backbones",
    "self_transcendence",
    "baseline_losses",
    "samplers",
    "guides",
    "tread",
    "self_flow",
    "haste",
    "deep_supervision",
    "recent_losses",
    "reg",
)


@dataclass(frozen=True)
class Check:
    """The result of one comparison."""

    name: str
    error: float
    tolerance: float
    reason: str = ""
    """Why it failed, if the error alone does not tell."""

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Golden:
    """One golden file; the sidecar and the tensors are read on first use."""

    folder: Path
    name: str

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The sidecar NAME.json."""
        return json.loads((self.folder / f"{self.name}.json").read_text())

    @cached_property
    def t(self) -> dict[str, Tensor]:
        """All tensors of NAME.safetensors, including weights and heads."""
        return load_file(self.folder / f"{self.name}.safetensors")

    def other(self, name: str) -> Golden:
        """Another golden file in the same folder."""
        return Golden(self.folder, name)

    def weights(self) -> Golden:
        """The golden file with the weights for this one: the first word of `weights_from`, or itself."""
        named = self.meta.get("weights_from")
        return self.other(named.split()[0]) if named else self

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix`, such as "sd/" or "head/", with the prefix removed from their names."""
        return {key[len(prefix) :]: value for key, value in self.t.items() if key.startswith(prefix)}

    def compare(self, name: str, actual: Tensor, expected: Tensor, tol: float) -> Check:
        """Compare by the error max|a-b| / max(1, max|b|); different shapes and NaN fail."""
        if actual.shape != expected.shape:
            reason = f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
            return Check(name, float("inf"), tol, reason)
        a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
        if b.numel() == 0:
            return Check(name, 0.0, tol)
        return Check(name, ((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item(), tol)


Checker = Callable[[Golden], Iterable[Check]]
_checkers: dict[str, Checker] = {}


def check(prefix: str) -> Callable[[Checker], Checker]:
    """Register a checker for the files whose name starts with `prefix`; the longest prefix wins."""

    def register(checker: Checker) -> Checker:
        _checkers[prefix] = checker
        return checker

    return register


def checker_for(name: str) -> Checker | None:
    """The checker for a file name without suffix, or None."""
    matching = [prefix for prefix in _checkers if name.startswith(prefix)]
    return _checkers[max(matching, key=len)] if matching else None


def _content(golden: Golden) -> Check:
    """Check that every tensor listed in the sidecar is in the file, with its shape."""
    listed = {key: entry["shape"] for key, entry in golden.meta.get("tensors", {}).items()}
    state = golden.meta.get("state_dict", {})
    listed |= {state["prefix"] + key: shape for key, shape in state.get("entries", {}).items()}
    wrong = [k for k, shape in listed.items() if k not in golden.t or list(golden.t[k].shape) != list(shape)]
    return Check(
        "content", float(len(wrong)), 0.0, f"missing or of another shape: {', '.join(wrong)}" if wrong else ""
    )


def checks_of(golden: Golden, checker: Checker) -> Iterator[Check]:
    """Yield all checks of one file; an exception becomes a failed check."""
    try:
        yield _content(golden)
        yield from checker(golden)
    except Exception as error:  # a corrupt file can raise anything, and the other files must still be checked
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        yield Check("crashed", float("nan"), 0.0, reason)


def _line(file: str, item: Check) -> str:
    label = f"{file} {item.name}"
    numbers = f"error {item.error:.1e}  tolerance {item.tolerance:.1e}  {'ok' if item.ok else 'FAIL'}"
    return f"{label:<64} {numbers}{'  ' + item.reason if item.reason else ''}"


def run(folder: Path, out: Callable[[str], None] = print) -> int:
    """Check every golden file in `folder`; prints one line per check and the total.

    Returns 1 if a check failed, else 0. Files without a checker are listed at the end; they do not count.
    Raises UserError if there are no golden files.
    """
    for module in CHECK_MODULES:
        importlib.import_module(f"stbench.testing.golden.{module}")
    names = sorted({f.stem for f in folder.glob("*") if f.suffix in (".json", ".safetensors")})
    if not names:
        raise UserError(f"no golden files in {folder}; expected a folder of NAME.safetensors with NAME.json")
    passed = failed = 0
    unknown = [f.name for f in sorted(folder.glob("*")) if f.stem not in names and f.name != "README.md"]
    for name in names:
        checker = checker_for(name)
        if checker is None:
            unknown.append(name)
            continue
        for item in checks_of(Golden(folder, name), checker):
            out(_line(name, item))
            passed, failed = passed + item.ok, failed + (not item.ok)
    if unknown:
        out(f"no check for: {', '.join(unknown)}")
    out(f"{passed + failed} checks: {passed} ok, {failed} failed, {len(unknown)} files not checked")
    return 1 if failed else 0
