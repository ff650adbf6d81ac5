"""Runs with shared loading end as they do alone: bits, files, failures, stops."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.runtime.command.options import Compute
from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.errors import Stopped
from teach_once.runtime.safe.locks import Job, WriterLock
from teach_once.train.engine import step
from teach_once.train.errors import TrainError
from teach_once.train.outputs.cached_teacher import CachedTeacher
from teach_once.train.outputs.shared_loader import SharedOutputs, SharedPixels
from teach_once.train.recording.options import Recording
from teach_once.train.runs.retrain import begin_again
from teach_once.train.runs.study import Run, Study, open_study
from teach_once.train.sessions import joint as together
from teach_once.train.sessions import loop
from teach_once.train.sessions.joint import groups_of, train_together
from teach_once.train.sessions.loop import Position
from teach_once.train.sessions.student import train_student
from teach_once.train.studies.ablation import run_ablation
from teach_once.views.pixels.batches import ViewBatch
from teach_once.views.pixels.streaming import StreamedPixels
from teach_once.views.seeds import permutation
from tests.support.caches.teacher_cache import CPU
from tests.support.datasets.photograph_study import PLAIN, configs_of, study_of
from tests.support.own_network import DROPPING
from tests.support.training.training_runs import without_times

MakeStudy = Callable[..., Study]
METHODS = ("ce", "kd", "cd", "cd+gkd+edt")
HARD = [  # what has state of its own besides weights
    "training.gradient_accumulation=3",
    "training.ema.decay=0.9",
    "training.optimizer={type: adamw}",
    "training.learning_rate=1e-3",
    *DROPPING,
]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def elsewhere(study: Study, folder: Path) -> Study:
    """The same study, whose runs lie in another folder."""
    return open_study(
        study.config,
        study.teacher,
        caches_dir=study.cache.path.parent,
        runs_dir=folder,
        placement=study.placement,
    )


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)


def left_by(run: Run) -> dict[str, object]:
    """Everything in a finished run's folder, but for times and the bytes of zip files."""
    summary = {k: v for k, v in (run.summary or {}).items() if k not in ("seconds", "check")}
    return {
        "names": sorted(path.name for path in run.folder.iterdir()),
        "folder": run.folder.name,
        "run.json": (run.folder / "run.json").read_text(),
        "metrics": without_times(run.folder),
        "summary": summary,
    }


def assert_equal_runs(ours: Run, theirs: Run) -> None:
    assert left_by(ours) == left_by(theirs)
    for file in ours.folder.glob("*.pt"):
        one, other = tensors_of(file), tensors_of(theirs.folder / file.name)
        assert list(one) == list(other)
        assert all(torch.equal(one[name], other[name]) for name in one), file


def runs_of(study: Study, seeds: Sequence[int] = (0, 1)) -> list[Run]:
    return [study.run(method, seed) for method in METHODS for seed in seeds]


def trained_alone(study: Study, folder: Path, runs: Sequence[Run]) -> list[Run]:
    apart = elsewhere(study, folder)
    alone = [apart.run(run.method, run.seed) for run in runs]
    for run in alone:
        train_student(run, device="cpu")
    return alone


def photograph_study(root: Path, folder: Path, *overrides: str) -> Study:
    """Of images that are read for every epoch, and a teacher without training."""
    weights = folder / "teacher.pt"
    save_atomically(build("resnet8", num_classes=2, in_channels=3).state_dict(), weights)
    student, teacher = configs_of(root, weights, {**PLAIN, "mix": {"type": "cutmix"}}, overrides)
    return study_of(student, teacher, folder, num_workers=0)


def no_failures(outcomes: Iterator[together.Outcome]) -> None:
    for run, error in outcomes:
        assert error is None, (run, error)


