"""Feature extractors of a run's evaluation by name, the digits classifier, and features in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from stbench.config.spec import EvalSpec
from stbench.core.device import arithmetic
from stbench.core.errors import UserError
from stbench.core.files import hash_file
from stbench.core.registry import EXTRACTORS, suggest
from stbench.data.dataset import Dataset
from stbench.data.spec import INCEPTION
from stbench.evaluate import classifiers, fdr6
from stbench.evaluate.feature_networks import INCEPTION_SHA256, load_inception
from stbench.models.assets import load_asset
from stbench.models.autoencoder import to_float

EXTRACTOR_BATCH = 250
"""Images that an extractor measures at a time by default; features depend on it in the last bits."""

DINOV2 = "dinov2"
"""Name of DINOv2 as in FD-DINOv2."""


class DigitsClassifier(nn.Module):
    """A small convolutional digit classifier; its 64-d features replace Inception's for the digits."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 48)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.penultimate = nn.Linear(48 * 4 * 4, 64)
        self.head = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """Map images (B,1,32,32) in [-1,1] to features (B,64)."""
        for convolution in self.convolutions:
            images = nn.functional.max_pool2d(nn.functional.gelu(convolution(images)), 2)
        return nn.functional.gelu(self.penultimate(images.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B,1,32,32) in [-1,1] to logits (B,10)."""
        return self.head(self.features(images))


@final
class DigitsExtractor(FeatureExtractorBase):
    """The shipped classifier for torch-fidelity: uint8 (B,1,32,32) to features "64" and "logits"."""

    def __init__(self, name: str, features_list: Sequence[str], **_options: object) -> None:
        # torch-fidelity passes all its options to every extractor; this one has none.
        super().__init__(name, list(features_list))
        # The meta device initialises nothing, so the global random state does not change.
        with torch.device("meta"):
            self.classifier = DigitsClassifier()
        self.classifier.load_state_dict(load_asset("digits_classifier"), assign=True)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Return the names of the features."""
        return "64", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Return "logits" for the inception score and "64" for every other metric."""
        return "logits" if metric == "isc" else "64"

    @staticmethod
    def can_be_compiled() -> bool:
        """Return False: compiling a network this small gains nothing."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """Return one black image."""
        return torch.zeros(1, 1, 32, 32, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the requested features in the requested order."""
        features = self.classifier.features(to_float(images))
        found = {"64": features, "logits": self.classifier.head(features)}
        return tuple(found[name] for name in self.features_list)


register_feature_extractor("stbench-digits", DigitsExtractor)


COLLECTIONS: Mapping[str, Callable[[str, Path | None], nn.Module]] = {
    "timm": classifiers.load_timm,
    "torchvision": classifiers.load_torchvision,
    "fdr6": fdr6.load_tokens,
}
"""Prefix of a name -> what loads the rest of the name."""


@cache
def get_extractor(name: str, file: Path | None = None, sha256: str | None = None) -> nn.Module:
    """Return an extractor that computes (FID features, IS logits), on the CPU.

    Args:
        name: "inception-v3-compat", "dinov2", "timm/MODEL", "torchvision/MODEL", "fdr6/NAME", or a name
            registered in `stbench.core.registry.EXTRACTORS` or at torch-fidelity.
        file: Its weights; None for those in the local caches of torch and Hugging Face, or its own.
        sha256: First digits of the sha256 of the file; None for those of the published Inception, or any.

    Raises UserError for an unknown name, and for weights that are missing or do not fit.
    """
    if name == INCEPTION:  # its loader checks file and hash
        # torch-fidelity would download the weights; this loads a local file and checks its hash.
        return load_inception(file, INCEPTION_SHA256 if sha256 is None else sha256).net
    if file is not None and not file.is_file():
        raise UserError(f"weights of extractor '{name}' not found: {file}; give a file")
    found = hash_file(file) if file is not None and sha256 is not None else ""
    if sha256 is not None and not found.startswith(sha256.lower()):
        raise UserError(
            f"eval.extractor_file is not the expected file: expected sha256 {sha256}..., found "
            f"{found[:16] or 'no file'}; give the right one"
        )
    collection, slash, model = name.partition("/")
    if slash and collection in COLLECTIONS:
        return COLLECTIONS[collection](model, file)
    if name == DINOV2:
        return classifiers.load_dinov2(file)
    if name in EXTRACTORS.module_dict:
        return classifiers.Registered(name, file)
    return _from_torch_fidelity(name, file)


def _from_torch_fidelity(name: str, file: Path | None) -> FeatureExtractorBase:
    """Return an extractor that is registered at torch-fidelity, except those that download their weights."""
    known = {
        k: v for k, v in FEATURE_EXTRACTORS_REGISTRY.items() if not v.__module__.startswith("torch_fidelity")
    }
    if name not in known:
        ours = [INCEPTION, DINOV2, *EXTRACTORS.module_dict, *known]
        raise UserError(
            f"unknown feature extractor '{name}'{suggest(name, ours)}; models of timm and torchvision are "
            f"named timm/MODEL and torchvision/MODEL"
        )
    if file is not None:
        raise UserError(f"extractor '{name}' has its own weights; leave eval.extractor_file out")
    # torch-fidelity names layers per extractor and metric; the order here is the order of the outputs.
    layers = [known[name].get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")]
    return create_feature_extractor(name, layers, cuda=False, verbose=False)


def run_extractor(dataset: Dataset, settings: EvalSpec) -> nn.Module:
    """Return the extractor of a run's evaluation, after two black images have passed through it.

    A faulty one fails here, before training. Raises UserError as `get_extractor` does.
    """
    name = settings.extractor or dataset.extractor
    file = Path(settings.extractor_file) if settings.extractor_file else None
    return _checked(
        get_extractor(name, file, settings.extractor_sha256), name, dataset, "eval.extractor=NAME"
    )


def ratio_extractors(dataset: Dataset, settings: EvalSpec) -> dict[str, nn.Module]:
    """Return the extractors of FDr by name, after two black images have passed through each.

    Raises UserError as `get_extractor` does; if weights are missing in the Hugging Face cache, with the
    commands that download all of them.
    """
    files = {name: Path(file) for name, file in settings.fdr_files.items()}
    main = settings.extractor or dataset.extractor
    fdr6.require_cached(
        (n for n in settings.fdr if n not in files and not (n == main and settings.extractor_file)),
        "name files with --set eval.fdr_files, or leave the extractors out of eval.fdr",
    )
    return {
        name: run_extractor(dataset, settings)
        if name == main and name not in files
        else _checked(get_extractor(name, files.get(name)), name, dataset, "eval.fdr=[NAME,...]")
        for name in settings.fdr
    }


def _checked(extractor: nn.Module, name: str, dataset: Dataset, setting: str) -> nn.Module:
    """Return the extractor if it can measure the images of the data set; UserError otherwise."""
    black = torch.zeros(2, *dataset.image_shape, dtype=torch.uint8)
    try:
        extract_features(extractor, black)
    except UserError:
        raise
    except Exception as error:  # the code of a plug-in may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"extractor '{name}' cannot measure images of {'x'.join(map(str, dataset.image_shape))} "
            f"({reason}); choose another one with --set {setting}"
        ) from error
    return extractor


@torch.no_grad()
def extract_features(
    extractor: nn.Module, images: Tensor, *, batch: int = EXTRACTOR_BATCH, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Compute FID features (N,D) and IS logits (N,K), float64 on the CPU, of uint8 images (N,c,H,W).

    The extractor runs on `device` in fp32. Grey images are repeated to three channels for Inception.
    """
    if images.shape[1] == 1 and isinstance(extractor, FeatureExtractorInceptionV3):
        images = images.expand(-1, 3, -1, -1)
    found = []
    try:
        extractor.to(device)
        with arithmetic("fp32", torch.device(device)):
            for part in torch.split(images, batch):
                features, logits = extractor(part.to(device))
                found.append((features.cpu(), logits.cpu()))
    finally:
        # `get_extractor` caches one instance per process, which other callers expect on the CPU.
        extractor.to("cpu")
    features, logits = (torch.cat(parts).double() for parts in zip(*found, strict=True))
    return features, logits


def tensors_hash(tensors: Sequence[Tensor]) -> str:
    """Return the sha256 of the shapes, types and bytes of tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def extractor_hash(extractor: nn.Module) -> str:
    """Return a hash of an extractor's weights and of the layers it returns."""
    weights = tensors_hash(list(extractor.state_dict().values()))
    layers = extractor.get_requested_features_list()  # type: ignore[operator]
    return hashlib.sha256(f"{layers}{weights}".encode()).hexdigest()
