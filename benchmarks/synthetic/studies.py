"""Real studies on made-up images: the shapes of the published pairs, no data set, random weights.

Everything but the pixels and the weights is what a user runs: config, cache, feed, loop. Speed does
not depend on either.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from teach_once.configs.load import load_student, load_teacher
from teach_once.configs.schema import StudentConfig, TeacherConfig
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.compute import setup
from teach_once.precompute.compute.setup import Setup
from teach_once.precompute.compute.teacher_pass import PassOptions
from teach_once.precompute.run_pass import fill_cache
from teach_once.train.engine.step import TrainContext, active_terms, epoch_steps, start_epoch
from teach_once.train.engine.train_state import capture_maps
from teach_once.train.runs.study import Study
from teach_once.views.datasets import Dataset
from teach_once.views.splits import array_split

# A network without training, in evaluation mode, gives numbers that float16 cannot hold.
_TAPS = ("taps.logits=float32", "taps.means=float32", "taps.energy=null", "taps.hint=null")


@dataclass(frozen=True)
class Shape:
    """One published pair, with as many images as can be afforded."""

    student: str  # a student config
    num_train: int
    num_test: int = 64
    num_views: int = 2
    classes: int = 10


SHAPES = {
    "digits": Shape("digits-resnet8", num_train=1000),
    "cifar-56-20": Shape("cifar10-resnet20", num_train=1024),
    "cifar-110-32": Shape("cifar100-resnet32", num_train=512, classes=100),
    "cifar-152-50": Shape("cifar100-resnet50", num_train=128, classes=100),
    "imagenet-34-18": Shape("imagenet-resnet18", num_train=32, num_test=8, classes=1000),
}


def shapes_for(device: torch.device, named: str | None) -> dict[str, Shape]:
    """The shapes that are named; else all that a device goes through in a few minutes.

    A GPU gets 32 times the images, so that what is measured is not its start.
    """
    names = named.split() if named else list(SHAPES)
    if unknown := [name for name in names if name not in SHAPES]:
        raise SystemExit(f"no shape {unknown[0]!r}: there are {', '.join(SHAPES)}")
    if device.type != "cuda":
        slow = () if named else ("cifar-152-50",)  # it alone takes five minutes
        return {name: SHAPES[name] for name in names if name not in slow}
    return {name: replace(SHAPES[name], num_train=32 * SHAPES[name].num_train) for name in names}


def configs_of(
    shape: Shape, folder: Path, overrides: Sequence[str] = ()
) -> tuple[StudentConfig, TeacherConfig]:
    """The shipped configs, with few views; the crop of ImageNet is left out, being Pillow's."""
    student = load_student(shape.student, list(overrides))
    views = {"kind": "pad-crop-flip", "pad_px": 1}
    teacher = load_teacher(
        student.teacher,
        [
            *_TAPS,
            f"views.augment={json.dumps(views)}",
            "views.evaluation=null",
            f"views.count={shape.num_views}",
            f"teacher.weights={folder / 'teacher.pt'}",
        ],
    )
    return student, teacher


def dataset_of(shape: Shape, teacher: TeacherConfig, seed: int = 0) -> Dataset:
    """Random pixels and labels."""
    size = {"digits": 8, "imagenet": 224}.get(shape.student.split("-")[0], 32)
    channels = len(teacher.dataset.normalisation.mean)
    rng = np.random.default_rng(seed)
    splits = {}
    for name, count in (("train", shape.num_train), ("test", shape.num_test)):
        images = rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8)
        splits[name] = array_split(images, rng.integers(0, shape.classes, count), "noise")
    digest = hashlib.sha256(splits["train"].images.tobytes()).hexdigest()
    names = tuple(map(str, range(shape.classes)))
    return Dataset("noise", names, splits["train"], None, splits["test"], digest)


def setup_of(
    shape: Shape, folder: Path, overrides: Sequence[str] = ()
) -> tuple[Setup, StudentConfig]:
    """A teacher with random weights on random images, and where its cache would lie."""
    student, teacher = configs_of(shape, folder, overrides)
    dataset = dataset_of(shape, teacher)
    network = build(
        teacher.teacher.arch,
        num_classes=shape.classes,
        in_channels=len(teacher.dataset.normalisation.mean),
        stem=teacher.teacher.stem,
    )
    save_atomically(network.state_dict(), folder / "teacher.pt")
    return setup.setup_of(teacher, dataset, folder / "caches"), student


def study_of(
    shape: Shape, folder: Path, device: torch.device, overrides: Sequence[str] = ()
) -> Study:
    """The same with its cache made."""
    setup, student = setup_of(shape, folder, overrides)
    cache = fill_cache(setup, PassOptions(device, 64), Console(file=io.StringIO()))
    assert cache is not None
    return Study(student, setup.config, setup.dataset, cache, folder / "runs")


def steps(context: TrainContext) -> Iterator[None]:
    """Training endlessly, one step per `next`, without the tests between epochs."""
    run, train_state = context.run, context.train_state
    terms = active_terms(run.terms, run.training.epochs)
    train_state.network.train()
    with capture_maps(train_state, context.data.train, run.training.batch_size):
        for epoch in itertools.count(1):
            for _ in epoch_steps(context, epoch, start_epoch(context, epoch), terms):
                yield
