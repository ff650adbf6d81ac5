"""The networks by name, with their default stages, as data; imports no torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


class ArchError(ValueError):
    """A network that cannot be built: an unknown name, or weights that do not fit."""


@dataclass(frozen=True)
class CifarResNetShape:
    """6n+2 layers: n basic blocks per stage; widths of the stem and of the three stages."""

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
TORCHVISION_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

# The small-image ResNets have three stages, torchvision's four; each ends with a ReLU.
DEFAULT_STAGES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(CIFAR_RESNETS, ("layer1", "layer2", "layer3")),
    **dict.fromkeys(TORCHVISION_RESNETS, ("layer1", "layer2", "layer3", "layer4")),
}


def known_archs() -> tuple[str, ...]:
    return tuple(DEFAULT_STAGES)


def check_arch(arch: str) -> None:
    """Raise ArchError, with the known names, unless `arch` is one of them."""
    if arch in DEFAULT_STAGES:
        return
    close = difflib.get_close_matches(arch, known_archs(), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ArchError(f"unknown arch {arch!r}{hint} Known: {', '.join(known_archs())}")
