"""`DataSpec`: where the data of a run lie and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from stbench.core.errors import UserError

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


class SpecModel(BaseModel):
    """Base of all specifications: immutable, no unknown fields, no infinities or NaNs."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSpec(SpecModel):
    """Where the data of a run lie and how they are read. Of these only `flip` and, for a folder of images,
    `vae` and `size` change a weight, and they do so through the data set's fingerprint.
    """

    path: str
    """Absolute: a prepared data set, REPA's layout, or images."""
    vae: str = ""
    """Autoencoder by published name or folder, "none" for pixels; "" for the one the data were made with."""
    size: int | None = Field(default=None, gt=0)
    """Pixels to crop images to that are encoded on the fly."""
    flip: bool | None = None
    """Whether images are mirrored at random; None for what the data were prepared with."""
    resident: Literal["auto", "yes", "no"] = "auto"
    """Whether all moments are kept on the device."""
    extractor: str | None = None
    """torch-fidelity extractor of the evaluation; None for the data set's own."""
    fingerprint: str = ""
    """Of the data set when the run began; "" for not yet known."""
