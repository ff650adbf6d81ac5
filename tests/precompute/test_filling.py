"""A cache that a training student fills equals a pass's, and the student a cached one."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from teach_once.configs.schema import StudentConfig, TeacherConfig
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.precompute.filling import CacheFiller
from teach_once.precompute.run_pass import fill_cache
from teach_once.runtime.command.options import Compute
from teach_once.store import TeacherCache
from teach_once.store.read.source import open_source
from teach_once.store.write.writer import CacheWriter
from teach_once.train.recording.options import Recording
from teach_once.train.runs.study import open_study
from teach_once.train.sessions.student import train_run
from teach_once.views.pixels.batches import ViewBatch
from teach_once.views.splits import DatasetError
from tests.support.caches.teacher_cache import CPU, make_cache, setup_of
from tests.support.datasets.photograph_study import PLAIN, configs_of

MakeTeacher = Callable[..., TeacherConfig]
MakeStudent = Callable[..., StudentConfig]
METHOD = "cd+gkd+edt"
MIXED = {**PLAIN, "random_erasing": {"probability": 0.5}, "mix": {"type": "cutmix"}}
# Measured by a clock, and checksums of what contains it. Everything else is content.
TIMES = {"seconds", "images_per_second", "train_seconds", "wait_seconds", "evaluate_seconds"}
CHECKSUMS = {"check", "manifest_crc32c"}


class Killed(Exception):
    """A process that ends in the middle of an epoch."""


class Filler(CacheFiller):
    """A filler that records the views it computes in the loop, and acts before a batch."""

    def __init__(
        self,
        teacher: TeacherConfig,
        folder: Path,
        before: Mapping[int, Callable[[], object]] | None = None,
        console: Console | None = None,
    ) -> None:
        """before: number of a batch, from 1 -> what happens before its outputs are computed."""
        options = PassOptions(CPU, 256, 16, num_workers=0)
        setup = setup_of(teacher, folder / "caches")
        super().__init__(setup, options, console or Console(file=io.StringIO()))
        self.teacher = teacher
        self.views: list[int] = []  # one for each batch
        self._before = before or {}

    def outputs(self, batch: ViewBatch) -> Mapping[str, Tensor]:
        self.views.append(batch.view)
        self._before.get(len(self.views), lambda: None)()
        return super().outputs(batch)


def train_filling(
    student: StudentConfig,
    filler: Filler,
    folder: Path,
    minutes: float = 10.0,
    method: str = METHOD,
) -> tuple[dict[str, Any], Path]:
    """Train a student that fills its teacher's cache; returns its summary and its folder."""
    filler.start()
    teacher, caches, runs = filler.teacher, folder / "caches", folder / "runs"
    study = open_study(student, teacher, caches_dir=caches, runs_dir=runs, reads_outputs=False)
    run, recording = study.run(method, 0), Recording(checkpoint_minutes=minutes)
    return train_run(run, Compute("cpu", 0), recording, fillers=[filler]), run.folder


def train_cached(
    student: StudentConfig, teacher: TeacherConfig, folder: Path
) -> tuple[dict[str, Any], Path]:
    caches, runs = folder / "caches", folder / "runs"
    run = open_study(student, teacher, caches_dir=caches, runs_dir=runs).run(METHOD, 0)
    return train_run(run, Compute("cpu", 0), Recording()), run.folder


def without_times(content: Any) -> Any:
    if isinstance(content, dict):
        left_out = TIMES | CHECKSUMS
        return {key: without_times(each) for key, each in content.items() if key not in left_out}
    return content


def content_of(caches: Path) -> dict[str, Any]:
    """Every file of the only cache by name; journals by line, the manifest without rates.

    A journal's lines are grouped into files by the processes that wrote them, and the index repeats
    the sizes and checksums of the manifest and of these files.
    """
    (cache,) = (each.parent for each in caches.glob("*/manifest.json"))
    found: dict[str, Any] = {"lines": set()}
    for path in sorted(each for each in cache.rglob("*") if each.is_file()):
        name = str(path.relative_to(cache))
        if name.startswith("journal/"):
            assert path.suffix in (".jsonl", ".json"), name
            found["lines"] |= set(path.read_bytes().splitlines())
        elif path.name == "manifest.json":
            found[name] = without_times(json.loads(path.read_bytes()))
        elif path.name not in ("writer.lock", "index.json"):
            found[name] = path.read_bytes()
    return found


