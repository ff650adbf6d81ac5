"""Real studies on made-up images: the shapes of the published pairs, no dataset, random weights.

Everything but the pixels and the weights is what a user runs: config, cache, outputs, loop. Speed
does not depend on either.
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
from teach_once.store import TeacherCache
from teach_once.train.engine.step import TrainContext, active_terms, epoch_steps, start_epoch
from teach_once.train.engine.train_state import capture_maps
from teach_once.train.runs.study import Study
from teach_once.train.runs.teachers import StudyTeacher
from teach_once.views.datasets import Dataset
from teach_once.views.splits import Split, array_split

# A network without training, in evaluation mode, gives numbers that float16 cannot hold.
_TAPS = (
    "taps.logits=float32",
    "taps.channel_means=float32",
    "taps.attention=null",
    "taps.hint=null",
)


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


def shapes_for(device: torch.device, named: str) -> dict[str, Shape]:
    """The named shapes; by default all that a device goes through in a few minutes.

    A GPU gets 32 times the images, so that its start does not count.
    """
    names = named.split() or list(SHAPES)
    if unknown := [name for name in names if name not in SHAPES]:
        raise SystemExit(f"no shape {unknown[0]!r}: there are {', '.join(SHAPES)}")
    if device.type != "cuda":
        slow = () if named else ("cifar-152-50",)  # it alone takes five minutes
        return {name: SHAPES[name] for name in names if name not in slow}
    return {name: replace(SHAPES[name], num_train=32 * SHAPES[name].num_train) for name in names}


def configs_of(
    shape: Shape, folder: Path, overrides: Sequence[str] = ()
) -> tuple[StudentConfig, TeacherConfig]:
    """The shipped configs, with few views, and without ImageNet's crop, which is Pillow's work."""
    student = load_student(shape.student, list(overrides))
    views = {"type": "pad-crop-flip", "pad_px": 1}
    own = [f"views.augment={json.dumps(views)}", "views.evaluation=null"]
    own += [f"views.count={shape.num_views}", f"teacher.weights={folder / 'teacher.pt'}"]
    return student, load_teacher(student.teacher, [*_TAPS, *own])


def random_split(rng: np.random.Generator, count: int, size: int, channels: int, k: int) -> Split:
    """`count` images of `size` pixels with random labels of `k` classes."""
    images = rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    return array_split(images, rng.integers(0, k, count), "noise")


def dataset_of(shape: Shape, teacher: TeacherConfig) -> Dataset:
    """Random pixels and labels."""
    size = {"digits": 8, "imagenet": 224}.get(shape.student.split("-")[0], 32)
    channels, rng = len(teacher.dataset.normalization.mean), np.random.default_rng(0)
    train, test = (
        random_split(rng, count, size, channels, shape.classes)
        for count in (shape.num_train, shape.num_test)
    )
    digest = hashlib.sha256(train.images.tobytes()).hexdigest()
    return Dataset("noise", tuple(map(str, range(shape.classes))), train, None, test, digest)


def save_random_weights(
    file: Path, arch: str, classes: int, channels: int = 3, stem: str = "cifar"
) -> None:
    network = build(arch, num_classes=classes, in_channels=channels, stem=stem)
    save_atomically(network.state_dict(), file)


def setup_of(
    shape: Shape, folder: Path, overrides: Sequence[str] = ()
) -> tuple[Setup, StudentConfig]:
    """A teacher with random weights on random images; its cache is to be made."""
    student, teacher = configs_of(shape, folder, overrides)
    channels, spec = len(teacher.dataset.normalization.mean), teacher.teacher
    save_random_weights(folder / "teacher.pt", spec.arch, shape.classes, channels, spec.stem)
    dataset = dataset_of(shape, teacher)
    return setup.setup_of(teacher, dataset, folder / "caches"), student


def make_cache(made: Setup, options: PassOptions) -> TeacherCache:
    """The teacher's cache, by its pass."""
    cache = fill_cache(made, options, Console(file=io.StringIO()))
    assert cache is not None
    return cache


def study_of(
    shape: Shape, folder: Path, device: torch.device, overrides: Sequence[str] = ()
) -> Study:
    """The study of `setup_of`, with its cache made."""
    made, student = setup_of(shape, folder, overrides)
    return study_with(made, student, make_cache(made, PassOptions(device, 64)))


def study_with(made: Setup, student: StudentConfig, cache: TeacherCache) -> Study:
    """Its runs are kept next to the caches."""
    runs = made.path.parent.with_name("runs")
    return Study(student, (StudyTeacher(made.config, cache),), made.dataset, runs)


def steps_of_epoch(context: TrainContext, epoch: int) -> Iterator[object]:
    """The steps of one epoch, with the terms that are active at the end of the run."""
    terms = active_terms(context.run.terms, context.run.training.epochs)
    return epoch_steps(context, epoch, start_epoch(context, epoch), terms)


def endless_steps(context: TrainContext) -> Iterator[None]:
    """Training endlessly, one step per `next`, without the tests between epochs."""
    context.train_state.network.train()
    batch_size = context.run.training.batch_size
    with capture_maps(context.train_state, context.data.train, batch_size):
        for epoch in itertools.count(1):
            for _ in steps_of_epoch(context, epoch):
                yield
