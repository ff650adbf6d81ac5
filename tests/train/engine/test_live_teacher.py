"""A live teacher with batch norm in training mode, as in the original implementation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from teach_once.nets.networks.archs import ArchError
from teach_once.nets.teacher.teacher import use_batch_statistics
from teach_once.train.engine.ranks import Ranks
from teach_once.train.errors import TrainError
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import open_context, train_student

MakeStudy = Callable[..., Study]
CPU = torch.device("cpu")


def test_batch_norm_takes_the_statistics_of_each_batch_and_keeps_its_own() -> None:
    norm = nn.BatchNorm2d(3).requires_grad_(False).eval()
    norm.running_mean.fill_(5.0)  # type: ignore[union-attr]
    network = nn.Sequential(norm, nn.Dropout(0.5).eval())
    use_batch_statistics(network, "a network")
    images = torch.randn(8, 3, 4, 4) * 2 + 1
    with torch.inference_mode():
        out = network(images)
    expected = nn.functional.batch_norm(images, None, None, training=True)
    assert torch.allclose(out, expected, atol=1e-6)
    assert not network[1].training
    assert norm.running_mean is not None
    assert bool((norm.running_mean == 5.0).all())


def test_a_network_without_batch_norm_is_refused() -> None:
    with pytest.raises(ArchError, match="has no batch norm"):
        use_batch_statistics(nn.Sequential(nn.Linear(2, 2)), "python:my:mlp")


def test_it_is_a_run_of_its_own_and_trains_on_other_targets(make_study: MakeStudy) -> None:
    study = make_study()
    live, batch = study.run("cd", 0, live_teacher=True), study.run("cd", 0, live_bn=True)
    assert batch.live_teacher
    assert batch.name == "cd-live-bn-seed0"
    assert {**batch.identity, "teacher_bn": None} == {**live.identity, "teacher_bn": None}
    assert batch.sha256 != live.sha256
    outputs = []
    for run in (live, batch):
        assert train_student(run, device="cpu")["epochs"] == 4
        with torch.no_grad():
            context = open_context(run, CPU)
            pixels, order = context.data.train, context.order(1)
            (first, *_) = pixels.batches([0], order, 16)
            outputs.append(context.teacher.rows(first)["stage1"])
            context.teacher.close()
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-3)


def test_several_processes_refuse_it(make_study: MakeStudy) -> None:
    with pytest.raises(TrainError, match="each of 2 processes"):
        open_context(make_study().run("cd", 0, live_bn=True), CPU, ranks=Ranks(0, 2))