@pytest.mark.parametrize(("settings", "seeds"), [([], (0, 1)), (HARD, (0,))], ids=["plain", "hard"])
def test_runs_together_leave_what_each_leaves_alone(
    make_study: MakeStudy, tmp_path: Path, settings: list[str], seeds: tuple[int, ...]
) -> None:
    study = make_study(student=settings)
    runs = runs_of(study, seeds)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    console = quiet()
    assert run_ablation(runs, Compute("cpu"), Recording(console=console), share=True) == {}
    assert torch.equal(torch.get_rng_state(), before)
    said = console.file.getvalue()
    for seed in seeds:
        assert f"shared loading for 4 runs: ce kd cd cd+gkd+edt; seed {seed}" in said
    for ours, theirs in zip(runs, trained_alone(study, tmp_path / "alone", runs), strict=True):
        assert_equal_runs(ours, theirs)


def test_groups_are_what_jobs_take(make_study: MakeStudy, forks: None, tmp_path: Path) -> None:
    study = make_study()
    runs = runs_of(study)
    assert run_ablation(runs, Compute("cpu"), Recording(console=quiet()), jobs=2, share=True) == {}
    assert all(run.is_finished for run in runs)
    for ours, theirs in zip(runs[:2], trained_alone(study, tmp_path / "a", runs[:2]), strict=True):
        assert [line["epoch"] for line in without_times(ours.folder)] == [1, 2, 3, 4]
        assert ours.identity == theirs.identity


