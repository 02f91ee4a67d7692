"""A data set in one file.

stbench run --plugin examples/my_dataset.py --dataset digits-pixels --backbone sit --set backbone.patch=4 \\
    --recipe vanilla --objective linear-x
"""

from __future__ import annotations

from dataclasses import replace
from typing import final

from stbench.core.registry import DATASETS
from stbench.data.digits import DIGITS_PRESET, digits_images, stratified_split
from stbench.data.in_memory import InMemory


@final
@DATASETS.register_module(name="digits-pixels")
class DigitsPixels(InMemory):
    """scikit-learn's handwritten digits as 1x32x32 pixels, without an autoencoder; 297 are held out."""

    name = "digits-pixels"
    channels, input_size, classes, size = 1, 32, 10, 1500
    image_shape = (1, 32, 32)
    preset = replace(DIGITS_PRESET, lr=1e-3)  # what a run uses unless the user sets it
    extractor = "stbench-digits"  # or "timm/MODEL", "torchvision/MODEL", "dinov2", "inception-v3-compat"

    def __init__(self) -> None:
        images, labels = digits_images()  # uint8 (1797,1,32,32) and int64 (1797,): any arrays of these types
        rows, heldout_rows = stratified_split(labels, 297)
        super().__init__(images, labels, rows, heldout_rows)
