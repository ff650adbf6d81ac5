"""A small real file of every kind that can be shared, created by the project's commands.

world/    the shared files: configs, weights, a cache, its .h5, packed files, a folder of images,
runs
          (finished, interrupted after an epoch, interrupted within one), an exported student.
          Commands run here.
outside/  files that no command may change or show.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.optim.optimizer import register_optimizer_step_post_hook

from teach_once.configs.load import load_student, load_teacher
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.runtime.command.options import Compute
from teach_once.runtime.errors import Stopped
from teach_once.store.move.hdf5 import export_cache
from teach_once.train.recording.export import export_student
from teach_once.train.recording.options import Recording
from teach_once.train.runs.study import Study, open_study
from teach_once.train.sessions.student import train_student
from teach_once.train.sessions.teacher import train_teacher
from teach_once.views import command as views_commands
from tests.support.caches.teacher_cache import make_cache
from tests.support.datasets.image_folders import write_image_folder

SECRET = "KEEP-OUT-5e8f1c"  # in every file of outside/
_TEACHER = """\
dataset: {type: digits, max_per_class: 4, normalization: {mean: [0.3], std: [0.35]}}
views: {augment: {type: pad-crop-flip, pad_px: 1, padding: zero, flip: false}, count: 2}
teacher: {arch: resnet8, weights: teacher.pt}
taps: {logits: float16, channel_means: uint8, attention: float16}
training: {epochs: 1, batch_size: 64, learning_rate: 0.1, schedule: {type: onecycle},
  max_per_class: 20}
"""
_STUDENT = """\
teacher: t.yaml
student: {arch: resnet8}
training: {epochs: 2, batch_size: 8, learning_rate: 0.01, schedule: {type: onecycle}}
methods:
  ce: [{loss: ce}]
  kd: [{loss: ce}, {loss: kd, weight: 0.5}]
  cd: [{loss: ce}, {loss: cd, weight: 6}]
"""
_IMAGES = """\
dataset: {{{data}, normalization: {{mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}}}
views: {{augment: {{type: pad-crop-flip}}, count: 1}}
teacher: {{arch: resnet8, weights: images.pt}}
"""
IMAGE_CONFIGS = {
    "images.yaml": "type: imagefolder, root: images",
    "pixels.yaml": "type: packed, file: pixels.h5",
    "encoded.yaml": "type: packed, file: encoded.h5",
}


def make_world(root: Path) -> Path:
    """Create `root`/world and `root`/outside; returns the former. Takes about ten seconds."""
    world = root / "world"
    world.mkdir(parents=True)
    _write_outside(root / "outside")
    (world / "t.yaml").write_text(_TEACHER)
    (world / "s.yaml").write_text(_STUDENT)
    teacher = load_teacher(world / "t.yaml")
    train_teacher(teacher, Compute("cpu"), Recording(console=_silent()))
    make_cache(teacher, world / "caches", block_rows=32)
    _make_runs(world)
    (cache,) = (world / "caches").iterdir()
    export_cache(cache, world / "cache.h5")
    _make_images(world)
    for lock in world.rglob("writer.lock"):
        lock.unlink()  # not shared
    return world


def copy_world(template: Path, root: Path) -> Path:
    """Copy the world and the folder next to it into `root`, which is emptied first."""
    if root.exists():
        shutil.rmtree(root)
    shutil.copytree(template.parent, root, symlinks=True)
    return root / template.name


def study_of(world: Path) -> Study:
    teacher, student = load_teacher(world / "t.yaml"), load_student(world / "s.yaml")
    return open_study(student, teacher, caches_dir=world / "caches", runs_dir=world / "runs")


def _write_outside(outside: Path) -> None:
    (outside / "folder").mkdir(parents=True)
    for name in ("victim", "folder/file", "folder/.file.1.tmp"):
        (outside / name).write_text(f"{SECRET}\n")


def _make_runs(world: Path) -> None:
    study = study_of(world)
    train_student(study.run("ce", 0), device="cpu")
    export_student(study.run("ce", 0), ["best"], world / "exported", device="cpu")
    stop_after_an_epoch(study.run("kd", 0))
    stop_within_an_epoch(study.run("cd", 0))


def stop_after_an_epoch(run: Any) -> None:
    """Train the first epoch, then stop as after Ctrl-C."""
    _interrupt(run, lambda: os.kill(os.getpid(), signal.SIGINT))


def stop_within_an_epoch(run: Any) -> None:
    """Stop in the first step of the second epoch."""
    started = []

    def end(*_: Any) -> None:
        if started:
            os.kill(os.getpid(), signal.SIGINT)

    hook = register_optimizer_step_post_hook(end)
    _interrupt(run, lambda: started.append(True))
    hook.remove()
    checkpoint = torch.load(run.folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["partial"]["step"] == 1


def _interrupt(run: Any, after_epoch: Callable[[], None]) -> None:
    try:
        train_student(run, device="cpu", on_epoch=lambda result: after_epoch())
    except Stopped:
        return


def _make_images(world: Path) -> None:
    write_image_folder(world / "images", per_class=3, size=8)
    network = build("resnet8", num_classes=2, in_channels=3, seed=0)
    save_atomically(network.state_dict(), world / "images.pt")
    for name, data in IMAGE_CONFIGS.items():
        (world / name).write_text(_IMAGES.format(data=data))
    config = str(world / "images.yaml")
    assert views_commands.cli(["pack", config, str(world / "pixels.h5")]) == 0
    assert views_commands.cli(["pack", config, str(world / "encoded.h5"), "--encoded"]) == 0


def _silent() -> Console:
    return Console(file=io.StringIO())
