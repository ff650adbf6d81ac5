"""The examples train what our own loop trains: the same loss in every step.

An example with a framework is imported by its test: they take seconds to import, and every worker
of xdist would pay for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import channel_distillation, plain_pytorch
from teach_once import DistillationDataset, TeacherCache, losses
from teach_once.configs.load import load_student, load_teacher, to_yaml
from teach_once.configs.schema import StudentConfig
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.recording.export import export_student
from teach_once.train.runs.study import Run, open_study
from teach_once.train.sessions.student import train_student
from tests.support.caches.teacher_cache import make_cache
from tests.support.project import ROOT
from tests.support.training.training_runs import largest_relative

# Both are of the same bits; of others the last ones differ with the layout of a convolution.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def study_files(
    small_teacher: Callable,
    student_overrides: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[StudentConfig, Path]:
    """A student's config whose teacher is a file, and the folder with its cache."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "digits-resnet20.yaml").write_text(to_yaml(small_teacher()))
    teacher = load_teacher(folder / "digits-resnet20.yaml")
    make_cache(teacher, folder / "caches")
    overrides = [f"teacher={folder / 'digits-resnet20.yaml'}", *student_overrides]
    return load_student("digits-resnet8", overrides), folder / "caches"


@pytest.fixture(scope="module")
def trained(
    study_files: tuple[StudentConfig, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, list[float]]:
    """A finished run of the method kd, and the loss of each of its steps."""
    config, caches = study_files
    study = open_study(
        config,
        load_teacher(config.teacher),
        caches_dir=caches,
        runs_dir=tmp_path_factory.mktemp("runs"),
    )
    epochs: list[EpochResult] = []
    train_student(study.run("kd", 0), device="cpu", on_epoch=epochs.append)
    return study.run("kd", 0), [loss for epoch in epochs for loss in epoch.step_losses]


@pytest.fixture(scope="module")
def our_losses(trained: tuple[Run, list[float]]) -> list[float]:
    return trained[1]


def test_the_recipe_of_the_examples_is_that_of_the_config(
    study_files: tuple[StudentConfig, Path],
) -> None:
    recipe, (ce, kd) = study_files[0].training, study_files[0].methods["kd"]
    assert recipe.optimizer.type == "sgd"
    assert (recipe.momentum, recipe.nesterov, recipe.weight_decay) == (0.9, False, 5e-4)
    assert (ce.loss, ce.weight, kd.loss, kd.weight) == ("ce", 0.1, "kd", 0.9)
    assert kd.options == {"temperature": 4}


@pytest.mark.usefixtures("all_digits")
def test_plain_pytorch_takes_our_steps_bit_for_bit(
    study_files: tuple[StudentConfig, Path],
    our_losses: list[float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(our_losses) == 4 * 4
    assert plain_pytorch.train(*study_files) == our_losses
    assert "of 797 test images wrong" in capsys.readouterr().out


def test_accelerate_takes_our_steps(
    study_files: tuple[StudentConfig, Path], our_losses: list[float]
) -> None:
    from examples import accelerate_loop

    assert largest_relative(accelerate_loop.train(*study_files), our_losses) < ROUNDING


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's, of this torch
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_takes_our_steps(
    study_files: tuple[StudentConfig, Path], our_losses: list[float], tmp_path: Path
) -> None:
    from examples import lightning_module

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "default_root_dir": tmp_path,
    }
    found = lightning_module.train(*study_files, **quiet)
    assert largest_relative(found, our_losses) < ROUNDING


def test_a_task_of_timm_takes_our_steps(
    study_files: tuple[StudentConfig, Path], our_losses: list[float]
) -> None:
    from examples import timm_task

    assert largest_relative(timm_task.train(*study_files), our_losses) < ROUNDING


def test_another_seed_trains_differently(
    study_files: tuple[StudentConfig, Path], our_losses: list[float]
) -> None:
    from examples import timm_task

    assert largest_relative(timm_task.train(*study_files, seed=1), our_losses) > 100 * ROUNDING


def test_the_target_of_timm_moves_as_one() -> None:
    from examples import timm_task

    target = timm_task.CachedTarget(torch.zeros(2), {"logits": torch.zeros(2, 3)})
    moved = target.to("meta")
    assert (moved.labels.device.type, moved.rows["logits"].device.type) == ("meta", "meta")


def test_channel_distillation_in_plain_code_is_the_loss_that_is_trained_with(
    study_files: tuple[StudentConfig, Path],
) -> None:
    config = load_teacher(study_files[0].teacher)
    (path,) = study_files[1].glob("digits-*")
    ids = np.arange(8)
    images, teacher_means = channel_distillation.read_batch(
        config, TeacherCache.open(path), view=1, ids=ids
    )
    student = channel_distillation.Student([means.shape[1] for means in teacher_means])
    student_means = student(images)
    loss = channel_distillation.cd_loss(student_means, teacher_means)
    torch.testing.assert_close(loss, losses.cd(student_means, teacher_means))
    loss.backward()
    assert all(float(part.grad.abs().sum()) > 0 for part in student.parameters())
    dataset = DistillationDataset(config, study_files[1], taps=["stage1"])
    dataset.set_epoch(2)
    torch.testing.assert_close(images[3], dataset[3][0], rtol=0, atol=0)
    assert channel_distillation.main(study_files[0].teacher, study_files[1]) > 0


@pytest.mark.long
def test_an_export_converted_to_onnx_has_the_logits_of_the_program(
    trained: tuple[Run, list[float]], tmp_path: Path
) -> None:
    from examples import export_onnx

    export_student(trained[0], ["best"], tmp_path / "exported", device="cpu")
    assert export_onnx.convert(tmp_path / "exported", tmp_path / "student.onnx") < ROUNDING
    assert (tmp_path / "student.onnx").stat().st_size > 300_000  # the weights are in the file


def test_plain_pytorch_is_short() -> None:
    lines = (ROOT / "examples" / "plain_pytorch.py").read_text().split("def train")[1].splitlines()
    assert len(lines) <= 48
