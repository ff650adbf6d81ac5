"""Code and weights that change during a study never give a run with a wrong identity."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_byte
from pathlib import Path

import pytest
from rich.console import Console

from teach_once.configs.load import load_teacher
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.runtime.command.options import Compute
from teach_once.runtime.command.user_code import CannotImport, load_module, module_sha256
from teach_once.train.engine.ranks import ALONE
from teach_once.train.errors import TrainError
from teach_once.train.recording.options import Recording
from teach_once.train.runs.study import Run, Study
from teach_once.train.runs.weights import TeacherRun, load_teacher_data
from teach_once.train.sessions import teacher
from teach_once.train.sessions.student import open_context, train_student
from teach_once.train.studies import processes
from teach_once.train.studies.ablation import run_ablation
from teach_once.train.studies.executor import StudyRecipe
from teach_once.train.studies.processes import Processes
from teach_once.train.studies.ray_study import train_task
from teach_once.views.pixels.resident import open_dataset_pixels
from tests.support.caches.teacher_cache import CPU

MakeStudy = Callable[..., Study]
METHODS = "methods.own=[{loss: ce}, {loss: 'changing_loss:changing'}]"
LOSS = """
from pathlib import Path
from teach_once.train.terms import Batch, loss_term

@loss_term(teacher_taps=["logits"])
def changing(batch: Batch):
    for new in Path(__file__).parent.glob("new.*"):
        new.rename(Path(__file__).parent / new.read_text().splitlines()[0].strip("# "))
    return (batch.logits - batch.teacher["logits"]).square().mean()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A loss that, when it is first computed, moves `new.*` to the name in its first line."""
    (tmp_path / "changing_loss.py").write_text(LOSS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("changing_loss", None)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def weights(path: Path, seed: int) -> Path:
    network = build("resnet8", num_classes=10, in_channels=1, seed=seed)
    save_atomically(network.state_dict(), path)
    return path


@pytest.mark.usefixtures("all_digits")
def test_a_loss_that_is_edited_during_a_study_stays_the_one_that_was_loaded(
    make_study: MakeStudy, folder: Path
) -> None:
    study = make_study(student=[METHODS, "training.epochs=1", "training.schedule.milestones=[1]"])
    runs = [study.run("own", seed) for seed in (0, 1)]
    planned = [run.sha256 for run in runs]
    (folder / "new.py").write_text("# changing_loss.py\n" + LOSS.replace("mean", "sum"))
    executor = Processes(Compute("cpu"), Recording(), jobs=1)
    assert [failure for _, failure in executor.execute([[run] for run in runs])] == ["", ""]
    assert not (folder / "new.py").exists()
    for run, sha256 in zip(runs, planned, strict=True):
        assert run.summary is not None
        assert run.summary["run_sha256"] == sha256
    assert module_sha256("changing_loss") != runs[0].identity["sources"]["changing_loss"]
    recording = Recording(console=quiet())
    (again,) = run_ablation([study.run("own", 2)], Compute("cpu"), recording) or [None]
    assert again is None  # a new process, which loads the edited file, files it as that


def test_worker_process_that_loads_other_code_than_was_planned_trains_no_run_with_it(
    make_study: MakeStudy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(student=[METHODS])
    own, ce = study.run("own", 0), study.run("ce", 0)
    planned = [processes._named(run) for run in (own, ce)]  # as the parent names them
    (folder / "changing_loss.py").write_text(LOSS.replace("mean", "sum"))
    trained = []

    def train(runs: Sequence[Run]) -> Iterator[tuple[Run, str]]:
        trained.extend(run.method for run in runs)
        yield from ((run, "") for run in runs)

    worker = processes._Worker(c_byte(0))
    worker.study_and_train = study, train
    monkeypatch.setattr(processes, "_worker", worker)
    changed, unchanged = processes._train(planned)
    assert "the file of the module changing_loss has changed since this command" in changed
    assert (unchanged, trained) == ("", ["ce"])


def test_weights_that_are_replaced_during_a_study_are_an_error_of_the_later_runs(
    make_study: MakeStudy, folder: Path
) -> None:
    first = weights(folder / "first.pt", 1)
    overrides = [
        METHODS,
        "training.epochs=1",
        "training.schedule.milestones=[1]",
        f"student.init={first}",
    ]
    study = make_study(student=overrides)
    runs = [study.run(method, 0) for method in ("own", "ce")]
    assert len({run.sha256 for run in runs}) == 2  # planned with the first weights

    def replaced(run: object, result: object) -> None:
        weights(first, 2)

    train_student(runs[0], device="cpu", on_epoch=functools.partial(replaced, runs[0]))
    assert not runs[1].is_finished
    failures = run_ablation(runs, Compute("cpu"), Recording(console=quiet()))
    assert list(failures) == [runs[1]]
    assert "student.init" in failures[runs[1]]
    assert "has changed since this command began" in failures[runs[1]]
    assert runs[1].summary is None
    planned = runs[1].identity
    with pytest.raises(TrainError, match=r"student\.init has changed since"):
        train_task(StudyRecipe.of(study), Compute("cpu"), Recording(), "ce", 0, False, planned)
    assert not list(study.folder.glob("ce-*/summary.json"))


def test_a_live_teacher_whose_weights_were_replaced_is_an_error(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    own = weights(tmp_path / "teacher.pt", 1)
    study = make_study(
        teacher=[f"teacher.weights={own}"],
        student=["training.epochs=1", "training.schedule.milestones=[1]"],
    )
    weights(own, 2)
    run = study.run("kd", 0, live_teacher=True)
    with pytest.raises(TrainError, match=r"teacher\.weights has changed since this command"):
        open_context(run, CPU)


def test_a_teacher_whose_start_was_replaced_is_not_trained(tmp_path: Path) -> None:
    init = weights(tmp_path / "init.pt", 1)
    config = load_teacher(
        "digits-resnet20",
        ["teacher.arch=resnet8", f"training.init={init}", f"teacher.weights={tmp_path}/new.pt"],
    )
    assert config.training is not None
    run = TeacherRun(config, load_teacher_data(config, config.training))
    assert run.identity["training"]["init"]
    weights(init, 2)
    data = open_dataset_pixels(run.dataset, run.views, config.dataset.normalization, CPU, 0)
    with pytest.raises(TrainError, match=r"training\.init has changed since this command began"):
        teacher._open_context(run, data, CPU, ALONE)


def test_what_is_hashed_of_a_module_is_what_was_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (folder / "package").mkdir()
    file = folder / "package" / "__init__.py"
    file.write_text("value = 1\n")
    os.utime(file, (1, 1))
    before = module_sha256("package")
    assert load_module("package").value == 1
    file.write_text("value = 2\n")  # in the same second, of the same size
    assert module_sha256("package") == before
    assert load_module("package").value == 1
    del sys.modules["package"]
    assert module_sha256("package") != before
    file.write_text("value = 3\n")
    os.utime(file, (1, 1))  # bytecode is kept for files of this time and size
    with pytest.raises(CannotImport, match=r"package/__init__\.py has changed since"):
        load_module("package")
    assert module_sha256("package") != before
    assert load_module("package").value == 3
    del sys.modules["package"]
