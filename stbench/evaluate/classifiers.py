"""Feature extractors from timm, torchvision and plug-ins, for the evaluation of a run.

An extractor maps uint8 images (B,c,H,W) to features (B,D) for Frechet distances, KID, precision and recall,
and to logits (B,K) for the inception score and the accuracy; K is 0 if it does not classify. Weights come
from a file, or from a local cache that another program filled: nothing is downloaded here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stbench.core.errors import UserError
from stbench.core.registry import EXTRACTORS, lookup, plugin_hash
from stbench.core.text import check_name
from stbench.evaluate.feature_networks import load_dino
from stbench.models.external import read_external
from stbench.models.timm_models import WEIGHTS, cached_weights, repository

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO = "vit_large_patch14_dinov2.lvd142m"
"""timm's name of the DINOv2 whose weights published FD-DINOv2 values use."""


@final
class Classifier(nn.Module):
    """A classifier whose features are the input of its last layer.

    Grey images are repeated to three channels. Images are resized to the size that the network was trained
    with by a bicubic filter with antialiasing, whatever their aspect ratio, and normalised.
    """

    def __init__(
        self, network: nn.Module, last: str, *, size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        """`last` names the last layer; "" if the outputs of the network are the features."""
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self._last, self._size, self._mean, self._std = last, size, tuple(mean), tuple(std)

    def get_requested_features_list(self) -> list[str]:
        """Describe everything besides the weights that changes a feature; part of the protocol."""
        return [f"input of {self._last or 'nothing'}", f"bicubic {self._size}", f"{self._mean} {self._std}"]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B,D) and logits (B,K)."""
        x = images.expand(-1, 3, -1, -1).float() / 255.0
        x = F.interpolate(x, (self._size, self._size), mode="bicubic", align_corners=False, antialias=True)
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (self._mean, self._std))
        x = (x.clamp(0.0, 1.0) - mean) / std
        if not self._last:
            return self.network(x).flatten(1), torch.zeros(len(x), 0, device=x.device)
        seen: list[Tensor] = []
        hook = self.network.get_submodule(self._last).register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0])
        )
        try:
            logits = self.network(x)
        finally:
            hook.remove()
        return seen[-1].flatten(1), logits


@final
class DinoFeatures(nn.Module):
    """DINOv2's class token as in FD-DINOv2; see `feature_networks.DinoV2`. It has no logits."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.network = load_dino(file)

    def get_requested_features_list(self) -> list[str]:
        """Describe everything besides the weights that changes a feature."""
        return ["class token", "PIL bicubic 224", self.network.label.split()[0]]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B,D) and logits (B,0)."""
        features = self.network(images.expand(-1, 3, -1, -1))["dino"]
        return features, torch.zeros(len(features), 0, device=features.device)


@final
class Registered(nn.Module):
    """An extractor that a plug-in registered in `stbench.core.registry.EXTRACTORS`.

    It is called with uint8 images (B,c,H,W) and returns features (B,D), or features and logits (B,K).
    """

    def __init__(self, name: str, file: Path | None) -> None:
        super().__init__()
        kind = lookup(EXTRACTORS, name)
        self.name, self.plugin = name, plugin_hash(kind)
        # Random weights of a plug-in must not change the random numbers of the run.
        with torch.random.fork_rng(devices=[]):
            self.network = kind() if file is None else kind(file)
        if not isinstance(self.network, nn.Module):
            raise UserError(f"extractor '{name}' must be a torch.nn.Module; derive its class from it")
        self.network.eval().requires_grad_(False)

    def get_requested_features_list(self) -> list[str]:
        """Identify the code of the plug-in; part of the protocol."""
        return [self.name, self.plugin]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B,D) and logits (B,K). Raises UserError for outputs of another form."""
        found = self.network(images)
        features, logits = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        for what, value in (("features", features), ("logits", logits)):
            if value is None and what == "logits":
                continue
            if not isinstance(value, Tensor) or value.ndim != 2 or len(value) != len(images):
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise UserError(
                    f"extractor '{self.name}' must return {what} ({len(images)},D) for {len(images)} images, "
                    f"found {shape}"
                )
        return features, torch.zeros(len(features), 0, device=features.device) if logits is None else logits


# --- timm ---


def load_timm(name: str, file: Path | None) -> Classifier:
    """Load a timm model as a classifier; see `timm_network`."""
    network, config, last = timm_network(name, file)
    size = min(config["input_size"][-2:])
    return Classifier(network, last, size=size, mean=config["mean"], std=config["std"])


