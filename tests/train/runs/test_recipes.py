"""Every included config works: plan, cache and a training step on images of its shape."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from teach_once.configs.load import available, load_student, load_teacher
from teach_once.configs.schema import as_plain
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.compute.teacher_pass import PassOptions
from teach_once.precompute.run_pass import fill_cache, plan_pass
from teach_once.train.runs.study import open_study
from teach_once.train.schedule import weight_at
from teach_once.train.sessions.student import train_student
from tests.support.caches.teacher_cache import CPU, setup_of


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """Two classes of two 32x32 images, to train on and to test with."""
    rng = np.random.default_rng(0)
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path / "data"


def test_the_imagenet_config_has_the_papers_numbers() -> None:
    config = load_student("imagenet-resnet18")
    ce, gkd, cd = config.methods["cd+gkd+edt"]
    assert [weight_at(ce, e) for e in (1, 30, 31, 100)] == [0, 0, 1, 1]
    assert [weight_at(gkd, e) for e in (30, 31)] == [0, 1]
    weights = [weight_at(cd, e) for e in (1, 29, 30, 60, 90)]
    assert weights == pytest.approx([6, 6, 5.4, 4.86, 4.374])
    recipe = config.training
    assert (recipe.batch_size, recipe.learning_rate, recipe.weight_decay) == (256, 0.1, 1e-4)
    assert recipe.freeze_idle_classifier is False
    views = load_teacher(config.teacher).views
    assert (views.augment.size_px, views.augment.scale) == (224, (0.08, 1.0))
    assert (views.eval_transform.resize_px, views.eval_transform.crop_px) == (256, 224)


def dataset_overrides(name: str, folder: Path) -> list[str]:
    """The config's own normalization on the tiny folder; digits bring their own data."""
    config = load_teacher(name)
    if config.dataset.type == "digits":
        return ["dataset.max_per_class=2"]
    moments = as_plain(config.dataset)["normalization"]
    data = {"type": "imagefolder", "root": str(folder), "normalization": moments}
    return [f"dataset={json.dumps(data)}"]


# In bfloat16, which most processors only emulate, one step of these takes ten times as long; the
# smaller networks take it in their config's precision.
IN_FLOAT32 = ("cifar10-resnet50", "cifar100-resnet50", "imagenet-")

# A sixth of the pixels of 224 x 224, which the test above asks for.
SMALL = [
    f"views.{key}={px}"
    for key, px in [
        ("augment.size_px", 96),
        ("evaluation.resize_px", 110),
        ("evaluation.crop_px", 96),
    ]
]

# Seconds each, of the networks of another config that is not among them.
LONG = (
    "cifar10-resnet50",
    "cifar100-resnet50",
    "imagenet-resnet18-adamw",
    "imagenet-resnet18-patient",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if name in LONG else [])
        for name in available("student")
    ],
)
def test_a_student_of_every_config_trains_from_its_teachers_cache(
    name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    in_float32 = name.startswith(IN_FLOAT32)
    student = load_student(
        name,
        [
            *("training.epochs=1", "training.batch_size=4", "training.schedule={type: onecycle}"),
            *(["training.precision=float32"] if in_float32 else []),
        ],
    )
    teacher = load_teacher(
        student.teacher,
        [
            *dataset_overrides(student.teacher, tiny_folder),
            f"teacher.weights={tmp_path / 'w.pt'}",
            "views.count=1",
            # Untrained deep networks in evaluation mode give numbers that float16 cannot hold.
            "taps.logits=float32",
            "taps.channel_means=float32",
            *(["teacher.precision=float32"] if in_float32 else []),
            *(SMALL if student.teacher.startswith("imagenet-") else []),
        ],
    )
    is_digits = teacher.dataset.type == "digits"
    network = build(
        teacher.teacher.arch,
        num_classes=10 if is_digits else 2,
        in_channels=1 if is_digits else 3,
        stem=teacher.teacher.stem,
    )
    save_atomically(network.state_dict(), tmp_path / "w.pt")
    setup, options = setup_of(teacher, tmp_path / "caches"), PassOptions(CPU, batch_size=4)
    plan = plan_pass(setup, options)
    assert plan.pending_records == len(setup.dataset.train)
    fill_cache(setup, options, Console(file=io.StringIO()))
    study = open_study(student, teacher, caches_dir=tmp_path / "caches", runs_dir=tmp_path / "runs")
    summary = train_student(study.run("cd+gkd", 0), device="cpu")
    assert 0 <= summary["last"]["top1_error"] <= 100


@pytest.mark.parametrize("name", available("student"))
def test_every_method_of_every_config_acts_from_its_first_epoch_to_its_last(name: str) -> None:
    config = load_student(name)
    original = {"ce", "kd", "cd", "cd+gkd", "cd+gkd+edt", "rkd", "dkd", "dist"}
    assert original <= set(config.methods)
    if not name.startswith("imagenet"):  # whose maps are too large to keep
        own = {"residual"} if name.startswith("digits") else set()  # whose cache has a hint
        if name == "cifar10-16px-resnet8":  # which takes Early Decay Teacher apart
            own = {"cd+gkd+decay", "cd+gkd+early"}
        assert set(config.methods) == original | {"at", "fitnets", "lskd"} | own
    for terms in config.methods.values():
        assert all(term.start_epoch <= config.training.epochs for term in terms)
        for epoch in range(1, config.training.epochs + 1):
            assert any(weight_at(term, epoch) for term in terms)


def test_the_papers_config_has_the_papers_numbers() -> None:
    config = load_student("cifar100-resnet50")
    ce, gkd, cd = config.methods["cd+gkd+edt"]
    assert [weight_at(ce, e) for e in (1, 60, 61, 200)] == [0, 0, 1, 1]
    assert [weight_at(gkd, e) for e in (60, 61)] == [0, 0.1]
    assert [weight_at(cd, e) for e in (1, 59, 60, 160)] == pytest.approx([6, 6, 5.4, 4.86])
    assert config.training.freeze_idle_classifier is False
    assert (config.training.batch_size, config.training.learning_rate) == (128, 0.1)
    assert load_teacher(config.teacher).views.augment.padding == "reflect"
