"""Tokens of an encoder, cached on disk for all training images."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.core.npy import map_npy
from stbench.core.safe_load import parse_json, read_text
from stbench.core.verified import hash_and_remember, verify_files
from stbench.core.world import ALONE, World
from stbench.models.image_encoder import EncoderSpec, ImageEncoder


@final
class CachedTokens:
    """Tokens on disk, one row per training image, memory-mapped."""

    def __init__(self, spec: EncoderSpec, tokens: int) -> None:
        self._tokens = _map_tokens(Path(spec.path))
        manifest = _manifest(Path(spec.path))
        self.flops = float(manifest["flops"])
        """FLOPs per image of the encoder that made them."""
        self.has_class_token: bool = manifest["class_token"]
        """Whether the class token precedes the tokens of an image."""
        found = self._tokens.shape[1] - self.has_class_token
        if found != tokens:
            raise UserError(
                f"{spec.path} contains {found} tokens per image, the backbone has {tokens}; "
                f"cache the tokens of another encoder or image size"
            )

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self._tokens)

    def rows(self, index: Tensor, dataset_size: int, *, class_token: bool = False) -> Tensor:
        """Return patch tokens (B,N,Dz), float32 on the CPU; with `class_token`, that token precedes them.

        Raises UserError if they are not of these images, or if there is no class token.
        """
        if class_token and not self.has_class_token:
            raise UserError(
                "expected cached tokens with the class token, found patch tokens only; cache them again with "
                "`stbench data tokens --class-token`"
            )
        if len(self._tokens) != dataset_size:
            raise UserError(
                f"expected cached tokens of {dataset_size} images, found {len(self._tokens)}; "
                f"cache the tokens of this data set"
            )
        if len(index) and int(index.max()) >= dataset_size:
            raise UserError("there are no cached tokens of mirror images; type --set data.flip=false")
        found = torch.from_numpy(self._tokens[index.numpy()].astype(np.float32))
        return found[:, 1:] if self.has_class_token and not class_token else found


def cache_tokens(
    folder: Path,
    encoder: ImageEncoder,
    images: Iterable[Tensor | None],
    count: int,
    world: World = ALONE,
    *,
    class_token: bool = False,
) -> EncoderSpec:
    """Encode the `count` training images, given in row order as batches uint8 (b,c,H,W), and save the tokens.

    With n ranks, each gives every n-th batch, or None after the last one; rank 0 writes.

    tokens.npy is float16 (count,N,Dz), written batch by batch; with `class_token`, that token is row 0 of
    N+1. tokens.json, with the encoder, its FLOPs, and size and hash of tokens.npy, is written last. Raises
    UserError for another number of images, and for an encoder without a class token.
    """
    if class_token and not encoder.has_class_token:
        raise UserError(f"encoder '{encoder.spec.name}' has no class token; leave out --class-token")
    shape = (count, encoder.network.patch_embed.num_patches + class_token, encoder.spec.width)
    world.from_main(lambda: _create_tokens(folder, shape))
    tokens = np.lib.format.open_memmap(folder / "tokens.npy", "r+") if world.is_main else None
    done = 0
    for batch in images:
        found = world.collect(_encode(encoder, batch, shape))
        if done + len(found) > count:
            raise UserError(f"expected {count} images, found more; pass the right count")
        if tokens is not None:
            tokens[done : done + len(found)] = found.numpy()
        done += len(found)
    if done < count:
        raise UserError(f"expected {count} images, found {done}; pass the right count")
    return world.from_main(lambda: _finish_tokens(folder, encoder, tokens, class_token))


def _create_tokens(folder: Path, shape: tuple[int, ...]) -> None:
    """Create tokens.npy, to be filled."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.json").unlink(missing_ok=True)  # tokens without it are not a cache
    np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.float16, shape)


@torch.no_grad()
def _encode(encoder: ImageEncoder, batch: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Tokens of a batch, float16 (b,N,Dz) on the host; no rows for None."""
    if batch is None:
        return torch.empty(0, *shape[1:], dtype=torch.float16)
    device = next(encoder.network.parameters()).device
    with_class = shape[1] > encoder.network.patch_embed.num_patches
    return encoder.tokens(batch.to(device), class_token=with_class).half().cpu()


def _finish_tokens(folder: Path, encoder: ImageEncoder, tokens: Any, class_token: bool) -> EncoderSpec:
    """Write tokens.json, which makes the tokens a cache."""
    tokens.flush()
    file = folder / "tokens.npy"
    content = {
        "schema": 1,
        "encoder": encoder.spec.name,
        "encoder_sha256": encoder.spec.sha256,
        "flops": encoder.flops,
        "class_token": class_token,
        "bytes": file.stat().st_size,
        "sha256": hash_and_remember(folder, file.name),
    }
    atomic_write(folder / "tokens.json", json.dumps(content, indent=1) + "\n")
    return cached_spec(folder)


def cached_spec(folder: Path) -> EncoderSpec:
    """Identify cached tokens. tokens.npy is hashed on its first use on a machine, which may take minutes."""
    content = _manifest(folder)
    file = folder / "tokens.npy"
    if not file.is_file():
        raise UserError(f"{folder} lacks tokens.npy; cache the tokens again")
    if file.stat().st_size != content["bytes"]:
        raise UserError(
            f"{file} is damaged: expected {content['bytes']} bytes, found {file.stat().st_size}; "
            f"cache the tokens again"
        )
    verify_files(folder, {"tokens.npy": content["sha256"]}, "copy it again, or cache the tokens again")
    shape = _map_tokens(folder).shape
    return EncoderSpec("cached", str(content["encoder"]), int(shape[2]), str(content["sha256"]), str(folder))


def _map_tokens(folder: Path) -> np.ndarray:
    """Open tokens.npy, float16 (count,N,Dz), memory-mapped."""
    file = folder / "tokens.npy"
    try:
        tokens = map_npy(file)
        if tokens.dtype != np.float16 or tokens.ndim != 3:
            raise ValueError(f"expected float16 (count,N,Dz), found {tokens.dtype} {tokens.shape}")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); cache the tokens again") from error
    return tokens


def _manifest(folder: Path) -> dict[str, Any]:
    """Read tokens.json."""
    try:
        content = parse_json(read_text(folder / "tokens.json"))
        if content["schema"] != 1:
            raise ValueError(f"schema {content['schema']}")
        return {
            "encoder": str(content["encoder"]),
            "flops": float(content["flops"]),
            "class_token": bool(content.get("class_token", False)),  # caches of earlier versions lack it
            "bytes": int(content["bytes"]),
            "sha256": str(content["sha256"]),
        }
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{folder}/tokens.json is damaged ({error}); cache the tokens again") from error