def timm_network(name: str, file: Path | None, **options: Any) -> tuple[nn.Module, Mapping[str, Any], str]:
    """Load a timm model, built with `options`, from a file, or from the Hugging Face cache.

    Returns the network, timm's configuration of it, and the name of its last linear layer, "" if the weights
    have none. The number of classes is that of the weights. Raises UserError for an unknown name, and for
    weights that are missing or belong to another model.
    """
    import timm

    check_name(name, "the name of a timm model", length=100)  # timm downloads what "hf-hub:..." names
    # The configuration of a name without a tag is that of timm's default weights.
    try:
        with torch.device("meta"):
            config: Any = timm.create_model(name, pretrained=False).pretrained_cfg
    except Exception as error:  # timm raises RuntimeError for unknown names, and others for odd ones
        raise UserError(f"unknown timm model '{name}'; expected a name of timm.list_models()") from error
    state = read_external(file or _timm_file(name)).state
    last = config["classifier"] if isinstance(config["classifier"], str) else config["classifier"][0]
    classes = len(state[f"{last}.weight"]) if f"{last}.weight" in state else 0
    with torch.random.fork_rng(devices=[]):
        network = timm.create_model(name, pretrained=False, num_classes=classes, **options)
    _load(network, state, f"timm/{name}", file)
    return network, config, last if classes else ""


def _timm_file(name: str) -> Path:
    """Return the weights of a timm model in the Hugging Face cache. Raises UserError without them."""
    found = cached_weights(name)
    if found is None:
        download = f"`hf download {repository(name)} {WEIGHTS[0]} --local-dir NAME`"
        raise _no_weights(f"timm/{name}", download)
    return found


def load_dinov2(file: Path | None) -> DinoFeatures:
    """Load DINOv2 from timm's or Meta's weights; without a file, the large one in the Hugging Face cache."""
    return DinoFeatures(file or _timm_file(DINO))


# --- torchvision ---


def load_torchvision(name: str, file: Path | None) -> Classifier:
    """Load a classifier of torchvision from a file, or from torch hub's cache; as `load_timm`."""
    import torchvision

    if name not in torchvision.models.list_models(torchvision.models):
        raise UserError(
            f"unknown torchvision model '{name}'; expected a name of torchvision.models.list_models()"
        )
    published: Any = torchvision.models.get_model_weights(name)
    default = getattr(published, "DEFAULT", None)
    if file is None:
        cached = (
            Path(torch.hub.get_dir()) / "checkpoints" / (default.url.rsplit("/", 1)[-1] if default else "-")
        )
        if not cached.is_file():
            raise _no_weights(f"torchvision/{name}", f"`curl -O {default.url if default else 'URL'}`")
        file = cached
    state = read_external(file).state
    # The last linear layer, whose rows are the classes.
    with torch.device("meta"):
        plain = torchvision.models.get_model(name, weights=None)
    layers = [key for key, module in plain.named_modules() if isinstance(module, nn.Linear)]
    if not layers or f"{layers[-1]}.weight" not in state:
        raise UserError(
            f"{file} does not contain the weights of a linear classifier of torchvision/{name}; "
            f"expected '{layers[-1] if layers else 'fc'}.weight'"
        )
    classes = len(state[f"{layers[-1]}.weight"])
    with torch.random.fork_rng(devices=[]):
        network = torchvision.models.get_model(name, weights=None, num_classes=classes)
    _load(network, state, f"torchvision/{name}", file)
    transforms = default.transforms() if default else None
    size = transforms.crop_size[0] if transforms else 224
    mean, std = (transforms.mean, transforms.std) if transforms else (IMAGENET_MEAN, IMAGENET_STD)
    return Classifier(network, layers[-1], size=size, mean=mean, std=std)


def _load(network: nn.Module, state: Mapping[str, Tensor], name: str, file: Path | None) -> None:
    """Load weights strictly. Raises UserError if they are not finite or do not fit."""
    odd = next((key for key, value in state.items() if not bool(value.isfinite().all())), None)
    if odd is not None:
        raise UserError(f"the weights of {name} in {file} contain values that are not finite, in '{odd}'")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} does not contain the weights of {name} ({reason}); give its own") from error


def _no_weights(name: str, download: str) -> UserError:
    return UserError(
        f"the weights of extractor '{name}' are not in the local cache; fetch them, for example with "
        f"{download}, and add --set eval.extractor_file=FILE"
    )
