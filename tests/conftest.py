"""Small real objects that many tests share: a trained digits teacher and its caches."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from rich.console import Console

from configs.load import load_student, load_teacher
from configs.schema import StudentConfig, TeacherConfig, as_plain
from nets.archs import has_stem
from nets.source import arch_source
from nets.taps import stage_modules
from precompute.run import PassOptions, fill_cache
from precompute.setup import Setup
from store import TeacherCache
from store.identity import cache_identity, file_sha256
from store.reader import cache_folder
from train.study import Study, open_study
from train.teacher import train_teacher
from views.augment import AUGMENT_VERSION
from views.datasets import load_dataset

CPU = torch.device("cpu")

# One thread: these networks are too small for more, and tests share the machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# A busy machine is slow, which says nothing of the code.
# The same examples every time: a failure then belongs to the change that brought it.
settings.register_profile(
    "here", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("here")


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="session")
def teacher_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A resnet8 trained for three epochs: right often, and wrong often enough for GKD to matter."""
    path = tmp_path_factory.mktemp("weights") / "teacher.pt"
    config = load_teacher(
        "digits-resnet20",
        ["teacher.arch=resnet8", f"teacher.weights={path}", "training.epochs=3"],
    )
    train_teacher(config, device="cpu", console=Console(file=io.StringIO()))
    return path


@pytest.fixture
def small_teacher(teacher_weights: Path) -> Callable[..., TeacherConfig]:
    """A teacher config on 60 digits with three views; more overrides may follow."""

    def make(*overrides: str) -> TeacherConfig:
        return load_teacher(
            "digits-resnet20",
            [
                "teacher.arch=resnet8",
                f"teacher.weights={teacher_weights}",
                "dataset.limit=6",
                "views.count=3",
                "taps.energy=null",
                "taps.hint=null",
                *overrides,
            ],
        )

    return make


@pytest.fixture
def student_overrides() -> list[str]:
    """They make digits-resnet8 a run of four epochs of four steps."""
    return [
        "training.epochs=4",
        "training.batch_size=16",
        "training.learning_rate=0.01",
        "training.schedule.milestones=[2]",
        "methods.cd+gkd+edt.0.start_epoch=2",
        "methods.cd+gkd+edt.1.start_epoch=2",
    ]


@pytest.fixture
def small_student(student_overrides: list[str]) -> Callable[..., StudentConfig]:
    """A student config of four epochs of four steps; more overrides may follow."""

    def make(*overrides: str) -> StudentConfig:
        return load_student("digits-resnet8", [*student_overrides, *overrides])

    return make


def setup_of(config: TeacherConfig, caches_dir: Path) -> Setup:
    dataset = load_dataset(config.dataset)
    stages = stage_modules(config.teacher.arch, config.taps.stages)
    identity = cache_identity(
        as_plain(config),
        dataset_digest=dataset.digest,
        dataset_type=dataset.type,
        augment_version=AUGMENT_VERSION,
        stages=stages,
        weights_sha256=file_sha256(Path(config.teacher.weights)),
        source=arch_source(config.teacher.arch),
        limit_cuts=dataset.limit_cuts,
        has_stem=has_stem(config.teacher.arch),
    )
    path = cache_folder(caches_dir, config.name, identity)
    return Setup(config, dataset, stages, identity, path)


def make_cache(
    config: TeacherConfig,
    caches_dir: Path,
    *,
    batch_size: int = 256,
    block_rows: int | None = 16,
) -> TeacherCache:
    options = PassOptions(CPU, batch_size, block_rows)
    cache = fill_cache(setup_of(config, caches_dir), options, Console(file=io.StringIO()))
    assert cache is not None
    return cache


@pytest.fixture
def make_study(
    small_teacher: Callable[..., TeacherConfig],
    small_student: Callable[..., StudentConfig],
    tmp_path: Path,
) -> Callable[..., Study]:
    """A study with its cache made; overrides for the teacher and for the student."""

    def make(teacher: Sequence[str] = (), student: Sequence[str] = ()) -> Study:
        config = small_teacher(*teacher)
        make_cache(config, tmp_path / "caches")
        return open_study(
            small_student(*student),
            config,
            caches_dir=tmp_path / "caches",
            runs_dir=tmp_path / "runs",
        )

    return make


def write_image_folder(
    root: Path,
    *,
    per_class: int = 3,
    size: int | tuple[int, int] = 12,
    classes: Sequence[str] = ("cat", "dog"),
) -> Path:
    """A genuine tree of small PNG files: root/train/<class>/NN.png and root/test/<class>/NN.png."""
    rng = np.random.default_rng(0)
    height, width = (size, size) if isinstance(size, int) else size
    for split in ("train", "test"):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of ten images of different sizes to train on, two to test with."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(12, 40, 2)
                image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(image).save(root / split / name / f"{number}.png")
    return root
