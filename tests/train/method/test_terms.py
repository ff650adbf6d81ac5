"""Loss terms in a run: every method trains, custom losses, required taps."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from teach_once.configs.load import ConfigError, load_student
from teach_once.configs.schema import LossTerm, as_plain
from teach_once.configs.schema.losses import BUILT_IN_LOSSES
from teach_once.train import losses
from teach_once.train.engine.epoch_result import EpochResult
from teach_once.train.errors import TrainError
from teach_once.train.method.connector_ends import CONNECTED_LOSSES
from teach_once.train.runs.check_methods import TapsOfTeacher, check_methods
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import train_student
from teach_once.train.terms import (
    _LOSS,
    Batch,
    check_options,
    expanded_taps,
    loss_named,
    loss_term,
)
from tests.support import own_losses

MakeStudy = Callable[..., Study]
ALL_TAPS = ("taps.attention=float16", "taps.hint.stage=stage2", "taps.embedding=float16")

OWN_LOSS = """
import torch
from teach_once.train.terms import Batch, loss_term


@loss_term(teacher_taps=["logits", "last_stage"], student=["logits", "embedding"])
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
        for name in BUILT_IN_LOSSES
        if name != "ce"
    ]
    study = make_study(
        teacher=(
            *ALL_TAPS,
            "taps.logits=float32",
            "taps.channel_means=float32",
            "taps.attention=float32",
            "taps.hint.dtype=float32",
            "taps.embedding=float32",
        ),
        student=(*settings, *terms),
    )
    for name in BUILT_IN_LOSSES:
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
    with pytest.raises(TrainError, match=r"add @loss_term"):
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
    assert "methods.at needs the taps attention1, attention2, attention3" in text
    assert "methods.fitnets needs the taps hint" in text
    assert "fix: make cache-teacher TEACHER=digits-resnet20 CACHES=" in text
    assert 'taps.attention=float16 taps.hint.stage=stage2"' in text


def test_before_the_pass_the_teachers_file_is_asked(make_study: MakeStudy) -> None:
    study = make_study(student=["methods.at=[{loss: at}]", "methods.hint=[{loss: fitnets}]"])
    planned = TapsOfTeacher.of_config(study.teacher, Path("caches"))
    planned.check(study.config, ["ce", "cd"])
    with pytest.raises(TrainError) as told:
        planned.check(study.config, ["ce", "at", "kd", "hint"])
    text = str(told.value)
    assert "fix: make cache-teacher TEACHER=digits-resnet20" in text
    assert 'taps.attention=float16 taps.hint.stage=stage2"' in text
    assert 'METHODS="ce kd"' in text


@pytest.mark.parametrize(
    ("options", "scale"), [({}, 1.0), ({"sharpness": 3.0}, 3.0)], ids=["default", "set"]
)
def test_a_loss_may_take_a_batch_or_name_the_parts_it_needs(
    options: dict[str, float], scale: float
) -> None:
    logits, teacher = torch.rand(4, 3), torch.rand(4, 3)
    batch = Batch(torch.zeros(4).long(), logits, teacher={"logits": teacher})
    for name in ("sharper", "sharper_by_name"):
        loss = loss_named(f"tests.support.own_losses:{name}")
        assert (loss.teacher_taps, loss.student) == ({"logits"}, {"logits"})
        assert torch.equal(
            loss.compute(batch, **options), (logits - scale * teacher).square().mean()
        )


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (torch.ones(4), r"a tensor of shape \(4,\)"),
        (torch.ones(1), r"a tensor of shape \(1,\)"),
        (0.5, "float"),
    ],
)
def test_a_loss_that_returns_no_scalar_is_named_with_what_it_returned(
    returned: object, told: str
) -> None:
    def per_sample(batch: Batch) -> object:
        return returned

    def by_name(student_logits: torch.Tensor) -> object:
        return returned

    batch = Batch(torch.zeros(4).long(), torch.rand(4, 3))
    for function in (per_sample, by_name):
        loss_term()(function)
        loss = getattr(function, _LOSS)
        with pytest.raises(TrainError, match=f"test_terms:{function.__name__} returned {told}"):
            loss.compute(batch)


def test_a_registered_loss_stays_the_function_it_is() -> None:
    assert own_losses.sharper_by_name(torch.ones(2), torch.ones(2), sharpness=2.0).item() == 1.0


def test_a_parameter_that_names_nothing_is_refused_where_the_loss_is_registered() -> None:
    def misspelt(student_logits: torch.Tensor, teacher_logit: torch.Tensor) -> torch.Tensor:
        return student_logits - teacher_logit

    with pytest.raises(TrainError, match=r"takes 'teacher_logit'.*did you mean 'teacher_logits'"):
        loss_term()(misspelt)


