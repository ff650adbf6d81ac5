"""A network of a user's own, as `arch: python:tests.own_network:make` finds it."""

from __future__ import annotations

from torch import nn


def make(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


def wrong(num_classes: int, in_channels: int) -> str:
    return "not a network"
