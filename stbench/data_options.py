"""`--data` and `--set data.*` as fields: absolute paths, and nothing that only the program may set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stbench.errors import UserError

RESERVED = ("path", "fingerprint")
"""Fields of `DataSpec` that --set may not touch."""


def data_fields(path: str | None, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Fields of a `DataSpec`; None without a path. Raises UserError for options without one."""
    if path is None:
        if options:
            raise UserError(
                f"data.{next(iter(options))} wants --data PATH beside it; add it, or leave both out"
            )
        return None
    for name in RESERVED:
        if name in options:
            raise UserError(f"data.{name} cannot be set; give the path with --data")
    return {"path": _absolute(path), **options, **_vae(options)}


def _vae(options: Mapping[str, Any]) -> dict[str, Any]:
    """A folder that is there by its absolute path; a published name stays, and None means "none"."""
    if "vae" not in options:
        return {}
    vae = options["vae"]
    if vae is None:  # what --set makes of none
        return {"vae": "none"}
    named = isinstance(vae, str) and vae and Path(vae).expanduser().is_dir()
    return {"vae": _absolute(vae)} if named else {}


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())
