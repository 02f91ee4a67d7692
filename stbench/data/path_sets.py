"""The registered data sets that are read from `--data PATH`: ImageNet, and any images."""

from __future__ import annotations

from typing import final

from stbench.core.registry import DATASETS
from stbench.data import presets
from stbench.data.path_dataset import PathDataset


@final
@DATASETS.register_module(name="imagenet256")
class ImageNet256(PathDataset):
    """ImageNet at 256 pixels, from `--data PATH`, with the published training settings of each backbone."""

    name = "imagenet256"
    input_size = 32
    size = 1_281_167
    classes = 1000
    image_shape = (3, 256, 256)
    preset = presets.IMAGENET
    published = presets.IMAGENET256
    expected = (256, 1000)


@final
@DATASETS.register_module(name="imagenet512")
class ImageNet512(PathDataset):
    """ImageNet at 512 pixels, from `--data PATH`, with the published training settings of each backbone."""

    name = "imagenet512"
    input_size = 64
    size = 1_281_167
    classes = 1000
    image_shape = (3, 512, 512)
    preset = presets.IMAGENET
    published = presets.IMAGENET512
    expected = (512, 1000)


@final
@DATASETS.register_module(name="custom")
class Custom(PathDataset):
    """Any images, from `--data PATH`: a prepared data set, REPA's layout, or a small folder of images."""

    name = "custom"
    input_size = 32
    image_shape = (3, 256, 256)
    preset = presets.CUSTOM
    published = presets.CUSTOM_SIZES