def test_planning_groups_leaves_this_process_its_threads(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, before = make_study(), torch.get_num_threads()
    monkeypatch.setattr("teach_once.runtime.machine.devices.usable_cores", lambda: 1)
    torch.set_num_threads(2)
    try:
        groups_of([study.run("ce", 0), study.run("kd", 0)], jobs=2, device="cpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_each_image_is_cut_once_and_each_row_is_read_once(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = photograph_study(
        photographs,
        tmp_path,
        "training.epochs=2",
        "training.schedule.milestones=[1]",
        "methods.cd+gkd+edt.0.start_epoch=2",
        "methods.cd+gkd+edt.1.start_epoch=2",
    )
    cut: Counter[int] = Counter()
    gathered: Counter[int] = Counter()
    finished, outputs = StreamedPixels._finished, CachedTeacher.rows

    def count_cut(pixels: StreamedPixels, view: int, images: torch.Tensor, *rest) -> ViewBatch:
        cut[len(pixels)] += len(images)
        return finished(pixels, view, images, *rest)

    def count_rows(source: CachedTeacher, batch: ViewBatch) -> dict[str, torch.Tensor]:
        gathered[len(batch.ids)] += 1
        return outputs(source, batch)

    monkeypatch.setattr(StreamedPixels, "_finished", count_cut)
    monkeypatch.setattr(CachedTeacher, "rows", count_rows)
    runs = runs_of(study, seeds=[0])
    # Images are read for every epoch: sharing is the default.
    console = quiet()
    assert run_ablation(runs, Compute("cpu", 0), Recording(console=console)) == {}
    assert "shared loading for 4 runs" in console.file.getvalue()
    assert cut[20] == 2 * 20  # of the training split, in both epochs
    assert gathered == {6: 2 * 3, 2: 2}
    alone = trained_alone(study, tmp_path / "alone", runs)
    assert cut[20] == 2 * 20 * 5
    for ours, theirs in zip(runs, alone, strict=True):
        assert_equal_runs(ours, theirs)


def test_each_run_comes_first_in_its_turn_so_that_all_bear_the_reading() -> None:
    firsts: dict[int, str] = {}

    def training(name: str) -> Generator[Position, None, None]:
        for step_number in range(9):
            firsts.setdefault(step_number, name)
            yield 1, step_number

    names = ["a", "b", "c"]
    ended = together._in_turn({name: training(name) for name in names}, StopRequest())
    assert sorted(run for run, _ in ended) == names
    assert min(Counter(firsts.values())[name] for name in names) >= 2  # of nine


# ---- failures


def test_a_student_that_diverges_leaves_the_others_running(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    study = make_study(student=["methods.bad=[{loss: ce, weight: 1e38}]"])
    bad, *good = [study.run(method, 0) for method in ("bad", "ce", "kd")]
    failures = run_ablation([bad, *good], Compute("cpu"), Recording(console=quiet()), share=True)
    assert list(failures) == [bad]
    assert failures[bad].startswith("Diverged: the loss became")
    for ours, theirs in zip(good, trained_alone(study, tmp_path / "alone", good), strict=True):
        assert_equal_runs(ours, theirs)


def test_a_run_that_another_process_trains_fails_and_no_other(make_study: MakeStudy) -> None:
    study = make_study()
    runs = runs_of(study, seeds=[0])
    runs[1].folder.mkdir(parents=True)
    lock = WriterLock(runs[1].folder, Job())
    failures = run_ablation(runs, Compute("cpu"), Recording(console=quiet()), share=True)
    lock.release()
    assert list(failures) == [runs[1]]
    assert failures[runs[1]].startswith("Busy")
    assert [run.is_finished for run in runs] == [True, False, True, True]


def test_what_cannot_be_read_fails_every_run_as_it_would_alone(
    photographs: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(photographs, tmp_path / "photos")
    terms = [f"methods.cd+gkd+edt.{number}.start_epoch=2" for number in (0, 1)]
    study = photograph_study(root, tmp_path, *terms)
    assert len(study.dataset.train) == 20
    (root / "train" / "cat" / "3.png").write_bytes(b"no picture")
    runs = runs_of(study, seeds=[0])
    failures = run_ablation(runs, Compute("cpu", 0), Recording(console=quiet()), share=True)
    assert list(failures) == runs
    assert all("3.png" in failure for failure in failures.values())
    assert not any((run.folder / "summary.json").exists() for run in runs)


CHANGING_LOSS = """
from teach_once.train.terms import Batch, loss_term

@loss_term(teacher_taps=["logits"])
def changing(batch: Batch):
    batch.teacher["logits"].mul_(2)
    return (batch.logits - batch.teacher["logits"]).square().mean()
"""


def test_who_changes_what_is_shared_costs_no_run_its_result(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "changing_loss.py").write_text(CHANGING_LOSS)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = "methods.own=[{loss: ce}, {loss: 'changing_loss:changing'}]"
    study = make_study(student=[own, "training.learning_rate=1e-4"])
    runs = [study.run(method, 0) for method in ("ce", "own", "kd")]
    failures = run_ablation(runs, Compute("cpu"), Recording(console=quiet()), share=True)
    assert list(failures) == [runs[2]]
    assert "has changed the teacher's outputs for a batch in place" in failures[runs[2]]
    assert "fix: train without shared loading: SHARED_LOADING=0" in failures[runs[2]]
    for ours, theirs in zip(runs, trained_alone(study, tmp_path / "alone", runs[:2]), strict=False):
        assert_equal_runs(ours, theirs)


# ---- stopping and resuming


def stopped_at_step(number: int, train: Callable[[], object]) -> Stopped:
    """SIGTERM in the step that is taken as number `number`, of any run."""
    take_step, taken = step.train_step, 0

    def stopping(*arguments: object) -> dict[str, torch.Tensor]:
        nonlocal taken
        taken += 1
        if taken == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(step, "train_step", stopping)
        with pytest.raises(Stopped) as stopped:
            train()
    return stopped.value


@pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.long)])
def test_runs_stopped_in_an_epoch_resume_together_or_apart(
    make_study: MakeStudy, tmp_path: Path, share: bool
) -> None:
    study = make_study(student=["training.ema.decay=0.9"])
    runs = runs_of(study, seeds=[0])
    # In the second turn, of the second steps of the second epoch.
    stopped = stopped_at_step(
        4 * 5 + 2,
        lambda: run_ablation(runs, Compute("cpu"), Recording(console=quiet()), share=True),
    )
    assert stopped.exit_code == 143
    steps = [tensors_of(run.folder / "checkpoint.pt")["partial"]["step"] for run in runs]
    assert sorted(steps) == [2, 2, 2, 3]  # who had taken its step before took one more
    assert run_ablation(runs, Compute("cpu"), Recording(console=quiet()), share=share) == {}
    for ours, theirs in zip(runs, trained_alone(study, tmp_path / "alone", runs), strict=True):
        assert_equal_runs(ours, theirs)


