"""The networks that measure photographs, loaded from local weight files whose hash is checked first.

torch-fidelity's Inception (FID, sFID, IS, KID, precision, recall) and timm's DINOv2 (FD-DINOv2). Nothing is
ever downloaded.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from stbench.core.errors import UserError
from stbench.data.spec import INCEPTION

INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[1]
INCEPTION_SHA256 = "6726825d"
"""First hex digits of the file's sha256; they are part of its name."""
SPATIAL_CHANNELS = 7
"""Leading channels of mixed_6/conv that sFID uses (ADM)."""
DINO_SIZES = {384: "small", 768: "base", 1024: "large", 1536: "giant"}
"""Width -> size in timm's model names."""
DINO_COMMAND = "hf download timm/vit_large_patch14_dinov2.lvd142m model.safetensors --local-dir dinov2-large"
"""Downloads the weights that published FD-DINOv2 values use."""


class FeatureNetwork(nn.Module, ABC):
    """A frozen network that maps uint8 images (B,3,H,W) to named features, each (B,D) float32."""

    spaces: ClassVar[Mapping[str, int | None]]
    """Feature spaces in which Frechet distances are computed -> dimension, None if it depends on the file."""
    label: str
    """Name and hash of the weights, recorded in the protocol."""

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return all features of a batch."""


@final
class Inception(FeatureNetwork):
    """The 2015-12-05 Inception: "pool" (B,2048), "spatial" (B,2023), "logits" without bias (B,1008).

    "spatial" is what ADM reads from mixed_6/conv of the TensorFlow graph: the rectified 1x1 branch of the
    block named Mixed_6d here. That branch comes first in the block's concatenation, so the first 7 channels
    of the branch are those of the block. Features are in (height, width, channel) order.
    """

    spaces: ClassVar[Mapping[str, int | None]] = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS}

    def __init__(self, net: FeatureExtractorInceptionV3, label: str) -> None:
        super().__init__()
        self.net, self.label = net, label

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return "pool", "spatial" and "logits"."""
        seen: list[Tensor] = []
        # Registered per call: `get_extractor` returns the same net, and its calls must not collect features.
        hook = self.net.Mixed_6d.register_forward_hook(
            lambda module, inputs, output: seen.append(output[:, :SPATIAL_CHANNELS])
        )
        try:
            pool, logits = self.net(images)
        finally:
            hook.remove()
        spatial = seen[0]
        return {"pool": pool, "spatial": spatial.permute(0, 2, 3, 1).flatten(1).float(), "logits": logits}


@final
class DinoV2(FeatureNetwork):
    """DINOv2's class token, "dino" (B,D), of images resized to 224x224 by PIL's bicubic filter (dgm-eval)."""

    spaces: ClassVar[Mapping[str, int | None]] = {"dino": None}
    _MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, net: nn.Module, label: str) -> None:
        super().__init__()
        self.net, self.label = net.eval().requires_grad_(False), label

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return "dino"."""
        # PIL filters with antialiasing and rounds to 8 bits, as dgm-eval does; torch's bicubic differs.
        resized = [
            np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))
            for image in images.permute(0, 2, 3, 1).cpu().numpy()
        ]
        x = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images.device).float() / 255.0
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (self._MEAN, self._STD))
        return {"dino": self.net((x - mean) / std)}


@dataclass(frozen=True)
class NetworkFiles:
    """Which networks measure photographs, and the files of their weights."""

    inception: Path | None = None
    """None for the file in torch hub's cache."""
    inception_sha256: str | None = None
    """First digits of that file's sha256; None for the published file's."""
    dino: Path | None = None
    """None to leave out FD-DINOv2."""

    def load(self, device: torch.device | str = "cpu") -> list[FeatureNetwork]:
        """Load the networks on `device`. Raises UserError for a missing or wrong file."""
        sha256 = INCEPTION_SHA256 if self.inception_sha256 is None else self.inception_sha256
        networks: list[FeatureNetwork] = [load_inception(self.inception, sha256)]
        if self.dino is not None:
            networks.append(load_dino(self.dino))
        return [network.to(device) for network in networks]