def check_same(
    filled: tuple[dict[str, Any], Path], cached: tuple[dict[str, Any], Path], folder: Path
) -> None:
    """Check that two runs and, below `folder`, the caches are the same."""
    assert without_times(filled[0]) == without_times(cached[0])
    assert filled[1].name == cached[1].name
    of_each = [torch.load(each / "last.pt", weights_only=True) for _, each in (filled, cached)]
    assert all(torch.equal(of_each[0][name], value) for name, value in of_each[1].items())
    rows = [(each / "metrics.jsonl").read_text().splitlines() for _, each in (filled, cached)]
    ours, theirs = ([without_times(json.loads(row)) for row in each] for each in rows)
    assert ours == theirs
    assert content_of(folder / "filled" / "caches") == content_of(folder / "passed" / "caches")
    (manifest,) = (folder / "filled" / "caches").glob("*/manifest.json")
    assert TeacherCache.open(manifest.parent).faults() == []


@pytest.mark.parametrize(
    ("taps", "in_the_loop"),
    [
        ([], {0, 1, 2}),
        (["taps.logits=float32", "taps.channel_means=float32"], {0, 1, 2}),
        (["taps.channel_means=uint8"], set()),  # a block's scale needs the whole block
        (["taps.logits={top_k: 3}"], set()),
    ],
)
def test_a_filled_cache_and_its_student_equal_those_of_a_pass(
    taps: list[str],
    in_the_loop: set[int],
    small_teacher: MakeTeacher,
    small_student: MakeStudent,
    tmp_path: Path,
) -> None:
    teacher, student = small_teacher(*taps), small_student()
    filler = Filler(teacher, tmp_path / "filled")
    filled = train_filling(student, filler, tmp_path / "filled")
    make_cache(teacher, tmp_path / "passed" / "caches")
    check_same(filled, train_cached(student, teacher, tmp_path / "passed"), tmp_path)
    assert set(filler.views) == in_the_loop
    assert filler._pass is None  # the teacher is unloaded


