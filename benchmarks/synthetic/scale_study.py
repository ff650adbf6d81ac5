"""A study of a linked image folder, with a complete cache whose records are made up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.synthetic.linked_tree import CLASSES, linked_tree
from teach_once.configs.load import load_student, load_teacher
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.compute.setup import Setup, prepare
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.store import CacheWriter
from teach_once.store.format.spec import SAMPLE_CRC
from teach_once.train.runs.study import Study, open_study

CHANNELS = 16  # of the one stage that is stored
TEACHER = """
dataset:
  type: imagefolder
  root: {folder}/tree
  normalisation: {{mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}}
views: {{augment: {{kind: random-resized-crop, size_px: 32{mix}}}, count: {views}}}
teacher: {{arch: resnet8, weights: {folder}/teacher.pt}}
taps: {{logits: null, means: uint8, stages: [layer1]}}
"""
STUDENT = """
teacher: {folder}/scale-teacher.yaml
student: {{arch: resnet8, stages: [layer1]}}
training: {{epochs: 4, batch_size: 128, learning_rate: 0.1, schedule: {{kind: onecycle}}}}
methods: {{cd: [{{loss: ce}}, {{loss: cd}}]}}
"""


@dataclass(frozen=True)
class ScaleStudy:
    """The files of one size, in `folder`."""

    folder: Path
    num_samples: int
    num_views: int

    @property
    def caches(self) -> Path:
        return self.folder / "caches"

    @property
    def teacher(self) -> str:
        return str(self.folder / "scale-teacher.yaml")

    @property
    def mixing_teacher(self) -> str:
        return str(self.folder / "scale-mixing.yaml")

    @property
    def student(self) -> str:
        return str(self.folder / "scale-student.yaml")

    def setup(self, mixes: bool = False) -> Setup:
        return prepare(self.mixing_teacher if mixes else self.teacher, [], self.caches)

    def study(self) -> Study:
        config = load_student(self.student, [])
        return open_study(
            config,
            load_teacher(config.teacher, []),
            caches_dir=self.caches,
            runs_dir=self.folder / "runs",
        )


def make_study(folder: Path, num_samples: int, num_views: int, contents: list[bytes]) -> ScaleStudy:
    """The tree, the configs, the weights of a teacher, and its cache."""
    folder.mkdir()
    checksums = linked_tree(folder / "tree", num_samples, contents)
    network = build("resnet8", num_classes=CLASSES, in_channels=3)
    save_atomically(network.state_dict(), folder / "teacher.pt")
    study = ScaleStudy(folder, num_samples, num_views)
    for file, mix in ((study.teacher, ""), (study.mixing_teacher, ", mix: {kind: mixup}")):
        Path(file).write_text(TEACHER.format(folder=folder, views=num_views, mix=mix))
    Path(study.student).write_text(STUDENT.format(folder=folder))
    _write_cache(study.setup(), checksums)
    return study


def _write_cache(setup: Setup, checksums: NDArray[np.uint32]) -> None:
    """Every block, with the samples' own checksums and random means."""
    options = PassOptions(torch.device("cpu"), num_workers=0)
    content = TeacherPass(setup, options).content()
    means = np.random.default_rng(0).random((8192, CHANNELS), dtype=np.float32)
    with _without_flushing(), CacheWriter.open(setup.path, content) as writer:
        for item in writer.work:
            block = item.block
            records: dict[str, NDArray[Any]] = {
                "stage1": means[block.view : block.view + block.rows]
            }
            if SAMPLE_CRC in item.taps:
                records[SAMPLE_CRC] = checksums[block.start : block.stop]
            writer.write_block(block, {tap: records[tap] for tap in item.taps})
        writer.record_measured({"views": setup.config.views.num_views, "images_per_second": 1.0})


@contextmanager
def _without_flushing() -> Iterator[None]:
    """Tens of thousands of flushes would take minutes; the cache is thrown away."""
    with patch.object(os, "fsync", lambda _: None):
        yield