def inception_path() -> Path:
    """Return the path at which torch-fidelity itself keeps the weights, in torch hub's cache."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def load_inception(file: Path | None = None, sha256: str = INCEPTION_SHA256) -> Inception:
    """Load Inception from `file`, by default the one in torch hub's cache.

    Raises UserError if the file is missing, if its sha256 does not start with `sha256`, or if it does not
    contain Inception's weights.
    """
    path = file or inception_path()
    if not path.is_file():
        raise UserError(
            f"Inception weights {INCEPTION_FILE} (sha256 {INCEPTION_SHA256}...) not found: expected them "
            f"at {path}; put {URL_INCEPTION_V3} there or name your copy with --inception FILE"
        )
    # Hash first, then parse.
    state, digest = _read_checked(path, sha256, "Inception")

    # torch-fidelity unpickles its file without restrictions, so it gets a new one, with the tensors we read.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    # The constructor initialises every layer before it loads; forking keeps the global random state.
    with torch.random.fork_rng(devices=[]):
        try:
            net = FeatureExtractorInceptionV3(
                INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=buffer
            )
        except RuntimeError as error:
            raise _wrong_weights(path, "Inception", error) from error
    return Inception(net, f"{INCEPTION} {digest[:16]}").eval()


def load_dino(file: Path) -> DinoV2:
    """Load a DINOv2 from timm's or Meta's weights; size and registers are inferred from the shapes.

    Raises UserError if the file is missing or contains other weights.
    """
    if not file.is_file():
        raise UserError(
            f"DINOv2 weights not found: expected them at {file}; fetch them with `{DINO_COMMAND}`"
        )
    state, digest = _read_checked(file, "", "DINOv2")
    if "cls_token" not in state or state["cls_token"].shape[-1] not in DINO_SIZES:
        raise _wrong_weights(file, "DINOv2", "no cls_token of a known width")
    # Size and variant are not stored in the file, but the width and the register tokens reveal them.
    registers = "_reg4" if any(key in state for key in ("reg_token", "register_tokens")) else ""
    name = f"vit_{DINO_SIZES[state['cls_token'].shape[-1]]}_patch14{registers}_dinov2"
    with torch.random.fork_rng(devices=[]):
        net = timm.create_model(name, pretrained=False, num_classes=0, img_size=224)
    try:
        # timm's filter converts Meta's key names and resizes the position embedding from 518 to 224 pixels.
        net.load_state_dict(checkpoint_filter_fn(state, net))  # type: ignore[arg-type]
    except (KeyError, RuntimeError) as error:
        raise _wrong_weights(file, name, error) from error
    return DinoV2(net, f"{name} {digest[:16]}").eval()


def _read_checked(file: Path, sha256: str, what: str) -> tuple[dict[str, Any], str]:
    """Return a file's state dict and sha256. The hash is compared before any byte is interpreted."""
    content = file.read_bytes()
    # The bytes that were hashed are the bytes that are parsed: the file cannot change in between.
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith(sha256.lower()):
        raise UserError(
            f"{file} is not the expected {what} file: expected sha256 {sha256}..., found {digest[:16]}...; "
            "fetch it again"
        )
    try:
        if file.suffix == ".safetensors":
            return load(content), digest
        # torch.load ignores the checksums of the archive.
        if zipfile.is_zipfile(io.BytesIO(content)) and zipfile.ZipFile(io.BytesIO(content)).testzip():
            raise ValueError("a checksum is wrong")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes may raise anything
        raise _wrong_weights(file, what, error) from error
    if not isinstance(state, dict):
        raise _wrong_weights(file, what, f"a {type(state).__name__}")
    return state, digest


def _wrong_weights(file: Path, what: str, why: object) -> UserError:
    reason = " ".join(str(why).split())[:160]
    return UserError(f"{file} does not contain the weights of {what} ({reason}); fetch it again")
