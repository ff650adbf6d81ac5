"""A teacher whose duration and failures are set by files of a folder, for all processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

FOLDER = "SLOW_TEACHER_FOLDER"  # environment variable


class Slow(nn.Module):
    """A network that takes the time in `seconds` per batch, and gives NaN with a file `poison`."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(in_channels, 4, 3)
        self.head = nn.Linear(4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        folder = Path(os.environ.get(FOLDER, "/nonexistent"))
        if (folder / "seconds").is_file() and len(images) > 1:
            time.sleep(float((folder / "seconds").read_text()))
        logits = self.head(self.body(images).relu().mean(dim=(2, 3)))
        if (folder / "poison").is_file():
            with (folder / "poison").open("a") as attempts:
                attempts.write("x")
            logits = logits * float("nan")
        return logits


def save_weights(path: Path) -> None:
    torch.manual_seed(0)
    torch.save(Slow(10, 1).state_dict(), path)


def overrides_of(weights: Path) -> list[str]:
    """Return overrides for the digits teacher with this network: 160 samples, 3 views."""
    return [
        "teacher.arch=python:tests.support.slow_teacher:Slow",
        f"teacher.weights={weights}",
        "taps.stages=[body]",
        "taps.logits=float32",
        "taps.channel_means=float32",
        "taps.attention=null",
        "taps.hint=null",
        "dataset.max_per_class=16",
        "views.count=3",
        "training=null",
    ]