def test_photographs_are_decoded_for_student_and_teacher_at_once(
    photographs: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "teacher.pt"
    save_atomically(build("resnet8", num_classes=2, seed=1).state_dict(), weights)
    starts = [f"methods.{METHOD}.{number}.start_epoch=2" for number in (0, 1)]
    student, teacher = configs_of(photographs, weights, MIXED, starts)
    filler = Filler(teacher, tmp_path / "filled")
    filled = train_filling(student, filler, tmp_path / "filled")
    passed = tmp_path / "passed"
    options = PassOptions(CPU, 256, 16, num_workers=0)
    fill_cache(setup_of(teacher, passed / "caches"), options, Console(file=io.StringIO()))
    check_same(filled, train_cached(student, teacher, passed), tmp_path)
    assert filler.views == [0] * 4 + [1] * 4 + [2] * 4  # 20 images in batches of 6


def test_a_method_without_a_teacher_adds_one_block(
    small_teacher: MakeTeacher, small_student: MakeStudent, tmp_path: Path
) -> None:
    filler = Filler(small_teacher(), tmp_path)
    summary, _ = train_filling(small_student(), filler, tmp_path, method="ce")
    assert not summary["is_taught"]
    assert filler.views == []
    (manifest,) = (tmp_path / "caches").glob("*/manifest.json")
    committed = open_source(manifest.parent).coverage.there["logits"]
    assert committed.tolist() == [[True, False, False, False]] + [[False] * 4] * 2


def test_an_image_that_changes_after_its_first_view_is_named(
    photographs: Path, tmp_path: Path
) -> None:
    images, weights = tmp_path / "photographs", tmp_path / "teacher.pt"
    shutil.copytree(photographs, images)
    save_atomically(build("resnet8", num_classes=2, seed=1).state_dict(), weights)
    starts = [f"methods.{METHOD}.{number}.start_epoch=2" for number in (0, 1)]
    student, teacher = configs_of(images, weights, PLAIN, starts)
    changed = images / "train" / "cat" / "3.png"
    before = {4: lambda: Image.new("RGB", (20, 20)).save(changed)}  # in the last batch of view 0
    with pytest.raises(DatasetError, match=r"cat/3\.png has changed"):
        train_filling(student, Filler(teacher, tmp_path, before), tmp_path)


def test_a_run_killed_in_the_middle_of_an_epoch_resumes_and_computes_the_rest(
    small_teacher: MakeTeacher, small_student: MakeStudent, tmp_path: Path
) -> None:
    teacher, student = small_teacher(), small_student()
    first = Filler(teacher, tmp_path / "filled", {3: kill})
    with pytest.raises(Killed):
        train_filling(student, first, tmp_path / "filled", minutes=0.0)
    assert first.views == [0] * 3
    second = Filler(teacher, tmp_path / "filled", {9: kill})
    with pytest.raises(Killed):
        train_filling(student, second, tmp_path / "filled", minutes=0.0)
    assert second.views == [0] * 2 + [1] * 4 + [2] * 3
    resumed = Filler(teacher, tmp_path / "filled")
    filled = train_filling(student, resumed, tmp_path / "filled")
    assert resumed.views == [2] * 2  # two of the four steps were in the checkpoint
    make_cache(teacher, tmp_path / "passed" / "caches")
    check_same(filled, train_cached(student, teacher, tmp_path / "passed"), tmp_path)


def test_views_of_an_earlier_pass_are_read(
    small_teacher: MakeTeacher, small_student: MakeStudent, tmp_path: Path
) -> None:
    teacher, student = small_teacher(), small_student()
    for name in ("filled", "passed"):
        make_cache(small_teacher("views.count=2"), tmp_path / name / "caches")
    filler = Filler(teacher, tmp_path / "filled")
    filled = train_filling(student, filler, tmp_path / "filled")
    assert set(filler.views) == {2}
    make_cache(teacher, tmp_path / "passed" / "caches")
    check_same(filled, train_cached(student, teacher, tmp_path / "passed"), tmp_path)


def test_blocks_that_another_process_has_committed_meanwhile_are_kept(
    small_teacher: MakeTeacher, small_student: MakeStudent, tmp_path: Path
) -> None:
    teacher, student = small_teacher(), small_student()
    before = {2: lambda: make_cache(teacher, tmp_path / "filled" / "caches")}  # all views
    filler = Filler(teacher, tmp_path / "filled", before)
    filled = train_filling(student, filler, tmp_path / "filled")
    assert set(filler.views) == {0}  # the other views are read
    make_cache(teacher, tmp_path / "passed" / "caches")
    check_same(filled, train_cached(student, teacher, tmp_path / "passed"), tmp_path)


def test_a_view_waits_while_another_process_writes(
    small_teacher: MakeTeacher, small_student: MakeStudent, tmp_path: Path
) -> None:
    teacher, student = small_teacher(), small_student()
    waits = Waiting()
    before = {4: lambda: waits.lock(teacher, tmp_path / "filled")}
    console = Console(file=waits, width=200)
    filler = Filler(teacher, tmp_path / "filled", before, console)
    filled = train_filling(student, filler, tmp_path / "filled")
    assert waits.writer is None
    make_cache(teacher, tmp_path / "passed" / "caches")
    check_same(filled, train_cached(student, teacher, tmp_path / "passed"), tmp_path)


def kill() -> None:
    raise Killed


class Waiting(io.StringIO):
    """Another process, which writes to a cache until someone says that he waits for it."""

    writer: CacheWriter | None = None

    def lock(self, teacher: TeacherConfig, folder: Path) -> None:
        setup = setup_of(teacher, folder / "caches")
        content = TeacherPass(setup, PassOptions(CPU)).content()
        self.writer = CacheWriter.open(setup.path, content)

    def write(self, text: str) -> int:
        if self.writer is not None and "waiting for another process" in text:
            self.writer.__exit__(None, None, None)
            self.writer = None
        return super().write(text)
