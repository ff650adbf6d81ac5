"""Loss terms in a run: every method trains; a user's own loss; what the cache must hold."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.load import ConfigError, load_student
from configs.loss_options import built_in_losses
from train import losses
from train.loop import EpochResult
from train.needs import check_before_the_pass
from train.student import check_methods, train_student
from train.study import Study, TrainError
from train.terms import Batch, expanded_taps, loss_named

MakeStudy = Callable[..., Study]
ALL_TAPS = ("taps.energy=float16", "taps.hint.stage=stage2")

OWN_LOSS = """
import torch
from train.terms import Batch, loss_term


@loss_term(teacher_taps=["logits", "embedding"], student=["logits", "embedding"])
def sharper(batch: Batch, sharpness: float = 1.0) -> torch.Tensor:
    gap = batch.logits - batch.teacher["logits"] * sharpness
    return gap.square().mean() + (batch.embedding - batch.of_teacher("stage")[-1]).square().mean()


def unregistered(batch):
    return batch.logits.sum()
"""


def test_every_loss_trains_from_the_cache_as_from_the_live_teacher(make_study: MakeStudy) -> None:
    settings = (
        "training.epochs=1",
        "training.learning_rate=1e-3",
        "training.schedule.milestones=[1]",
    )
    terms = [
        f"methods.{name}=[{{loss: ce}}, {{loss: {name}}}]"
        for name in built_in_losses()
        if name != "ce"
    ]
    study = make_study(
        teacher=(
            *ALL_TAPS,
            "taps.logits=float32",
            "taps.means=float32",
            "taps.energy=float32",
            "taps.hint.dtype=float32",
        ),
        student=(*settings, *terms),
    )
    for name in built_in_losses():
        if name == "ce":
            continue
        found: dict[bool, list[float]] = {}
        for live in (False, True):
            epochs: list[EpochResult] = []
            train_student(study.run(name, 0, live_teacher=live), on_epoch=epochs.append)
            found[live] = epochs[0].step_losses
        assert found[False] == pytest.approx(found[True], rel=1e-4), name


def test_a_loss_of_the_users_own_trains_and_takes_its_options(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "losses_of_a_test.py").write_text(OWN_LOSS)
    monkeypatch.syspath_prepend(str(tmp_path))
    methods = [
        "methods.mild=[{loss: 'losses_of_a_test:sharper'}]",
        "methods.sharp=[{loss: 'losses_of_a_test:sharper', options: {sharpness: 3.0}}]",
        "methods.bad=[{loss: 'losses_of_a_test:unregistered'}]",
        "methods.gone=[{loss: 'losses_of_a_test:nothing'}]",
    ]
    study = make_study(student=methods)
    losses = {}
    for method in ("mild", "sharp"):
        epochs: list[EpochResult] = []
        train_student(study.run(method, 0), on_epoch=epochs.append)
        losses[method] = epochs[0].loss
    assert losses["sharp"] > losses["mild"]
    with pytest.raises(TrainError, match=r"put @train\.terms\.loss_term"):
        train_student(study.run("bad", 0))
    with pytest.raises(TrainError, match="cannot be imported"):
        train_student(study.run("gone", 0))
    del sys.modules["losses_of_a_test"]
    loss_named.cache_clear()


def test_what_the_cache_lacks_is_one_error_with_the_command_that_adds_it(
    make_study: MakeStudy,
) -> None:
    study = make_study(
        student=["methods.at=[{loss: at}]", "methods.fitnets=[{loss: fitnets}, {loss: ce}]"]
    )
    with pytest.raises(TrainError) as told:
        check_methods(study, ["ce", "at", "fitnets"])
    text = str(told.value)
    assert "methods.at needs the taps energy1, energy2, energy3" in text
    assert "methods.fitnets needs the taps hint" in text
    assert "fix: make cache-teacher TEACHER=digits-resnet20 CACHES=" in text
    assert 'taps.energy=float16 taps.hint.stage=stage2"' in text


def test_before_the_pass_the_teachers_file_is_asked(make_study: MakeStudy) -> None:
    study = make_study(student=["methods.at=[{loss: at}]", "methods.hint=[{loss: fitnets}]"])
    check_before_the_pass(study.config, study.teacher, ["ce", "cd"])
    with pytest.raises(TrainError) as told:
        check_before_the_pass(study.config, study.teacher, ["ce", "at", "kd", "hint"])
    text = str(told.value)
    assert "fix: make cache-teacher TEACHER=digits-resnet20" in text
    assert 'taps.energy=float16 taps.hint.stage=stage2"' in text
    assert 'METHODS="ce kd"' in text


def test_options_are_refused_where_they_have_no_use() -> None:
    for term, told in (
        ("{loss: cd, alpha: 1}", "the loss 'cd' has no 'alpha'"),
        ("{loss: kd, options: {temperature: 2}}", "options are for a loss of your own"),
        ("{loss: dkdd}", "did you mean 'dkd'"),
    ):
        with pytest.raises(ConfigError, match=told):
            load_student("digits-resnet8", [f"methods.x=[{term}]"])


def test_groups_of_taps_are_spelt_out() -> None:
    stages = ["stage1", "stage2"]
    assert expanded_taps(loss_named("cd"), stages) == {"stage1", "stage2"}
    assert expanded_taps(loss_named("at"), stages) == {"energy1", "energy2"}
    assert expanded_taps(loss_named("rkd"), stages) == {"stage2"}
    assert expanded_taps(loss_named("gkd"), stages) == {"logits", "correct"}


def test_stages_are_in_the_order_of_their_numbers() -> None:
    taps = {f"stage{n}": torch.full((1, 1), n) for n in (10, 9, 1)}
    batch = Batch(torch.zeros(1), torch.zeros(1, 2), teacher=taps)
    assert [int(value) for value in batch.of_teacher("stage")] == [1, 9, 10]
    maps = {f"stage{n}": torch.full((1, 1, 2, 2), float(n)) for n in (9, 10)}
    assert Batch(torch.zeros(1), torch.zeros(1, 2), maps=maps).embedding.item() == 10.0


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_attention_maps_of_other_sizes_are_averaged_to_the_smaller(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    maps = torch.rand(3, 5, *size)
    pooled = torch.nn.functional.avg_pool2d(maps.square().mean(1, keepdim=True), 2).flatten(1)
    teacher = torch.nn.functional.normalize(pooled, dim=1)
    batch = Batch(
        torch.zeros(3), torch.zeros(3, 2), maps={"stage1": maps}, teacher={"energy1": teacher}
    )
    assert loss_named("at").compute(batch).item() < 1e-10


def test_embeddings_are_those_of_the_last_stage() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    maps = {f"stage{n}": drawn(6, 4, 3, 3) for n in (10, 2, 1)}
    teacher = {f"stage{n}": drawn(6, 5) for n in (2, 10, 1)}
    batch = Batch(labels=torch.zeros(6).long(), logits=drawn(6, 3), maps=maps, teacher=teacher)
    expected = losses.rkd(maps["stage10"].mean(dim=(2, 3)), teacher["stage10"])
    assert loss_named("rkd").compute(batch).item() == pytest.approx(expected.item())
