"""An encoder's tokens of the training images of a prepared data set, which keeps latents and no images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stbench.core.errors import UserError
from stbench.core.files import require_free_space
from stbench.data.crop import UNREADABLE, decode_image, reason
from stbench.data.prepare import Advance
from stbench.data.repa_layout import Repa, is_repa
from stbench.data.shards import HELDOUT, REFERENCE, Manifest, open_array, read_manifest
from stbench.data.sources import open_source
from stbench.models import encoders as teachers


@dataclass(frozen=True)
class TokenOptions:
    """The arguments of `stbench data tokens`."""

    source: Path
    """The images that the set was made from, or the folder in REPA's layout that was imported."""
    prepared: Path
    target: Path
    encoder: str
    checkpoint: Path | None = None
    patch: int = 2
    classes: Path | None = None
    batch: int = 64
    device: torch.device = torch.device("cpu")


@dataclass(frozen=True)
class TokenTask:
    """The training rows of a set, in order, and how to see them."""

    ids: list[str]
    picture: Callable[[str], np.ndarray]
    """The image (c,S,S) of a name in the source."""
    kept: dict[str, np.ndarray]
    """Pixels that the set holds, by name: references."""
    encoder: teachers.ImageEncoder


def open_task(job: TokenOptions) -> TokenTask:
    """Find images and encoder. Raises UserError for whatever does not fit, before anything is written."""
    if (job.target / "tokens.json").exists():
        raise UserError(f"{job.target} holds tokens already; delete it, or give another folder")
    manifest = read_manifest(job.prepared)
    side = manifest.shape[-1]
    if side % job.patch:
        raise UserError(f"--patch wants a divisor of {side}, the latents' side, got {job.patch}; 2 is usual")
    encoder = teachers.open_encoder(
        teachers.find_encoder(job.encoder, job.checkpoint), (side // job.patch) ** 2, job.device
    )
    if not isinstance(encoder, teachers.ImageEncoder):
        raise UserError(f"--encoder wants a timm model or digits, got the cached tokens of {job.encoder}")
    names, kept = _rows(manifest, job.prepared)
    return TokenTask(names, _pictures(job, manifest, names), kept, encoder)


def cache(job: TokenOptions, listed: TokenTask, advance: Advance) -> teachers.EncoderSpec:
    """Write the tokens. Raises UserError for an image that is not the one the set was made from."""
    job.target.mkdir(parents=True, exist_ok=True)
    patches = listed.encoder.network.patch_embed.num_patches
    require_free_space(job.target, len(listed.ids) * patches * listed.encoder.spec.width * 2)
    return teachers.cache_tokens(job.target, listed.encoder, _batches(job, listed, advance), len(listed.ids))


def _rows(manifest: Manifest, folder: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Names of the training rows in order, and the pixels of those that are references."""
    names: list[str] = []
    kept: dict[str, np.ndarray] = {}
    for shard in manifest.shards:
        ids, split, images = (
            open_array(manifest, folder, shard, name) for name in ("ids", "split", "images")
        )
        known = [bytes(name).decode(errors="surrogateescape") for name in ids]
        names += [name for name, part in zip(known, split, strict=True) if part != HELDOUT]
        pictured = np.flatnonzero(split)
        kept |= {known[r]: images[k] for k, r in enumerate(pictured) if split[r] == REFERENCE}
    return names, kept


def _pictures(job: TokenOptions, manifest: Manifest, names: list[str]) -> Callable[[str], np.ndarray]:
    """Reads an image as the set was made of it. Raises UserError if the source lacks a row's image."""
    channels, size = manifest.image_shape[:2]
    if is_repa(job.source):
        layout = Repa(job.source)
        place = {name: number for number, name in enumerate(layout.ids)}
        _require_all(place, names, job)
        return lambda name: layout.pictures([place[name]], manifest.image_shape)[0]
    source = open_source(job.source, job.classes)
    place = {name: number for number, name in enumerate(source.ids)}
    _require_all(place, names, job)

    def picture(name: str) -> np.ndarray:
        try:
            return decode_image(source.content(place[name]), channels, size)
        except UNREADABLE as error:
            raise UserError(
                f"image '{name}' cannot be read any more ({reason(error)}); restore it"
            ) from error

    return picture


def _require_all(place: dict[str, int], names: list[str], job: TokenOptions) -> None:
    if missing := [name for name in names if name not in place]:
        raise UserError(
            f"expected the images that {job.prepared} was made from in {job.source}, found no '{missing[0]}' "
            f"({len(missing)} of {len(names)} are missing); give the source it was made from"
        )


def _batches(job: TokenOptions, listed: TokenTask, advance: Advance) -> Iterator[Tensor]:
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(listed.ids), job.batch):
            names = listed.ids[start : start + job.batch]
            images = list(pool.map(listed.picture, names))
            for name, image in zip(names, images, strict=True):
                if name in listed.kept and not np.array_equal(image, listed.kept[name]):
                    raise UserError(
                        f"image '{name}' in {job.source} is not the one that {job.prepared} was made from; "
                        f"give that source, or prepare the set again"
                    )
            yield torch.from_numpy(np.stack(images))
            advance(len(names))
