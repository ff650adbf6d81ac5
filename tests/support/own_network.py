"""A user's own network, for `arch: python:tests.support.own_network:make`."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional


def make(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


def wrong(num_classes: int, in_channels: int) -> str:
    return "not a network"


class Dropping(nn.Module):
    """A network with random draws in its three stages: dropout twice, and whole samples."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.ReLU(), nn.Dropout2d(0.3))
        self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = functional.dropout(self.second(self.first(images)).relu(), 0.3, self.training)
        added = self.third(features).relu()
        if self.training:
            added = added * (torch.rand(len(features), 1, 1, 1) < 0.5)
        features = features + added
        return self.head(features.mean(dim=(2, 3)))


DROPPING = (
    "student.arch=python:tests.support.own_network:Dropping",
    "student.stages=[first,second,third]",
)


class InPlace(nn.Module):
    """A network whose tapped stages are overwritten by the next operation."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = images
        for stage in (self.first, self.second, self.third):
            features = functional.relu_(stage(features))
        return self.head(features.mean(dim=(2, 3)))


class OnePixel(nn.Module):
    """A network with batch norm of one-pixel maps and the prefix `net.` of a wrapper."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        pooled = [nn.Conv2d(in_channels, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8)]
        self.net = nn.Sequential(*pooled, nn.Flatten(), nn.Linear(8, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


class Scaled(OnePixel):
    """A network that computes another function while it is exported."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images) * (1.0 if torch.compiler.is_exporting() else 2.0)


ONE_PIXEL = (
    "student.arch=python:tests.support.own_network:OnePixel",
    "student.stages=[net.0,net.1,net.2]",
)


def wide_kernel(num_classes: int, in_channels: int) -> nn.Module:
    """Build a network for images of at least 16 pixels."""
    body = nn.Conv2d(in_channels, 4, kernel_size=16)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
    return nn.Sequential(OrderedDict(body=body, head=head))


def without_arguments() -> nn.Module:
    return nn.Flatten()


def vision_transformer(num_classes: int, in_channels: int) -> nn.Module:
    """Build a small vision transformer of torchvision for images of 32 pixels."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 4, 2, 24, 32, num_classes=num_classes)


def swin(num_classes: int, in_channels: int) -> nn.Module:
    """torchvision's, small."""
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 16, [1, 1, 1, 1], [1, 2, 4, 8], [2, 2], num_classes=num_classes)
