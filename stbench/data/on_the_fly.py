"""Encode a small folder of images in memory when a run starts."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from stbench.core.device import pick_device
from stbench.core.errors import UserError
from stbench.core.text import print_line
from stbench.data.crop import UnreadableImage, decode_image, reason, require_same_size
from stbench.data.encode import EncodingTask, encode, make_row_encoder
from stbench.data.encoded import EncodedImages, MemoryRows
from stbench.data.sources import ImageSource, open_source
from stbench.data.spec import PIXELS, DataSpec
from stbench.data.split import assign_split

MAX_IMAGES = 20_000
"""A folder with more images must be prepared first."""

BATCH = 32
"""Images per call of the autoencoder."""


def encode_folder(path: Path, data: DataSpec) -> EncodedImages:
    """Crop and encode all images of a source.

    The fingerprint is that of the cropped pixels, so that it does not depend on the device that encoded them.
    Raises UserError if no autoencoder is given, if there are too many images, or fewer than two readable
    ones.
    """
    source = open_source(path)
    _check(path, data, source)
    # Encode. Pixels are kept for every row: the set is small, and the fingerprint is made from them.
    flip = bool(data.flip)
    encoder = make_row_encoder(
        data.vae,
        data.size or _common_size(source),
        flip=flip,
        precision="fp32",
        device=pick_device("auto"),
    )
    task = EncodingTask(source, assign_split(source.ids, len(source.ids)), encoder, BATCH)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        encoded = encode(task, range(len(source.ids)), pool=pool, advance=lambda count: None)
    for name, why in encoded.unreadable:
        print_line(f"left out: {name}: {why}", error=True)
    if len(encoded.ids) < 2:
        raise UserError(f"{path}: expected at least 2 readable images, found {len(encoded.ids)}; add images")
    # Everything that training depends on.
    facts = [list(encoded.ids), list(encoded.labels), encoder.vae_sha256, encoder.scale, encoder.shift, flip]
    fingerprint = hashlib.sha256(json.dumps(facts).encode())
    fingerprint.update(encoded.images.tobytes())
    return EncodedImages(
        kind=encoder.kind,
        shape=encoder.shape,
        image_shape=encoder.image_shape,
        classes=len(source.classes),
        labels=np.asarray(encoded.labels, np.int64),
        split=np.asarray(encoded.split, np.uint8),
        vae=encoder.vae,
        vae_sha256=encoder.vae_sha256,
        scale=encoder.scale,
        shift=encoder.shift,
        flip=flip,
        has_mirrored=flip or encoder.kind == "pixels",
        in_memory=True,
        fingerprint=fingerprint.hexdigest(),
        rows=MemoryRows(encoded.data),
        pixels=lambda rows: encoded.images[rows],
        has_all_pixels=True,
    )


def _check(path: Path, data: DataSpec, source: ImageSource) -> None:
    if not data.vae:
        raise UserError(
            f"{path} contains images, which need an autoencoder: add --set data.vae=sd-vae-ft-ema "
            f"(or a folder), or --set data.vae={PIXELS} to train on pixels"
        )
    if len(source.ids) > MAX_IMAGES:
        raise UserError(
            f"{path} contains {len(source.ids)} images, more than the {MAX_IMAGES} that are encoded on the "
            f"fly; prepare it once: stbench data prepare {path} NEW_FOLDER --vae {data.vae}"
        )


def _common_size(source: ImageSource) -> int:
    """Return the height and width of all images. Raises UserError if they differ or are not square."""
    images, names = [], []
    for number, name in enumerate(source.ids):
        try:
            shape = decode_image(source.content(number), 3, None).shape
            images.append(np.broadcast_to(np.uint8(0), shape))  # all pixels at once may not fit into memory
            names.append(name)
        except UnreadableImage as error:
            print_line(f"cannot read {name}: {reason(error)}", error=True)
    remedy = "give the size to crop them to, for example --set data.size=64"
    require_same_size(images, names, remedy)
    if not images or images[0].shape[1] != images[0].shape[2]:
        raise UserError(f"expected square images; {remedy}")
    return int(images[0].shape[1])
