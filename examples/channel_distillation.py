"""python -m examples.channel_distillation    (after `make cache-teacher`)

Channel distillation in plain code, from images to the loss, without this project's training code.
A connector maps each stage of the student to the teacher's number of channels, and the loss
compares channel means. Without the connector's ReLU it also works for teachers with negative means,
such as EfficientNet (see "Connectors" in docs/how-to/methods.md).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teach_once import TeacherCache, load_teacher
from teach_once.configs.schema import TeacherConfig
from teach_once.views.augment.augment import view_pixels
from teach_once.views.datasets import load_dataset
from teach_once.views.pixels.batches import normalize

STAGES = ("stage1", "stage2", "stage3")
STUDENT_CHANNELS = (8, 16, 32)


def read_batch(
    config: TeacherConfig, cache: TeacherCache, view: int, ids: np.ndarray
) -> tuple[Tensor, list[Tensor]]:
    """Return the teacher's input images (B, 1, 8, 8) and its channel means (B, C) per stage."""
    train = load_dataset(config.dataset).train
    pixels = view_pixels(train, config.views, view, ids)  # (B, 8, 8, 1) uint8
    images = normalize(torch.from_numpy(pixels), config.dataset.normalization)
    outputs = cache.read(ids, view=view, taps=STAGES)
    return images, [torch.from_numpy(outputs[stage]).float() for stage in STAGES]


def block(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class Student(nn.Module):
    """Three stages, each with a 1x1 connector to the teacher's number of channels."""

    def __init__(self, teacher_channels: list[int]) -> None:
        super().__init__()
        pairs = zip((1, *STUDENT_CHANNELS), STUDENT_CHANNELS, (1, 2, 2), strict=False)
        self.stages = nn.ModuleList([block(i, o, 3, stride) for i, o, stride in pairs])
        self.connectors = nn.ModuleList(
            [block(s, t, 1) for s, t in zip(STUDENT_CHANNELS, teacher_channels, strict=True)]
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the channel means (B, C) of each connected stage."""
        maps, means = images, []
        for stage, connector in zip(self.stages, self.connectors, strict=True):
            maps = stage(maps)
            means.append(connector(maps).mean(dim=(2, 3)))
        return means


def cd_loss(student_means: list[Tensor], teacher_means: list[Tensor]) -> Tensor:
    """Sum the mean squared difference of the channel means over the stages."""
    pairs = zip(student_means, teacher_means, strict=True)
    return torch.stack([F.mse_loss(student, teacher) for student, teacher in pairs]).sum()


def main(teacher: str | Path = "digits-resnet20", caches: str | Path = "caches") -> float:
    """Print and return the loss of 32 images, and compute gradients of every layer."""
    config = load_teacher(teacher)
    cache = TeacherCache.open(next(Path(caches).glob(f"{config.name}-*")))
    images, teacher_means = read_batch(config, cache, view=0, ids=np.arange(32))
    student = Student([means.shape[1] for means in teacher_means])
    loss = cd_loss(student(images), teacher_means)
    loss.backward()
    print(f"loss {loss.item():.4f}")
    return loss.item()


if __name__ == "__main__":
    main()
