"""A teacher trained by several processes equals one trained by a single process."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from teach_once.configs.load import load_teacher
from teach_once.nets.networks.zoo import build_net
from teach_once.train.cli.commands import cli
from teach_once.train.engine.evaluation import evaluate
from teach_once.train.runs.weights import training_folder
from teach_once.views.datasets import load_dataset
from teach_once.views.pixels.resident import open_dataset_pixels
from tests.support.training.rank_training import run_ranks

# A learning rate that does not amplify rounding; 100 digits, in batches of 32: the last one is 4.
SHORT = ("training.epochs=2", "training.learning_rate=1e-3", "training.batch_size=32")


def call(weights: Path, *settings: str) -> list[str]:
    small = [
        "teacher.arch=resnet8",
        f"teacher.weights={weights}",
        "training.max_per_class=10",
        *SHORT,
    ]
    return ["teacher", "digits-resnet20", "--device", "cpu", *small, *settings]


def summary_of(weights: Path) -> dict[str, object]:
    return json.loads((training_folder(weights) / "summary.json").read_text())


def trained_on_two(weights: Path, *settings: str) -> str:
    """What both processes print."""
    outcomes = run_ranks(2, ["-m", "train", *call(weights, *settings)])
    output = "".join(text for _, text in outcomes)
    assert [code for code, _ in outcomes] == [0, 0], output
    return output


def test_two_processes_train_the_teacher_that_one_does(tmp_path: Path) -> None:
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    assert cli(call(one)) == 0
    output = trained_on_two(two)
    for once in ("in each of 2 processes", "estimated from a few steps", "epoch   2/2"):
        assert output.count(once) == 1, output
    assert "Warning" not in output
    assert output.count("test top-1 error") == 1 + 2  # of the whole, and of each epoch
    expected = torch.load(one, weights_only=True)
    found = torch.load(two, weights_only=True)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, rtol=1e-4, atol=1e-4), name
    assert summary_of(two)["settings"] == summary_of(one)["settings"]
    # Sums of two processes round otherwise: an image or two may change sides.
    assert summary_of(two)["last"] == pytest.approx(summary_of(one)["last"], abs=0.3)
    assert cli(call(two)) == 0  # there is nothing to do
    assert trained_on_two(two).count("nothing to do") == 1


def errors_of(weights: Path) -> float:
    """The test error of the network in the file, %."""
    config, cpu = load_teacher("digits-resnet20", call(weights)[4:]), torch.device("cpu")
    dataset = load_dataset(config.dataset)
    normalization = config.dataset.normalization
    test = open_dataset_pixels(dataset, config.views, normalization, cpu, num_workers=0).test
    network = build_net(config.teacher, num_classes=10, image_shape=test.shape)
    network.load_state_dict(torch.load(weights, weights_only=True))
    return evaluate(network, test, "float32", cpu)["top1_error"]


def test_a_rank_with_a_single_sample_is_refused_where_it_has_batch_norms_of_its_own(
    tmp_path: Path,
) -> None:
    settings = ["training.batch_norm=local", "training.batch_size=49"]  # 2 samples are left
    outcomes = run_ranks(2, ["-m", "train", *call(tmp_path / "w.pt", *settings)])
    assert [code for code, _ in outcomes] == [2, 2]
    output = "".join(text for _, text in outcomes)
    assert output.count("has a batch without 2 samples, for its own batch norm, for each of 2") == 1


def test_batch_norm_of_the_own_slice_is_another_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, local = tmp_path / "local.pt", "training.batch_norm=local"
    trained_on_two(weights, local)
    settings = summary_of(weights)["settings"]
    assert (settings["training"]["batch_norm"], settings["training"]["ranks"]) == ("local", 2)
    plain = tmp_path / "plain.pt"
    assert cli(call(plain)) == 0
    assert summary_of(plain)["last"] is not None
    means = [torch.load(file, weights_only=True)["bn1.running_mean"] for file in (weights, plain)]
    assert not torch.allclose(*means, rtol=1e-3)
    assert errors_of(weights) == pytest.approx(summary_of(weights)["last"]["top1_error"], abs=0.3)
    assert cli(call(weights, local)) == 0  # one process uses what two have trained
    assert cli(call(weights)) == 2
    assert "training.batch_norm" in capsys.readouterr().err


ABORTS_AT_ITS_END = """
import atexit, os, sys
from teach_once.runtime.command.frame import end_process

class LastObject:
    def __del__(self, abort=os.abort):
        abort()

sys.kept = LastObject()
atexit.register(print, "atexit")
print("printed")
end_process(3)
"""


def test_a_rank_ends_without_taking_its_modules_apart() -> None:
    outcomes = run_ranks(2, ["-c", ABORTS_AT_ITS_END])
    assert outcomes == [(3, "printed\natexit\n")] * 2
    assert run_ranks(1, ["-c", ABORTS_AT_ITS_END])[0][0] == -signal.SIGABRT
