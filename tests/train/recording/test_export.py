"""An exported student loads without this project and equals the trained student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from teach_once.configs.load import load_student
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.runtime.machine.torchvision_shim import import_torchvision
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.store.command import cli as store
from teach_once.train.cli.commands import cli as train
from teach_once.train.errors import TrainError
from teach_once.train.recording.export import export_student
from teach_once.train.recording.exported import verify_export
from teach_once.train.runs.files import figures_of, metrics_line, read_metrics, summary_document
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import train_student
from tests.support.datasets.photograph_study import PLAIN, configs_of, study_of
from tests.support.own_network import ONE_PIXEL
from tests.support.training.training_runs import metrics_of_logits

import_torchvision()
from torchvision import models  # noqa: E402


def test_the_exported_student_has_the_error_that_was_reported(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    study = make_study()
    with pytest.raises(TrainError, match=r"is not finished(?s:.*)make train-student STUDENT="):
        export_student(study.run("cd", 0), ["best"], tmp_path / "out")
    summary = train_student(study.run("cd", 0))
    for which in ("best", "last"):
        (card,) = export_student(study.run("cd", 0), [which], tmp_path / "out", device="cpu")
        assert card["metrics"] == summary[which].get("metrics", summary[which])
        assert card["program_metrics"] == pytest.approx(metrics_of_logits(card), abs=0.3)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "student.pt",
        "student.pt2",
        "student.json",
    }
    assert verify_export(tmp_path / "out") == [card]
    assert card["input_shape"] == [1, 8, 8]


def test_weights_that_are_not_the_runs_are_not_exported(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    study = make_study()
    train_student(study.run("cd", 0))
    trained = study.run("cd", 0).folder / "best.pt"
    weights = torch.load(trained, weights_only=True)
    save_atomically({**weights, "fc.bias": weights["fc.bias"] * 1.0001}, trained)  # errs as before
    told = r"contain the final weights.*\n  fix: rm -r .* && make train-student STUDENT="
    with pytest.raises(TrainError, match=told):
        export_student(study.run("cd", 0), ["best"], tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_few_samples_that_turn_over_on_another_device_are_no_reason_to_refuse(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    study = make_study()
    run = study.run("cd", 0)
    summary = train_student(run)
    epochs = read_metrics(run.folder, run.sha256) or []
    for epoch in epochs:  # as if it had been trained elsewhere
        epoch["test"]["top1_error"] += 1.0
    lines = (metrics_line(epoch, run.sha256) for epoch in epochs)
    (run.folder / "metrics.jsonl").write_bytes(b"".join(lines))
    (run.folder / "summary.json").write_bytes(summary_document(summary | figures_of(epochs)))
    (card,) = export_student(run, ["best"], tmp_path / "out", device="cpu")
    assert card["metrics"]["top1_error"] == pytest.approx(
        card["reported_metrics"]["top1_error"] - 1.0
    )


def test_a_program_that_gives_other_logits_is_not_exported(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    own = (
        "student.arch=python:tests.support.own_network:Scaled",
        "student.stages=[net.0,net.1,net.2]",
    )
    study = make_study(student=[*own, "training.epochs=2"])
    train_student(study.run("ce", 0))
    with pytest.raises(TrainError, match="logits differ from the network's by"):
        export_student(study.run("ce", 0), ["last"], tmp_path / "out", device="cpu")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_network_whose_keys_begin_like_a_wrappers_is_exported(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    study = make_study(student=[*ONE_PIXEL, "training.epochs=2"])
    train_student(study.run("ce", 0))
    (card,) = export_student(study.run("ce", 0), ["last"], tmp_path / "out", device="cpu")
    assert card["program_metrics"] == pytest.approx(metrics_of_logits(card), abs=0.3)


def test_the_program_takes_any_batch_and_gives_the_networks_logits(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    study = make_study()
    train_student(study.run("cd", 0))
    out = tmp_path / "out"
    export_student(study.run("cd", 0), ["last"], out, device="cpu")
    program = torch.export.load(out / "student.pt2").module()
    network = build("resnet8", num_classes=10, in_channels=1).eval()
    network.load_state_dict(torch.load(out / "student.pt", weights_only=True))
    for batch in (1, 5, 300):
        images = torch.randn(batch, 1, 8, 8)
        assert torch.allclose(program(images), network(images), atol=1e-4)


def test_torchvisions_own_constructor_loads_the_exported_weights(
    photographs: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "teacher.pt"
    save_atomically(build("resnet8", num_classes=2, seed=1).state_dict(), weights)
    _, teacher = configs_of(photographs, weights, PLAIN)
    settings = ["training.epochs=1", "training.schedule.milestones=[1]", "student.stem=imagenet"]
    student = load_student(
        "digits-resnet8",
        [*settings, "student.arch=resnet18", "student.stages=[layer1,layer2,layer3]"],
    )
    study = study_of(student, teacher, tmp_path, num_workers=0)
    train_student(study.run("cd", 0), num_workers=0)
    export_student(study.run("cd", 0), ["best"], tmp_path / "out", device="cpu")
    network = models.resnet18(num_classes=2)
    network.load_state_dict(torch.load(tmp_path / "out" / "student.pt", weights_only=True))


def test_a_finished_student_is_exported_though_its_cache_was_trimmed(
    cached: list[str], tmp_path: Path
) -> None:
    call = ["digits-resnet8", *cached, "--method", "ce", "--device", "cpu"]
    assert train(["student", *call]) == 0
    (cache,) = (tmp_path / "caches").iterdir()
    assert store(["trim", str(cache), "--views", "1", "--drop-taps", "attention,hint"]) == 0
    assert train(["export", call[0], str(tmp_path / "out"), *call[1:]]) == 0
    assert (tmp_path / "out" / "student.pt2").is_file()


def test_a_damaged_export_is_noticed(
    make_study: Callable[..., Study], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, out = make_study(student=["training.epochs=2"]), tmp_path / "out"
    train_student(study.run("ce", 0))
    export_student(study.run("ce", 0), ["last"], out, device="cpu")
    assert train(["verify", str(out)]) == 0
    assert f"{out} is valid: resnet8, epoch 2" in capsys.readouterr().out
    for name in ("student.json", "student.pt", "student.pt2"):
        whole = (out / name).read_bytes()
        for position in range(0, len(whole), len(whole) // 40):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << position % 8
            (out / name).write_bytes(flipped)
            with pytest.raises(BadFile, match=r"\n  fix: export the student again"):
                verify_export(out)
        (out / name).unlink()
        assert train(["verify", str(out)]) == 2
        assert f"{name} not found" in capsys.readouterr().err
        (out / name).write_bytes(whole)
    assert train(["verify", str(out)]) == 0


def test_an_export_replaces_an_earlier_one_and_nothing_else(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    study, out = make_study(student=["training.epochs=2"]), tmp_path / "out"
    run = study.run("ce", 0)
    train_student(run)
    export_student(run, ["last"], out, device="cpu")
    export_student(run, ["best"], out, device="cpu")
    verify_export(out)
    (out / "notes.txt").write_text("mine")
    before = (out / "student.pt").read_bytes()
    with pytest.raises(BadFile, match=r"contains notes\.txt, which would be lost"):
        export_student(run, ["last"], out, device="cpu")
    assert (out / "student.pt").read_bytes() == before
    (tmp_path / "link").symlink_to(".")
    with pytest.raises(BadFile, match="which would be lost"):
        export_student(run, ["last"], tmp_path / "link", device="cpu")


def test_an_export_of_another_run_is_not_replaced(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    study, out = make_study(student=["training.epochs=2"]), tmp_path / "out"
    longer = make_study(student=["training.epochs=3"])
    first, seed, other = study.run("ce", 0), study.run("ce", 1), longer.run("ce", 0)
    for run in (first, seed, other):
        train_student(run)
    export_student(first, ["last"], out, device="cpu")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for run, told in ((seed, "seed 0"), (other, "run_sha256")):
        with pytest.raises(TrainError, match=rf"another run \(.*{told}.*\n  fix: .* rm -r .*/out"):
            export_student(run, ["last"], out, device="cpu")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_summary_without_the_sha256_of_the_weights_is_no_reason_to_believe_them(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    run = make_study(student=["training.epochs=2"]).run("ce", 0)
    summary = train_student(run)
    summary["files_sha256"] = {}
    (run.folder / "summary.json").write_bytes(summary_document(summary))
    with pytest.raises(TrainError, match=r"has no sha256 of best\.pt\n  fix: rm -r"):
        export_student(run, ["best"], tmp_path / "out", device="cpu")