def test_options_are_checked_against_the_signature() -> None:
    def check(name: str, **options: float) -> None:
        loss = f"tests.support.own_losses:{name}"
        check_options("methods.x.0", LossTerm(loss=loss, options=options))

    check("sharper", sharpness=2.0)
    check("needs_margin", margin=2.0)
    check("takes_anything", whatever=2.0)
    by_full_name = LossTerm(loss="train.losses:kd", options={"temperature": 0.0})
    with pytest.raises(TrainError, match=r"options\.temperature: Input should be greater than 0"):
        check_options("methods.x.0", by_full_name)
    with pytest.raises(TrainError, match=r"methods\.x\.0: .* has no option 'margn'"):
        check("needs_margin", margn=2.0)
    with pytest.raises(TrainError, match=r"no default for 'margin'\n  fix: set methods\.x\.0"):
        check("needs_margin")


def test_configs_know_the_built_in_losses_as_they_are_registered() -> None:
    functions = {
        name: function
        for name, function in inspect.getmembers(losses, inspect.isfunction)
        if function.__module__ == losses.__name__ and not name.startswith("_")
    }
    assert set(BUILT_IN_LOSSES) == set(functions)
    for name, block in BUILT_IN_LOSSES.items():
        registered = loss_named(name)
        assert registered.function is functions[name]
        # The options in one order, with one type and default; and one sentence for both.
        for option, parameter in zip(
            dataclasses.fields(block), registered.options.values(), strict=True
        ):
            of_block = (option.name, str(option.type).removeprefix("Strict").lower())
            assert of_block == (parameter.name, str(parameter.annotation).lower())
            assert parameter.default == option.default
        (first, *_) = str(functions[name].__doc__).splitlines()
        assert f"Compute {' '.join(str(block.__doc__).split())}".casefold() == first.casefold()


def test_connected_losses_are_the_ones_whose_signatures_take_an_output_of_a_connector() -> None:
    registered = {name: loss_named(name).student & {"means", "hint"} for name in BUILT_IN_LOSSES}
    assert {name: {use} for name, use in CONNECTED_LOSSES.items()} == {
        name: set(uses) for name, uses in registered.items() if uses
    }


@pytest.mark.parametrize(
    ("term", "told"),
    [
        (
            "{loss: kd, tempature: 2}",
            "methods.x.0: the loss 'kd' has no option 'tempature'; did you mean",
        ),
        (
            "{loss: kd, wieght: 2}",
            "methods.x.0: the loss 'kd' has no option 'wieght'; did you mean 'w",
        ),
        ("{loss: kd, temperature: 0}", "methods.x.0.temperature: Input should be greater than 0"),
        ("{loss: rkd, angle_weight: -1}", "methods.x.0.angle_weight: Input should be greater than"),
        ("{loss: dkd, alpha: big}", "methods.x.0.alpha: Input should be a valid number"),
        ("{loss: kdd, temperature: 2}", "methods.x.0.loss: unknown loss; did you mean 'kd'"),
        ("{loss: 'my:own', alpha: 2}", "methods.x.0: put alpha of your own loss under"),
        ("{loss: 'my:own', sharpness: 2}", "methods.x.0.sharpness: unknown key"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_its_place(term: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_student("digits-resnet8", [f"methods.x=[{term}]"])
    _, line = str(refused.value).splitlines()
    assert line.startswith(f"  {told}")


def test_options_are_numbers_by_name_and_print_as_they_are_written() -> None:
    terms = "[{loss: dkd, beta: 2, alpha: null}, {loss: 'my:own', options: {sharpness: 2}}]"
    config = load_student("digits-resnet8", [f"methods.x={terms}"])
    assert [term.options for term in config.methods["x"]] == [{"beta": 2.0}, {"sharpness": 2.0}]
    builtin, own = as_plain(config)["methods"]["x"]
    assert builtin["beta"] == 2.0
    assert not {"options", "alpha", "temperature"} & set(builtin)
    assert own["options"] == {"sharpness": 2.0}


def test_a_runs_identity_holds_the_settings_of_its_terms(
    make_study: MakeStudy,
) -> None:
    study = make_study(student=["methods.x=[{loss: kd, temperature: 2}]"])
    assert study.run("x", 0).identity["terms"] == [
        {
            "loss": "kd",
            "weight": 1.0,
            "decay": 1.0,
            "decay_epochs": [],
            "start_epoch": 1,
            "warmup_epochs": 0,
            "temperature": 2.0,
        }
    ]


def test_options_are_refused_where_they_have_no_use() -> None:
    for term, told in (
        ("{loss: cd, alpha: 1}", "the loss 'cd' has no option 'alpha'"),
        ("{loss: kd, options: {temperature: 2}}", "options is for your own losses"),
        ("{loss: dkdd}", "did you mean 'dkd'"),
    ):
        with pytest.raises(ConfigError, match=told):
            load_student("digits-resnet8", [f"methods.x=[{term}]"])


def test_groups_of_taps_are_spelt_out() -> None:
    stages = ["stage1", "stage2"]
    assert expanded_taps(loss_named("cd"), stages) == {"stage1", "stage2"}
    assert expanded_taps(loss_named("at"), stages) == {"attention1", "attention2"}
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
        torch.zeros(3), torch.zeros(3, 2), maps={"stage1": maps}, teacher={"attention1": teacher}
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
