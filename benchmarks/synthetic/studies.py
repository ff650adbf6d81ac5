"""Real studies on made-up images, as files in a folder: shipped configs with overrides, no dataset.

Everything but the pixels and the teacher's random weights is what a user runs: configs, cache,
outputs, loop. Speed does not depend on either.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from teach_once.configs.load import load_student, load_teacher, to_yaml
from teach_once.configs.schema import as_plain
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.compute.setup import Setup, prepare
from teach_once.precompute.compute.teacher_pass import PassOptions
from teach_once.precompute.run_pass import fill_cache
from teach_once.store import TeacherCache
from teach_once.train.engine.step import TrainContext, active_terms, epoch_steps, start_epoch
from teach_once.train.engine.train_state import capture_maps
from teach_once.train.runs.study import Study, open_study
from teach_once.views.packed.write import pack_pixels
from teach_once.views.splits import ImageSource, array_split

# A network without training, in evaluation mode, gives numbers that float16 cannot hold.
_TAPS = "taps={logits: float32, channel_means: float32}"


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
    """Return the named shapes; by default all shapes that take a device a few minutes.

    A GPU gets 32 times the images, so that its start-up is negligible.
    """
    names = named.split() or list(SHAPES)
    if unknown := [name for name in names if name not in SHAPES]:
        raise SystemExit(f"no shape {unknown[0]!r}: there are {', '.join(SHAPES)}")
    if device.type != "cuda":
        slow = () if named else ("cifar-152-50",)  # it alone takes five minutes
        return {name: SHAPES[name] for name in names if name not in slow}
    return {name: replace(SHAPES[name], num_train=32 * SHAPES[name].num_train) for name in names}


class StudyFiles:
    """The paths of a study; the teacher's cache and the runs are in the same folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.caches, self.runs = folder, folder / "caches", folder / "runs"
        self.teacher = str(folder / "bench-teacher.yaml")
        self.student = str(folder / "bench-student.yaml")
        paths = {"STUDENT": self.student, "CACHES": self.caches, "RUNS": self.runs}
        self.make_variables = [f"{name}={path}" for name, path in paths.items()]

    def setup(self, *overrides: str) -> Setup:
        return prepare(self.teacher, list(overrides), self.caches)

    def study(self) -> Study:
        student, teacher = load_student(self.student), load_teacher(self.teacher)
        return open_study(student, teacher, caches_dir=self.caches, runs_dir=self.runs)


def write_study(
    folder: Path,
    dataset: Mapping[str, str],
    teacher: Sequence[str] = (),
    student: Sequence[str] = (),
    *,
    shipped: str = "cifar10-resnet20",
    classes: int = 10,
) -> StudyFiles:
    """Write configs and weights. teacher, student: overrides of the configs of `shipped`."""
    files, weights = StudyFiles(folder), folder / "teacher.pt"
    config = load_student(shipped, student)
    mean_std = load_teacher(config.teacher).dataset.normalization
    data = json.dumps({**dataset, "normalization": as_plain(mean_std)})
    own = [f"dataset={data}", "views.evaluation=null", f"teacher.weights={weights}", *teacher]
    full, channels = load_teacher(config.teacher, own), len(mean_std.mean)
    arch, stem = full.teacher.arch, full.teacher.stem
    network = build(arch, num_classes=classes, in_channels=channels, stem=stem)
    save_atomically(network.state_dict(), weights)
    Path(files.teacher).write_text(to_yaml(full))
    Path(files.student).write_text(to_yaml(replace(config, teacher=files.teacher)))
    return files


def write_shape(shape: Shape, folder: Path, overrides: Sequence[str] = ()) -> StudyFiles:
    """Write a study of random images, with few views and without ImageNet's crop.

    The crop would measure Pillow. overrides: overrides of the student's config.
    """
    rng, names = np.random.default_rng(0), tuple(map(str, range(shape.classes)))
    kind = shape.student.partition("-")[0]
    size, channels = {"digits": (8, 1), "imagenet": (224, 3)}.get(kind, (32, 3))
    train, test = (
        array_split(
            rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8),
            rng.integers(0, shape.classes, count),
            "noise",
        )
        for count in (shape.num_train, shape.num_test)
    )
    zeros = "0" * 64  # in place of digests
    noise = ImageSource("noise", "packed", names, train, test, lambda ids: zeros, lambda: zeros)
    pack_pixels(noise, folder / "images.h5")
    views = ["views.augment={type: pad-crop-flip, pad_px: 1}", f"views.count={shape.num_views}"]
    data = {"type": "packed", "file": str(folder / "images.h5")}
    own, classes = [*views, _TAPS], shape.classes
    return write_study(folder, data, own, overrides, shipped=shape.student, classes=classes)


def make_cache(setup: Setup, options: PassOptions) -> TeacherCache:
    """Compute the teacher's cache."""
    cache = fill_cache(setup, options, Console(file=io.StringIO()))
    assert cache is not None
    return cache


def study_of(
    shape: Shape, folder: Path, device: torch.device, overrides: Sequence[str] = ()
) -> Study:
    """Write a study as `write_shape` does, compute its cache and open it."""
    files = write_shape(shape, folder, overrides)
    make_cache(files.setup(), PassOptions(device, 64))
    return files.study()


def steps_of_epoch(context: TrainContext, epoch: int) -> Iterator[object]:
    """Yield the steps of one epoch, with the terms that are active at the end of the run."""
    terms = active_terms(context.run.terms, context.run.training.epochs)
    return epoch_steps(context, epoch, start_epoch(context, epoch), terms)


def endless_steps(context: TrainContext) -> Iterator[None]:
    """Train endlessly, one step per `next`, without the tests between epochs."""
    context.train_state.network.train()
    batch_size = context.run.training.batch_size
    with capture_maps(context.train_state, context.data.train, batch_size):
        for epoch in itertools.count(1):
            for _ in steps_of_epoch(context, epoch):
                yield
