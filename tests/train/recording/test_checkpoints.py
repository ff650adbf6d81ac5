"""Damaged or forged checkpoints and run folders are rejected by name or harmless."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from teach_once.runtime.errors import UserError
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.train.engine.epoch_result import EpochResult, SplitMetrics
from teach_once.train.engine.train_state import TrainState
from teach_once.train.errors import TrainError
from teach_once.train.recording.checkpoint import (
    checkpoint_digest,
    content_sha256,
    read_checkpoint,
    restore,
)
from teach_once.train.recording.recorder import Recorder
from teach_once.train.runs.files import figures_of
from teach_once.train.runs.study import Run
from teach_once.train.sessions.student import open_context, train_student
from tests.support.training.finished_run import Trained, train_both

Change = Callable[[dict[str, Any]], object]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(teacher_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_both(teacher_weights, tmp_path_factory.mktemp("trained"))


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Run:
    """The run that was stopped in its third epoch, a copy of its own."""
    return trained.copy(tmp_path / "runs").run("cd", 0)


@pytest.fixture(scope="module")
def train_state(trained: Trained) -> TrainState:
    return open_context(trained.study.run("cd", 0), CPU).train_state


def forge(run: Run, change: Change, *, sealed: bool = True) -> Path:
    """Change a checkpoint, and compute its checksum again."""
    path = run.folder / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    if sealed:
        with contextlib.suppress(RuntimeError, KeyError, TypeError):  # what nothing can be made of
            state["content_sha256"] = checkpoint_digest(state)
    torch.save(state, path)
    return path


def resume(run: Run) -> dict[str, Any]:
    return train_student(run, device="cpu")


def setter(*path: Any, to: Any) -> Change:
    def change(content: Any) -> None:
        *above, last = path
        for key in above:
            content = content[key]
        content[last] = to(content[last]) if callable(to) else to

    return change


def without(*path: Any) -> Change:
    def change(content: Any) -> None:
        *above, last = path
        for key in above:
            content = content[key]
        del content[last]

    return change


WEIGHT, BUFFER = "conv1.weight", "momentum_buffer"
FORGED = [
    (without("epoch"), "epoch: Field required"),
    (setter("epoch", to=-1), "epoch: Input should be greater"),
    (setter("epoch", to=True), "epoch: Input should be a valid integer"),
    (setter("epoch", to=1.0), "epoch: Input should be a valid integer"),
    (setter("epoch", to="1"), "epoch: Input should be a valid integer"),
    (setter("epoch", to=10**30), "epoch"),
    (setter("epoch", to=1), "is of epoch 3 after 1|best epoch is"),
    (setter("seconds", to=float("nan")), "seconds: Input should be a finite number"),
    (setter("best", to=None), "has the best epoch None"),
    (setter("best", to=lambda best: [*best[:1], 0.01]), "has the best epoch"),
    (setter("best", to=[1, 2.0]), "best"),
    (setter("best", to="best"), "best"),
    (setter("best_sha256", "best", to="0" * 64), "best.pt has been changed or damaged"),
    (setter("partial", "step", to=2**31 - 1), "the unfinished epoch has shape"),
    (setter("partial", "step", to=0), "partial.step: Input should be greater"),
    (setter("partial", "epoch", to=2), "is of epoch 2 after 2"),
    (setter("partial", "train_seconds", to="x"), "partial.train_seconds"),
    (
        setter("partial", "step_losses", to=lambda t: t.double()),
        "has dtype float64, expected float32",
    ),
    (setter("partial", "step_losses", to=lambda t: t.tolist()), "partial.step_losses"),
    (setter("partial", "sums", to={}), "has the losses , expected cd, ce"),
    (setter("partial", "sums", "x", to=torch.ones(())), "has the losses cd, ce, x"),
    (
        lambda state: state["partial"].update(step=4, step_losses=torch.ones(4)),
        "has step 4 of an epoch of 4",
    ),
    (without("partial", "sums"), "partial.sums: Field required"),
    (setter("more", to=1), "more: Extra inputs are not permitted"),
    (without("network"), "network: Field required"),
    (setter("network", to=[]), "network: Input should be a valid dictionary"),
    (setter("network", WEIGHT, to=lambda t: t[:1]), r"conv1.weight has shape \(1, "),
    (setter("network", WEIGHT, to=lambda t: t.double()), "conv1.weight has dtype float64"),
    (setter("network", WEIGHT, to=lambda t: t.to_sparse()), "conv1.weight is a sparse tensor"),
    (setter("network", WEIGHT, to=lambda t: t.to("meta")), "conv1.weight is a meta tensor"),
    (setter("network", WEIGHT, to=1), "conv1.weight is a int, expected a tensor"),
    (without("network", WEIGHT), "network lacks conv1.weight"),
    (setter("network", "x\x1b", to=1), r"network has an unknown x\\x1b"),
    (setter("connectors", to={}), "connectors lacks"),
    (setter("optimizer", "state", 0, BUFFER, to=lambda t: t[:1]), r"momentum_buffer has shape"),
    (
        setter("optimizer", "state", 0, BUFFER, to=lambda t: t.half()),
        "momentum_buffer has dtype float",
    ),
    (without("optimizer", "state", 0), "optimizer lacks 0"),
    (setter("optimizer", "state", 10**6, to={}), "optimizer has an unknown 1000000"),
    (setter("optimizer", "state", to=[]), "optimizer is a list, expected a dict"),
    (without("optimizer", "state"), "optimizer is a NoneType, expected a dict"),
]


@pytest.mark.parametrize(("change", "told"), FORGED)
def test_a_forged_checkpoint_is_refused_though_its_checksum_is_right(
    run: Run, change: Change, told: str
) -> None:
    path = forge(run, change)
    with pytest.raises(TrainError, match=told) as caught:
        resume(run)
    assert f"fix: rm {path}  # the run starts again" in str(caught.value)


def test_other_numbers_in_tensors_are_noticed_by_the_checksum(run: Run) -> None:
    def change(state: dict[str, Any]) -> None:
        state["network"][WEIGHT].view(-1)[0] += 1e-3

    forge(run, change, sealed=False)
    with pytest.raises(TrainError, match="changed or damaged: its checksum"):
        resume(run)


def test_a_value_that_claims_terabytes_is_refused_before_it_is_copied(run: Run) -> None:
    forge(run, setter("partial", "sums", "ce", to=lambda t: t.expand(10**12)), sealed=False)
    with pytest.raises(TrainError, match="the unfinished epoch has shape"):
        resume(run)


def test_the_settings_of_the_optimizer_are_the_configs_whatever_the_checkpoint_says(
    run: Run, trained: Trained, tmp_path: Path
) -> None:
    other = trained.copy(tmp_path / "others").run("cd", 0)
    nested: list[Any] = [torch.ones(2, device="meta"), {"weight_decay": 7.0, "params": [0]}]
    nested.append(nested)
    forge(run, setter("optimizer", "param_groups", to=nested))
    resume(run)
    resume(other)
    assert weights_of(run) == weights_of(other)


def weights_of(run: Run) -> str:
    return content_sha256(torch.load(run.folder / "last.pt", weights_only=True))


@pytest.mark.parametrize("name", ["content_sha256", "best_sha256", "scaler", "threads"])
def test_a_checkpoint_without_one_of_its_keys_is_refused(run: Run, name: str) -> None:
    forge(run, lambda state: state.pop(name), sealed=False)
    with pytest.raises(TrainError, match=name):
        resume(run)


def test_a_checkpoint_of_another_run_is_not_resumed(run: Run) -> None:
    forge(run, setter("run_sha256", to="0" * 64))
    epochs: list[int] = []
    train_student(run, device="cpu", on_epoch=lambda result: epochs.append(result.epoch))
    assert epochs == [1, 2, 3]


def test_every_flipped_bit_of_a_checkpoint_is_noticed_or_harmless(
    run: Run, train_state: TrainState
) -> None:
    path = run.folder / "checkpoint.pt"
    whole = path.read_bytes()
    state = copy.deepcopy(read_checkpoint(path, run.sha256) or {})
    noticed, positions = 0, range(0, len(whole), len(whole) // 150)
    for position in positions:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            found = read_checkpoint(path, run.sha256)
            assert found is not None, position
            restore(found, train_state, path)
            assert checkpoint_digest(found) == checkpoint_digest(state), position
        except TrainError:
            noticed += 1
    assert noticed > len(positions) / 2  # the rest is padding between tensors


@pytest.mark.parametrize("damage", ["flip", "missing", "link"])
def test_best_weights_that_are_not_the_checkpoints_are_noticed(run: Run, damage: str) -> None:
    best = run.folder / "best.pt"
    if damage == "flip":
        content = bytearray(best.read_bytes())
        content[len(content) // 2] ^= 1
        best.write_bytes(content)
    else:
        best.unlink()
    if damage == "link":
        best.symlink_to("nowhere")
    with pytest.raises(TrainError, match=r"best\.pt has been changed or damaged since"):
        resume(run)


def test_a_kill_between_the_checkpoint_and_the_name_of_the_best_weights_loses_nothing(
    run: Run, trained: Trained, tmp_path: Path
) -> None:
    other = trained.copy(tmp_path / "others").run("cd", 0)
    (run.folder / "best.pt").rename(run.folder / "best.next.pt")
    (run.folder / "best.pt").write_bytes(b"an earlier epoch's")
    (other.folder / "best.next.pt").write_bytes(b"not counted on yet")
    assert resume(run)["files_sha256"] == resume(other)["files_sha256"]
    assert not list(tmp_path.rglob("*.next.pt"))


def test_what_killed_processes_left_in_a_run_is_gone_after_the_next(run: Run) -> None:
    (run.folder / ".checkpoint.pt.12345.tmp").write_bytes(b"half")
    (run.folder / ".mine.tmp").write_bytes(b"")
    resume(run)
    assert not (run.folder / ".checkpoint.pt.12345.tmp").exists()
    assert (run.folder / ".mine.tmp").exists()


def test_an_epoch_is_on_the_disk_in_the_order_in_which_one_file_counts_on_another(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    aside = r"^\.([a-z.]+\.pt)\..*\.tmp$"
    fsync, rename = os.fsync, os.rename

    def noted_fsync(handle: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        done.append("flush " + re.sub(aside, r"new \1", name))
        fsync(handle)

    def noted_rename(source: str, target: str, **folders: int) -> None:
        done.append(f"rename {target}")
        rename(source, target, **folders)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    recorder, result = recorder_of(run), result_of(3, error=0.0)
    with recorder:
        recorder.save_epoch(result)
    flush = f"flush {run.folder.name}"
    assert done[done.index("flush metrics.jsonl") :] == [
        "flush metrics.jsonl",
        *("flush new best.next.pt", "rename best.next.pt", flush),
        *("flush new checkpoint.pt", "rename checkpoint.pt", flush),
        *("rename best.pt", flush),
    ]


def test_of_two_equal_epochs_the_earlier_is_best(run: Run) -> None:
    with recorder_of(run) as recorder:
        before = recorder._writer.best["best"]
        recorder.save_epoch(result_of(3, error=before.deciding))
        assert recorder._writer.best["best"] == before
    errors = {"test": {"top1_error": 5.0}, "validation": None}
    epochs = [{"epoch": number, **errors} for number in (1, 2, 3)]
    assert figures_of(epochs)["best"]["epoch"] == 1


def recorder_of(run: Run) -> Recorder:
    return Recorder(run, open_context(run, CPU).train_state)


def result_of(epoch: int, error: float) -> EpochResult:
    tested = SplitMetrics({"top1_error": error}, None)
    numbers = {"learning_rate": 0.1, "num_samples": 60}
    seconds = dict.fromkeys(("train_seconds", "wait_seconds", "evaluate_seconds"), 1.0)
    losses = {"loss": 1.0, "losses": {}, "weights": {}, "step_losses": [], "average": None}
    return EpochResult(epoch=epoch, tested=tested, **losses, **numbers, **seconds)


def test_a_checkpoint_without_its_metrics_is_kept_and_named(run: Run) -> None:
    metrics, checkpoint = run.folder / "metrics.jsonl", run.folder / "checkpoint.pt"
    lines, state = metrics.read_bytes(), checkpoint.read_bytes()
    first = lines.splitlines(keepends=True)[0]
    for found, content in ((0, None), (0, b""), (1, first)):
        metrics.unlink(missing_ok=True)
        if content is not None:
            metrics.write_bytes(content)
        told = rf"metrics\.jsonl has {found} of the 2 epochs .*\n  fix: rm .*checkpoint\.pt"
        with pytest.raises(TrainError, match=told):
            resume(run)
        assert checkpoint.read_bytes() == state
    metrics.write_bytes(lines)
    assert resume(run)["epochs"] == 3


def test_a_snapshot_of_hard_links_neither_stops_a_run_nor_changes_with_it(
    run: Run, tmp_path: Path
) -> None:
    def snapshot(name: str) -> dict[Path, bytes]:
        shutil.copytree(run.folder, tmp_path / name, copy_function=os.link)
        return {path: path.read_bytes() for path in (tmp_path / name).iterdir()}

    lines = (run.folder / "metrics.jsonl").read_bytes()
    with recorder_of(run) as recorder:
        taken = snapshot("appended")
        recorder.save_epoch(result_of(3, error=50.0))
    assert (run.folder / "metrics.jsonl").read_bytes().startswith(lines)
    assert taken[tmp_path / "appended" / "metrics.jsonl"] == lines
    assert all(path.read_bytes() == content for path, content in taken.items())
    taken |= snapshot("before")
    train_student(run, device="cpu", on_epoch=lambda _: taken.update(snapshot("during")))
    assert run.summary is not None
    assert len({path.parent for path in taken}) >= 2
    assert all(path.read_bytes() == content for path, content in taken.items())


# ---- links and special files in a run's folder


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint.pt", "tensorboard", "writer.lock"])
@pytest.mark.parametrize("kind", ["link", "FIFO", "device"])
def test_a_run_writes_through_no_link_and_hangs_on_no_special_file(
    run: Run, tmp_path: Path, name: str, kind: str
) -> None:
    victim = tmp_path / "victim"
    path = run.folder / name
    loggers = ["tensorboard"] if name == "tensorboard" else []
    if loggers:
        victim.mkdir()
    else:
        path.replace(victim)
    before = sorted(victim.iterdir()) if victim.is_dir() else victim.read_bytes()
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to(victim if kind == "link" else "/dev/zero")
    with pytest.raises(UserError, match=f"{name} is a"):
        train_student(run, device="cpu", loggers=loggers)
    assert before == (sorted(victim.iterdir()) if victim.is_dir() else victim.read_bytes())


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "summary.json", "best.next.pt"])
def test_what_a_run_writes_replaces_a_link_or_is_refused(
    run: Run, tmp_path: Path, name: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (run.folder / name).unlink(missing_ok=True)
    (run.folder / name).symlink_to(victim)
    try:
        resume(run)
    except UserError as error:
        assert name in str(error)  # noqa: PT017
    assert victim.read_bytes() == b"mine"


def test_a_run_folder_that_is_a_link_is_not_written_to(run: Run, tmp_path: Path) -> None:
    away = tmp_path / "away"
    shutil.move(run.folder, away)
    before = {path: path.read_bytes() for path in away.iterdir() if path.is_file()}
    run.folder.symlink_to(away)
    with pytest.raises(BadFile, match="is a symbolic link, expected a folder"):
        resume(run)
    assert before == {path: path.read_bytes() for path in away.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b"])
def test_a_method_that_leads_out_of_the_runs_makes_no_folder(
    trained: Trained, tmp_path: Path, name: str
) -> None:
    study = trained.copy(tmp_path / "runs")
    study.config.methods[name] = study.config.methods["ce"]
    try:
        with pytest.raises(TrainError, match="is outside the folder of runs"):
            Recorder(study.run(name, 0), open_context(study.run("ce", 0), CPU).train_state)
    finally:
        del study.config.methods[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
