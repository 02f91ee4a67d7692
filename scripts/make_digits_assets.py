"""Make the weights that stbench ships for its embedded digits: autoencoder, classifier, separate encoder.

Every network is trained from a fixed seed on the 1,500 training images alone, on one thread, so that the same
command on the same machine writes the same bytes. Usage: python scripts/make_digits_assets.py [FOLDER]
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stbench.data.digits import HELD_OUT, digits_images, encode_posterior, stratified_split
from stbench.evaluate import DigitsClassifier
from stbench.models.assets import asset_folder
from stbench.models.autoencoder import DIGITS_VAE, Autoencoder, build_vae, to_float, to_uint8

Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]

COMMAND = "python scripts/make_digits_assets.py"
KL_WEIGHT = 1e-4
SETTINGS: dict[str, dict[str, Any]] = {
    "digits_vae": {"seed": 0, "steps": 400, "batch": 32, "lr": 3e-3},
    "digits_classifier": {"seed": 1, "steps": 1500, "batch": 64, "lr": 2e-3},
    "digits_encoder": {"seed": 2, "steps": 1500, "batch": 64, "lr": 1e-3},
}
ENCODER: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 96,
    "depth": 3,
    "num_heads": 3,
    "mlp_ratio": 3.0,
    "class_token": False,
    "global_pool": "avg",
}
"""A timm VisionTransformer: 16 tokens of width 96, one for each 2x2 patch of an 8x8 latent."""


def train(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    loss: Loss,
    *,
    seed: int,
    steps: int,
    batch: int,
    lr: float,
) -> None:
    """Train `module` by `loss(module, images in [-1,1], labels, draw)` with AdamW, the rate annealed to 0."""
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    module.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (batch,), generator=draw)
        optimiser.zero_grad()
        loss(module, to_float(images[rows]), labels[rows], draw).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    module.eval()


def augment(images: Tensor, draw: torch.Generator) -> Tensor:
    """Move each image (B,1,32,32) by up to 2 pixels and add noise of standard deviation 0.05."""
    padded = F.pad(images, (2, 2, 2, 2), value=-1.0)
    shifts = torch.randint(5, (len(images), 2), generator=draw).tolist()
    moved = torch.stack([padded[i, :, y : y + 32, x : x + 32] for i, (y, x) in enumerate(shifts)])
    return moved + 0.05 * torch.randn(moved.shape, generator=draw)


def vae_loss(vae: nn.Module, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
    """Squared error of a posterior sample's reconstruction plus a small KL term, both means over elements."""
    posterior = vae.encode(images).latent_dist  # type: ignore[operator]
    noise = torch.randn(posterior.mean.shape, generator=draw)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample  # type: ignore[operator]
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
    return F.mse_loss(decoded, images) + KL_WEIGHT * kl


def label_loss(network: nn.Module, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
    """Cross entropy on augmented images.

    Smoothed labels bound the features: FID of held-out digits against damaged ones separates more clearly.
    """
    return F.cross_entropy(network(augment(images, draw)), labels, label_smoothing=0.05)


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 images (N,1,32,32) whose largest logit is their label."""
    return float((network(to_float(images)).argmax(1) == labels).double().mean())


def psnr(images: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 image sets, over all pixels at once."""
    return float(10.0 * torch.log10(255.0**2 / (images.double() - others.double()).square().mean()))


def store(folder: Path, name: str, module: nn.Module) -> dict[str, Any]:
    """Round the weights to float16, write them, and leave the module with exactly what a reader will load."""
    half = {key: value.half().contiguous() for key, value in module.state_dict().items()}
    content = save(half)
    (folder / f"{name}.safetensors").write_bytes(content)
    module.load_state_dict({key: value.float() for key, value in half.items()})
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "settings": SETTINGS[name]}


def make(folder: Path) -> dict[str, Any]:
    """Train and write the three networks and return the manifest."""
    images, labels = digits_images()
    rows, heldout = stratified_split(labels, HELD_OUT)
    x, y, held_x, held_y = images[rows], labels[rows], images[heldout], labels[heldout]
    builders: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
        "digits_vae": (lambda: build_vae(DIGITS_VAE), vae_loss),
        "digits_classifier": (DigitsClassifier, label_loss),
        "digits_encoder": (lambda: VisionTransformer(**ENCODER), label_loss),
    }
    networks, assets = {}, {}
    for name, (build, loss) in builders.items():
        started = time.perf_counter()
        torch.manual_seed(SETTINGS[name]["seed"])
        networks[name] = build()
        train(networks[name], x, y, loss, **SETTINGS[name])
        assets[name] = store(folder, name, networks[name])
        print(f"{name}: {time.perf_counter() - started:.0f} s, {assets[name]['bytes']} bytes")
    vae = Autoencoder(networks["digits_vae"], assets["digits_vae"]["sha256"])
    mean, std = encode_posterior(vae, x)
    decoded = to_uint8(vae.decode(encode_posterior(vae, held_x)[0]))
    classifier, encoder = networks["digits_classifier"], networks["digits_encoder"]
    assets["digits_vae"] |= {
        "config": DIGITS_VAE,
        "kl_weight": KL_WEIGHT,
        "heldout_psnr_db": round(psnr(decoded, held_x), 3),
        "heldout_reconstruction_accuracy": accuracy(classifier, decoded, held_y),
    }
    assets["digits_classifier"] |= {"heldout_accuracy": accuracy(classifier, held_x, held_y)}
    assets["digits_encoder"] |= {"config": ENCODER, "heldout_accuracy": accuracy(encoder, held_x, held_y)}
    # The spread of posterior samples: the variance of their means plus the mean of their variances.
    spread = (mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))).sqrt()
    return {
        "command": COMMAND,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "split": {"train": len(rows), "heldout": len(heldout)},
        "latent": {"mean": mean.mean((0, 2, 3)).tolist(), "std": spread.tolist()},
        "assets": assets,
    }


def main() -> None:
    """Write the assets and digits.json to the folder named on the command line, or into the package."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else asset_folder()
    folder.mkdir(parents=True, exist_ok=True)
    manifest = make(folder)
    (folder / "digits.json").write_text(json.dumps(manifest, indent=2) + "\n")
    print(json.dumps(manifest, indent=2))


if __name__ == "__main__":
    main()