def test_runs_at_different_epochs_catch_up_and_are_read_once_from_there(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    new, after_two, in_third, finished = runs_of(study, seeds=[0])
    train_student(finished, device="cpu")
    for run, steps in ((after_two, 8), (in_third, 10)):
        stopped_at_step(steps, functools.partial(train_student, run, device="cpu"))
    order: list[tuple[str, int]] = []
    start = loop.start_epoch

    def noting(context: step.TrainContext, epoch: int) -> np.ndarray:
        order.append((context.run.method, epoch))
        return start(context, epoch)

    monkeypatch.setattr(loop, "start_epoch", noting)
    runs = [in_third, new, after_two, finished]
    assert run_ablation(runs, Compute("cpu"), Recording(console=quiet()), share=True) == {}
    assert order[:2] == [(new.method, 1), (new.method, 2)]
    assert Counter(epoch for _, epoch in order) == {1: 1, 2: 1, 3: 3, 4: 3}
    alone = trained_alone(study, tmp_path / "alone", runs)
    for ours, theirs in zip(runs, alone, strict=True):
        assert_equal_runs(ours, theirs)


def test_a_repetition_takes_its_place_when_it_was_trained_together(make_study: MakeStudy) -> None:
    study = make_study()
    runs = runs_of(study, seeds=[0])[:2]
    no_failures(train_together(runs, Compute("cpu"), Recording()))
    left = [left_by(run) for run in runs]
    begin_again(runs, "cpu")
    assert not runs[0].is_finished
    no_failures(train_together(runs, Compute("cpu"), Recording()))
    assert [left_by(run) for run in runs] == left
    assert not list(study.folder.glob("*.again"))


# ---- which runs


def test_who_sees_other_batches_or_does_not_fit_is_in_another_group(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()

    def named(runs: Sequence[Run], jobs: int = 1) -> list[str]:
        groups = groups_of(runs, jobs=jobs, device="cpu")
        return [" ".join(run.name for run in group) for group in groups]

    runs = [study.run("ce", 0), study.run("kd", 1), study.run("cd", 0), study.run("kd", 0)]
    assert named(runs) == ["ce-seed0 cd-seed0 kd-seed0", "kd-seed1"]
    assert named(runs, jobs=2) == ["ce-seed0 cd-seed0", "kd-seed1", "kd-seed0"]
    live = [study.run("kd", 0, live_teacher=True), *runs]
    assert named(live)[0] == "kd-live-seed0"
    windowed = elsewhere(study, study.runs_dir)
    object.__setattr__(windowed, "placement", "window")
    apart = [windowed.run(run.method, run.seed) for run in runs]
    assert named(apart)[0] == "ce-seed0"  # shuffles all samples
    size = together.train_state_bytes(runs[2])
    monkeypatch.setattr(together, "free_memory", lambda _: 4 * 2.5 * size)
    assert named(runs) == ["ce-seed0 cd-seed0", "kd-seed1", "kd-seed0"]
    monkeypatch.undo()
    held = together.held_together(runs[2:3])
    monkeypatch.setattr(
        "teach_once.train.outputs.shuffle_buffer.total_memory", lambda: 2 * (held + 1)
    )
    assert named(runs) == ["ce-seed0 cd-seed0", "kd-seed1", "kd-seed0"]


def test_windows_are_shared_too(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(student=["training.gradient_accumulation=2"])
    object.__setattr__(study, "placement", "window")
    runs = [study.run(method, 0) for method in ("kd", "cd", "cd+gkd")]
    alone = trained_alone(study, tmp_path / "alone", runs)
    no_failures(train_together(runs[:2], Compute("cpu"), Recording()))
    for ours, theirs in zip(runs[:2], alone, strict=False):
        assert_equal_runs(ours, theirs)


# ---- the parts


class _Counting:
    """Batches of ten samples; counts how often one is made."""

    shape, where, is_streamed = (1, 1, 1), "here", True

    def __init__(self, broken_from: int = 99) -> None:
        self.made: list[list[int]] = []
        self._broken_from = broken_from

    def __len__(self) -> int:
        return 10

    def batches(self, views: Sequence[int], ids: np.ndarray, size: int) -> Iterator[ViewBatch]:
        for number, start in enumerate(range(0, len(ids), size)):
            if number >= self._broken_from:
                raise OSError("broken")
            some = torch.from_numpy(ids[start : start + size])
            self.made.append(some.tolist())
            yield ViewBatch(views[0], some, some, some.float(), some)


def test_who_asks_for_the_rest_of_what_is_being_read_joins_in() -> None:
    pixels = _Counting()
    shared, ids = SharedPixels(pixels), np.arange(10)
    first = shared.batches([0], ids, 4)
    next(first)
    second = shared.batches([0], ids[4:], 4)
    assert next(second) is next(first)
    assert next(first) is next(second)
    assert pixels.made == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert (next(first, None), next(second, None)) == (None, None)
    for views, other in (([1], ids), ([0], ids[::-1].copy()), ([0], ids[2:])):
        del pixels.made[:]
        next(shared.batches([0], ids, 4))
        next(shared.batches(views, other, 4))
        assert len(pixels.made) == 2


def test_an_error_of_the_reading_reaches_every_reader() -> None:
    shared = SharedPixels(_Counting(broken_from=1))
    readers = [shared.batches([0], np.arange(10), 4) for _ in range(2)]
    assert next(readers[0]) is next(readers[1])
    for reader in readers:
        with pytest.raises(OSError, match="broken"):
            next(reader)


def test_a_batch_that_was_changed_in_place_is_refused() -> None:
    shared = SharedPixels(_Counting())
    first, second = (shared.batches([0], np.arange(10), 4) for _ in range(2))
    next(first).inputs.add_(1)
    with pytest.raises(TrainError, match="has changed the images of a batch in place"):
        next(second)


def test_parts_of_a_batch_get_their_own_rows(make_study: MakeStudy) -> None:
    study = make_study()
    shared = SharedPixels(study.pixels(CPU).train)
    source = CachedTeacher(study.cache, ["logits", "stage1"], CPU)
    outputs = SharedOutputs(source, shared)
    mine = outputs.select_taps(["stage1"])
    order = permutation(0, 1, 60)
    mine.start_epoch(0, order)
    batch = next(iter(shared.batches([0], order, 16)))
    whole = mine.rows(batch)
    assert list(whole) == ["stage1"]
    expected = study.cache.read(order[:16], 0, ["stage1"])["stage1"]
    assert np.array_equal(whole["stage1"].numpy(), expected)
    parts = torch.cat([mine.rows(part)["stage1"] for part in batch.split(3)])
    assert torch.equal(parts, whole["stage1"])
    source.close()


def test_only_its_own_time_counts_as_a_runs(make_study: MakeStudy) -> None:
    study = make_study()
    runs = runs_of(study, seeds=[0])
    no_failures(train_together(runs, Compute("cpu"), Recording()))
    others = [study.run(method, 2) for method in METHODS]
    started = time.perf_counter()
    no_failures(train_together(others, Compute("cpu"), Recording()))
    elapsed = time.perf_counter() - started
    seconds = [run.summary["seconds"] for run in others]
    assert sum(seconds) <= elapsed
    lines = (runs[0].folder / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["train_seconds"] for line in lines) <= runs[0].summary["seconds"]
