"""The two networks that measure photographs, from local weights whose hash is checked before they are read:
torch-fidelity's Inception (FID, sFID, IS, KID, precision, recall) and timm's DINOv2 (FD-DINOv2).

Nothing is ever downloaded.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from stbench.core.errors import UserError

INCEPTION = "inception-v3-compat"
"""torch-fidelity's name for it."""
INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[1]
INCEPTION_SHA256 = "6726825d"
"""First hex digits of the file's sha256, which its name carries."""
SPATIAL_CHANNELS = 7
"""Leading channels of mixed_6/conv that sFID keeps (ADM)."""
DINO_SIZES = {384: "small", 768: "base", 1024: "large", 1536: "giant"}
DINO_COMMAND = "hf download timm/vit_large_patch14_dinov2.lvd142m model.safetensors --local-dir dinov2-large"
"""Fetches the weights that FD-DINOv2 is published with."""


class Network(nn.Module, ABC):
    """A frozen network that turns uint8 images (B,3,H,W) into named features, each (B,D) float32."""

    spaces: ClassVar[Mapping[str, int | None]]
    """Feature spaces that Frechet distances are taken in, and their dimensions, None if it depends."""
    label: str
    """Name and hash of the weights, for the protocol."""

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """All features of a batch."""


@final
class Inception(Network):
    """The 2015-12-05 Inception: "pool" (B,2048), "spatial" (B,2023), "logits" without bias (B,1008).

    "spatial" is what ADM reads from mixed_6/conv of the TensorFlow graph: the rectified 1x1 branch of the
    block that is called Mixed_6d here. It stands first in the block's concatenation, so its first 7 channels
    are the block's; rows are in (height, width, channel) order.
    """

    spaces: ClassVar[Mapping[str, int | None]] = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS}

    def __init__(self, net: FeatureExtractorInceptionV3, label: str) -> None:
        super().__init__()
        self.net, self.label = net, label

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See the class."""
        seen: list[Tensor] = []
        # For this call alone: whoever calls the net itself must not fill a list that nobody empties.
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
class DinoV2(Network):
    """DINOv2's class token, "dino" (B,D), of images resized to 224x224 by PIL's bicubic (dgm-eval)."""

    spaces: ClassVar[Mapping[str, int | None]] = {"dino": None}
    _MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, net: nn.Module, label: str) -> None:
        super().__init__()
        self.net, self.label = net.eval().requires_grad_(False), label

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See the class."""
        resized = [
            np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))
            for image in images.permute(0, 2, 3, 1).cpu().numpy()
        ]
        x = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images.device).float() / 255.0
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (self._MEAN, self._STD))
        return {"dino": self.net((x - mean) / std)}


def inception_place() -> Path:
    """Where torch-fidelity itself would keep the weights: torch hub's cache."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def load_inception(
    file: Path | None = None, sha256: str = INCEPTION_SHA256, *, by_option: bool = True
) -> Inception:
    """Inception from a file, by default the one in torch hub's cache; `by_option` if the command that asks
    takes --inception.

    Raises UserError if the file is missing, if its sha256 does not begin with `sha256`, and if it does not
    hold Inception's weights.
    """
    place = file or inception_place()
    if not place.is_file():
        other = " or name your copy by --inception FILE" if by_option else ""
        raise UserError(
            f"Inception weights {INCEPTION_FILE} (sha256 {INCEPTION_SHA256}...) are missing: expected them "
            f"at {place}; put {URL_INCEPTION_V3} there{other}"
        )
    state, digest = _read(place, sha256, "Inception")
    buffer = io.BytesIO()
    torch.save(state, buffer)  # torch-fidelity unpickles what it is given; this it may
    buffer.seek(0)
    with torch.random.fork_rng(devices=[]):
        try:
            net = FeatureExtractorInceptionV3(
                INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=buffer
            )
        except RuntimeError as error:
            raise _misfit(place, "Inception", error) from error
    return Inception(net, f"{INCEPTION} {digest[:16]}").eval()


def load_dino(file: Path) -> DinoV2:
    """DINOv2 of any size, with or without registers, from timm's or Meta's weights; told by the shapes.

    Raises UserError if the file is missing or holds something else.
    """
    if not file.is_file():
        raise UserError(
            f"DINOv2 weights are missing: expected them at {file}; fetch them with `{DINO_COMMAND}`"
        )
    state, digest = _read(file, "", "DINOv2")
    if "cls_token" not in state or state["cls_token"].shape[-1] not in DINO_SIZES:
        raise _misfit(file, "DINOv2", "no cls_token of a known width")
    registers = "_reg4" if any(key in state for key in ("reg_token", "register_tokens")) else ""
    name = f"vit_{DINO_SIZES[state['cls_token'].shape[-1]]}_patch14{registers}_dinov2"
    with torch.random.fork_rng(devices=[]):
        net = timm.create_model(name, pretrained=False, num_classes=0, img_size=224)
    try:
        net.load_state_dict(checkpoint_filter_fn(state, net))  # type: ignore[arg-type]
    except (KeyError, RuntimeError) as error:
        raise _misfit(file, name, error) from error
    return DinoV2(net, f"{name} {digest[:16]}").eval()


def _read(file: Path, sha256: str, what: str) -> tuple[dict[str, Any], str]:
    """A state dict, and its file's sha256. The hash is compared before a byte is interpreted."""
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith(sha256.lower()):
        raise UserError(
            f"{file} is not the {what} that was asked for: expected sha256 {sha256}..., "
            f"found {digest[:16]}...; fetch it again"
        )
    try:
        if file.suffix == ".safetensors":
            return load(content), digest
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError, ValueError) as error:
        raise _misfit(file, what, error) from error
    if not isinstance(state, dict):
        raise _misfit(file, what, f"a {type(state).__name__}")
    return state, digest


def _misfit(file: Path, what: str, why: object) -> UserError:
    reason = " ".join(str(why).split())[:160]
    return UserError(f"{file} does not hold the weights of {what} ({reason}); fetch it again")
