"""Names of networks with their default stages, as data. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from teach_once.runtime.errors import UserError

PYTHON_PREFIX = "python:"  # python:package.module:function builds a user's own network
TIMM_PREFIX = "timm:"  # timm:NAME is the model NAME of timm


class ArchError(UserError, ValueError):
    """A network that cannot be built: an unknown name, or weights that do not fit."""


Option = bool | int | float | str  # of a network's constructor


def unknown_option(arch: str, options: Mapping[str, Option], error: Exception) -> ArchError | None:
    """Return the error for an option that the constructor rejects; None for any other `error`."""
    told = r"(?:unexpected keyword|multiple values for(?: keyword)?) argument '(\w+)'"
    named = re.search(told, str(error))
    if named is None or named[1] not in options:
        return None
    return no_such_option(arch, named[1])


def no_such_option(arch: str, name: str) -> ArchError:
    return ArchError(f"arch {arch!r} has no option {name!r}", fix=f"remove options.{name}")


@dataclass(frozen=True)
class CifarResNetShape:
    """Shape of a CIFAR ResNet: 6n+2 layers, with n basic blocks per stage.

    depth: number of layers; widths: channels of the stem and of the three stages.
    """

    depth: int
    widths: tuple[int, int, int, int]

    @property
    def blocks_per_stage(self) -> int:
        return (self.depth - 2) // 6


_PLAIN = (16, 16, 32, 64)
_WIDE = (32, 64, 128, 256)
CIFAR_RESNETS = {
    **{f"resnet{depth}": CifarResNetShape(depth, _PLAIN) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet8x4": CifarResNetShape(8, _WIDE),
    "resnet32x4": CifarResNetShape(32, _WIDE),
}

# torchvision's classifiers with a stem and four stages of ResNet blocks. They also accept a stem
# for small images and any number of input channels.
TORCHVISION_RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)


def _features(*numbers: int) -> tuple[str, ...]:
    return tuple(f"features.{number}" for number in numbers)


# torchvision's plain transformers, each built for one image size, with their depths.
VISION_TRANSFORMERS = {"vit_b_16": 12, "vit_b_32": 12, "vit_l_16": 24, "vit_l_32": 24}

# Other classifiers of torchvision, with the last module at each of the four coarsest resolutions.
# A plain transformer has four evenly spaced blocks instead.
_OTHER_STAGES: dict[str, tuple[str, ...]] = {
    "mobilenet_v2": _features(3, 6, 13, 18),
    "mobilenet_v3_large": _features(3, 6, 12, 16),
    "mobilenet_v3_small": _features(1, 3, 8, 12),
    **dict.fromkeys((f"efficientnet_b{n}" for n in range(8)), _features(2, 3, 5, 8)),
    "efficientnet_v2_s": _features(2, 3, 5, 7),
    **dict.fromkeys(("efficientnet_v2_m", "efficientnet_v2_l"), _features(2, 3, 5, 8)),
    **dict.fromkeys(
        (f"convnext_{size}" for size in ("tiny", "small", "base", "large")), _features(1, 3, 5, 7)
    ),
    **dict.fromkeys(
        (
            f"regnet_{kind}_{size}"
            for kind in "xy"
            for size in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")
        ),
        tuple(f"trunk_output.block{number}" for number in range(1, 5)),
    ),
    "vgg11_bn": _features(7, 14, 21, 28),
    "vgg13_bn": _features(13, 20, 27, 34),
    "vgg16_bn": _features(13, 23, 33, 43),
    "vgg19_bn": _features(13, 26, 39, 52),
    **dict.fromkeys(
        (f"densenet{depth}" for depth in (121, 161, 169, 201)),
        tuple(f"features.denseblock{number}" for number in range(1, 5)),
    ),
    **dict.fromkeys(
        (f"swin_{version}{size}" for version in ("", "v2_") for size in "tsb"),
        _features(1, 3, 5, 7),
    ),
    **{
        name: tuple(f"encoder.layers.encoder_layer_{depth * n // 4 - 1}" for n in range(1, 5))
        for name, depth in VISION_TRANSFORMERS.items()
    },
}

# The CIFAR ResNets have three stages and torchvision's ResNets four; each ends with a ReLU.
DEFAULT_STAGES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(CIFAR_RESNETS, ("layer1", "layer2", "layer3")),
    **dict.fromkeys(TORCHVISION_RESNETS, ("layer1", "layer2", "layer3", "layer4")),
    **_OTHER_STAGES,
}


def may_have_stem(arch: str) -> bool:
    """Return True for this project's and torchvision's networks, which accept `stem`."""
    return not arch.startswith((PYTHON_PREFIX, TIMM_PREFIX))


def has_stem(arch: str) -> bool:
    """Return True if `stem` changes the network. Others ignore it or accept a single value."""
    return arch not in CIFAR_RESNETS and may_have_stem(arch)


def stem_hint(arch: str, stem: str, image_shape: tuple[int, int, int], key: str) -> str:
    """Return a hint about a stem that is slow for images of shape (H, W, C), or ""."""
    height, width, _ = image_shape
    if arch not in TORCHVISION_RESNETS or stem != "cifar" or min(height, width) < 64:
        return ""
    return (
        f"hint: {arch} with {key}: cifar keeps all of {height}x{width} pixels, which makes it "
        f"about six times slower than with {key}: imagenet"
    )


def known_archs() -> tuple[str, ...]:
    """Return the names of networks that need no prefix."""
    return tuple(DEFAULT_STAGES)


def timm_model(arch: str) -> str:
    """Return the timm model's name without the prefix, or "" if `arch` is not a timm model."""
    return arch.removeprefix(TIMM_PREFIX) if arch.startswith(TIMM_PREFIX) else ""
