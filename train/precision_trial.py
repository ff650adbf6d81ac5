"""Times the network's training step in two precisions on a CPU, where bfloat16 may be the slower.

With random images and labels, so that no cache is needed: `train check` says it before the teacher
runs. `train plan` times whole steps, of a cache (`train.trial`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from configs.schema import StudentConfig, TeacherConfig
from nets.precision import autocast
from nets.zoo import build_net
from runtime.cost import measured_rate
from runtime.formats import format_rate
from views.augment import view_shape
from views.datasets import load_dataset

FASTER = 1.1  # by less, the rates of two trials do not differ
_BATCH_SIZE = 8  # enough to tell precisions apart, and 2 s at most for a large network


def precision_hint(
    config: StudentConfig, teacher: TeacherConfig, caches_dir: Path, device: torch.device
) -> str:
    """Return a line if the config's precision is slower than float32 on this CPU, "" otherwise.

    Raises DatasetError, ArchError.
    """
    precision = config.training.precision
    if device.type != "cpu" or precision == "float32":
        return ""
    dataset = load_dataset(teacher.dataset, caches_dir)
    shape = view_shape(dataset.train.first_shape, teacher.views.augment)
    rates = {
        each: measured_rate(_steps(config, shape, dataset.num_classes, each), of_processor=True)
        for each in (precision, "float32")
    }
    if rates["float32"] < FASTER * rates[precision]:
        return ""
    return format_slower(precision, rates[precision], rates["float32"])


def format_slower(precision: str, rate: float, float32_rate: float) -> str:
    """Return the hint for a run whose precision is slower. Rates are images per second."""
    slower = f"{format_rate(rate)} against {format_rate(float32_rate)} images/s"
    return f"hint: training.precision: {precision} is slower than float32 on this CPU: {slower}"


def _steps(
    config: StudentConfig, shape: tuple[int, int, int], num_classes: int, precision: str
) -> Iterator[int]:
    """Take steps of plain cross-entropy without end; yields the number of images of each."""
    network = build_net(config.student, num_classes=num_classes, image_shape=shape, seed=0)
    network.train()
    height, width, channels = shape
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_BATCH_SIZE, channels, height, width, generator=generator)
    labels = torch.randint(num_classes, (_BATCH_SIZE,), generator=generator)
    images = images.to(memory_format=torch.channels_last)
    while True:
        network.zero_grad()
        with autocast(precision, images.device):
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
        yield _BATCH_SIZE
