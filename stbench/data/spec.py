"""`DataSpec`: which data a run trains on and how they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from stbench.core.errors import UserError
from stbench.core.files import absolute_path
from stbench.core.ranges import Pixels

INCEPTION = "inception-v3-compat"
FDR6 = (INCEPTION, *(f"fdr6/{name}" for name in ("convnext", "dinov2", "mae", "siglip2", "clip")))
"""The six feature extractors of FDr6 (arXiv 2604.28190); see `evaluate.fdr6`."""


def ratio_extractors(given: Iterable[str]) -> list[str]:
    """Return the sorted extractors of FDr, each once, with "fdr6" replaced by the six it stands for."""
    return sorted({name for part in given for name in (FDR6 if part == "fdr6" else (part,))})


"""torch-fidelity's name of its Inception, the default extractor of images from a path."""

PIXELS = "none"
"""The value of `--vae` and `data.vae` for training on pixels, without an autoencoder."""

RESERVED = ("path", "fingerprint", "vae_sha256")
"""Fields of `DataSpec` that `--set` cannot change."""


class SpecModel(BaseModel):
    """Base class of all specifications: immutable; rejects unknown fields, infinities and NaNs."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSpec(SpecModel):
    """Where the data of a run are and how they are read.

    Only `flip` and, for a folder of images, `vae` and `size` affect the trained weights. They enter the
    hashes of a run through the fingerprint of the data set.
    """

    path: str
    """Absolute path of a prepared data set, a folder in REPA's layout, or images."""
    vae: str = ""
    """Autoencoder: a published name, a folder, or "none" for pixels; "" for the one that made the data."""
    size: Pixels | None = None
    """Height and width in pixels to which images are cropped when they are encoded on the fly."""
    flip: bool | None = None
    """Whether images are mirrored at random; None for the setting the data were prepared with."""
    resident: Literal["auto", "yes", "no"] = "auto"
    """Whether all moments are kept in the memory of the device."""
    extractor: str | None = None
    """Default feature extractor of the data set, recorded when the run started; see `EvalSpec`."""
    vae_sha256: str = ""
    """Hash of the autoencoder that decodes, when the run started; "" for pixels, or if it is not known."""
    fingerprint: str = ""
    """Fingerprint of the data set when the run started; "" if it is not known yet."""


def data_fields(path: str | None, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the fields of a `DataSpec` from `--data PATH` and the `data.*` options; None without a path.

    Raises UserError for options without a path and for options that cannot be set.
    """
    if path is None:
        if options:
            raise UserError(f"data.{next(iter(options))} requires --data PATH; add it, or drop the option")
        return None
    if "extractor" in options:
        raise UserError("data.extractor is now eval.extractor; type --set eval.extractor=NAME")
    for name in RESERVED:
        if name in options:
            raise UserError(f"data.{name} cannot be set; give the path with --data")
    return {"path": str(absolute_path(path)), **options, **_vae(options)}


def _vae(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `vae` with an existing folder made absolute and None, which `--set` parses "none" to, undone."""
    if "vae" not in options:
        return {}
    vae = options["vae"]
    if vae is None:
        return {"vae": PIXELS}
    is_folder = isinstance(vae, str) and vae and absolute_path(vae).is_dir()
    return {"vae": str(absolute_path(vae))} if is_folder else {}
