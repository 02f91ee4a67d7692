"""`stbench data tokens`: cache an encoder's tokens of the training images of a prepared data set.

A prepared data set contains latents, so the images are read again from where it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stbench.core.disk import require_free_space
from stbench.core.errors import UserError
from stbench.core.world import ALONE, World
from stbench.data.crop import UnreadableImage, decode_image, reason
from stbench.data.encode import Advance
from stbench.data.repa_layout import RepaFolder, is_repa
from stbench.data.shards import Manifest, open_array, read_manifest
from stbench.data.sources import open_source
from stbench.data.split import HELDOUT, REFERENCE
from stbench.models.encoders import EncoderSpec, ImageEncoder, cache_tokens, find_encoder, open_encoder


@dataclass(frozen=True)
class TokenOptions:
    """The options of `stbench data tokens`."""

    source: Path
    """The images that the data set was made from, or the folder in REPA's layout that was imported."""
    prepared: Path
    target: Path
    encoder: str
    checkpoint: Path | None = None
    patch: int = 2
    """Patch size of the backbone."""
    classes: Path | None = None
    batch: int = 64
    class_token: bool = False
    """Whether to write the class token too."""
    device: torch.device = torch.device("cpu")


@dataclass(frozen=True)
class TokenTask:
    """The training images of a prepared data set, in the order of its rows, and the encoder."""

    ids: Sequence[str]
    read_image: Callable[[str], np.ndarray]
    """Reads an image (c,S,S) by its name in the source."""
    references: Mapping[str, np.ndarray]
    """Pixels (c,S,S) that the data set contains, by name."""
    encoder: ImageEncoder


def is_token_folder(folder: Path) -> bool:
    """Whether a folder contains nothing but cached tokens, as a killed command leaves them."""
    own = ("tokens.npy", "tokens.json", ".")  # hidden files: temporary files, and what was verified
    return all(path.name.startswith(own) and not path.is_symlink() for path in folder.iterdir())


def open_task(options: TokenOptions) -> TokenTask:
    """Find images and encoder. Raises UserError for options that are wrong or do not fit."""
    if (options.target / "tokens.json").exists():
        raise UserError(f"{options.target} already contains tokens; delete it, or give another folder")
    manifest = read_manifest(options.prepared)
    # The encoder must give one token per patch of the backbone.
    side = manifest.shape[-1]
    if side % options.patch:
        raise UserError(
            f"--patch must be a divisor of {side}, the size of the latents, got {options.patch}; 2 is common"
        )
    spec = find_encoder(options.encoder, options.checkpoint)
    encoder = open_encoder(spec, (side // options.patch) ** 2, options.device)
    if not isinstance(encoder, ImageEncoder):
        raise UserError(f"--encoder must be a timm model or digits, got the cached tokens {options.encoder}")
    ids, references = _training_rows(manifest, options.prepared)
    return TokenTask(ids, _image_reader(options, manifest, ids), references, encoder)


def cache(options: TokenOptions, task: TokenTask, advance: Advance, world: World = ALONE) -> EncoderSpec:
    """Write the tokens. Raises UserError for an image other than the one that the data set was made from.

    The ranks take turns at the batches; rank 0 writes all of them.
    """
    world.from_main(lambda: _require_space(options, task))
    batches = _batches(options, task, advance, world)
    return cache_tokens(
        options.target, task.encoder, batches, len(task.ids), world, class_token=options.class_token
    )


def _require_space(options: TokenOptions, task: TokenTask) -> None:
    options.target.mkdir(parents=True, exist_ok=True)
    # Checked first, because the file is memory-mapped: a full disk would kill the process.
    tokens = task.encoder.network.patch_embed.num_patches + options.class_token
    require_free_space(options.target, len(task.ids) * tokens * task.encoder.spec.width * 2)


def _training_rows(manifest: Manifest, folder: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the names of the training rows in order, and the pixels of those that are references."""
    names: list[str] = []
    references: dict[str, np.ndarray] = {}
    for shard in manifest.shards:
        # Pixels are stored in order for rows whose split is not TRAIN: held-out and reference rows.
        ids, split, images = (
            open_array(manifest, folder, shard, name) for name in ("ids", "split", "images")
        )
        known = [bytes(name).decode(errors="surrogateescape") for name in ids]
        names += [name for name, part in zip(known, split, strict=True) if part != HELDOUT]
        with_pixels = np.flatnonzero(split)
        references |= {known[r]: images[k] for k, r in enumerate(with_pixels) if split[r] == REFERENCE}
    return names, references


def _image_reader(
    options: TokenOptions, manifest: Manifest, names: Sequence[str]
) -> Callable[[str], np.ndarray]:
    """Return a function that reads an image by name, cropped as in the prepared data set.

    Raises UserError if the source lacks one of the images.
    """
    channels, size = manifest.image_shape[:2]
    if is_repa(options.source):
        folder = RepaFolder(options.source)
        row = _row_by_name(folder.ids, names, options)
        return lambda name: folder.pixels([row[name]], manifest.image_shape)[0]
    source = open_source(options.source, options.classes)
    number = _row_by_name(source.ids, names, options)

    def read_image(name: str) -> np.ndarray:
        try:
            return decode_image(source.content(number[name]), channels, size)
        except UnreadableImage as error:
            raise UserError(f"image '{name}' is no longer readable ({reason(error)}); restore it") from error

    return read_image


def _row_by_name(ids: Sequence[str], names: Sequence[str], options: TokenOptions) -> dict[str, int]:
    """Return name -> number in the source. Raises UserError if one of `names` is missing."""
    rows = {name: number for number, name in enumerate(ids)}
    if missing := [name for name in names if name not in rows]:
        raise UserError(
            f"expected in {options.source} the images that {options.prepared} was made from, "
            f"'{missing[0]}' is missing ({len(missing)} of {len(names)}); give the original source"
        )
    return rows


def _batches(
    options: TokenOptions, task: TokenTask, advance: Advance, world: World
) -> Iterator[Tensor | None]:
    """Yield every n-th batch of the training images, uint8 (b,c,S,S), for one of n ranks.

    References are compared with the data set. None stands for a batch after the last one, so that all ranks
    yield equally often.
    """
    round_size = options.batch * world.size
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(task.ids), round_size):
            start = first + world.rank * options.batch
            names = task.ids[start : start + options.batch]
            if not names:
                yield None
                continue
            images = list(pool.map(task.read_image, names))
            for name, image in zip(names, images, strict=True):
                if name in task.references and not np.array_equal(image, task.references[name]):
                    raise UserError(
                        f"image '{name}' in {options.source} is not the one that {options.prepared} was made "
                        f"from; give the original source, or prepare the data set again"
                    )
            yield torch.from_numpy(np.stack(images))
            advance(len(task.ids[first : first + round_size]))
