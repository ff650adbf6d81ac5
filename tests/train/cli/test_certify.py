"""python -m train.certify: the effect of a reduced cache on a student's losses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from teach_once.configs.schema import TeacherConfig
from teach_once.store import CacheMismatch, TeacherCache
from teach_once.store.move.convert import convert_cache
from teach_once.train import losses
from teach_once.train.certify import check_reduced, cli, loss_changes
from teach_once.train.errors import TrainError
from teach_once.train.runs.study import Study
from teach_once.train.sessions.student import open_context
from tests.support.caches.teacher_cache import CPU, make_cache
from tests.support.programs.pass_commands import overrides_of

MakeStudy = Callable[..., Study]
BATCH = 16  # of the small student


@pytest.fixture
def study(make_study: MakeStudy) -> Study:
    return make_study()


def changes(study: Study, reduced: TeacherCache, steps: int) -> dict[str, float]:
    run = study.run("cd+gkd", 0)
    context = open_context(run, CPU)
    try:
        return loss_changes(run, context, reduced, steps)
    finally:
        context.teacher.close()


def kd_of_an_untrained_student(study: Study, cache: TeacherCache) -> float:
    context = open_context(study.run("cd+gkd", 0), CPU)
    context.teacher.close()
    logits = torch.from_numpy(cache.read_view(0, ["logits"])["logits"])
    context.train_state.network.train()
    total = 0.0
    with torch.no_grad():
        for batch in context.data.train.batches([0], np.arange(60), BATCH):
            ours = context.train_state.network(batch.inputs)
            total += losses.kd(ours, logits[batch.ids]).item() * len(batch.ids)
    return total / 60


def test_changes_are_those_of_the_losses_on_both_caches(study: Study) -> None:
    path = study.cache.path
    reduced = convert_cache(path, path.with_name("r"), logits="top:2", channel_means="uint8")
    found = changes(study, reduced, steps=8)
    full, cut = (kd_of_an_untrained_student(study, each) for each in (study.cache, reduced))
    assert found["kd_change_untrained"] == pytest.approx(cut / full - 1, rel=1e-3)
    assert abs(found["kd_change_untrained"]) > 0.01
    assert 0 < abs(found["cd_change_untrained"]) < 0.01
    assert found["certified_steps"] == 8
    for loss in ("cd", "kd", "gkd"):
        assert found[f"{loss}_change_trained"] != found[f"{loss}_change_untrained"]


def test_losses_that_do_not_read_what_is_reduced_do_not_change(study: Study) -> None:
    path = study.cache.path
    cut = convert_cache(path, path.with_name("cut"), logits="top:2")
    coded = convert_cache(path, path.with_name("coded"), channel_means="uint8")
    of_cut, of_coded = changes(study, cut, 2), changes(study, coded, 2)
    for student in ("untrained", "trained"):
        assert of_cut[f"cd_change_{student}"] == 0
        assert of_coded[f"kd_change_{student}"] == of_coded[f"gkd_change_{student}"] == 0
        assert of_coded[f"cd_change_{student}"] != 0


def test_no_more_steps_are_taken_than_the_recipe_has(study: Study) -> None:
    found = changes(study, study.cache, 10**6)
    assert found["certified_steps"] == 4 * 4  # epochs, steps
    assert {value for key, value in found.items() if "change" in key} == {0.0}


def test_the_command_prints_the_changes_and_records_them(
    study: Study, small_teacher: Callable[..., TeacherConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    path = study.cache.path
    reduced = convert_cache(path, path.with_name("r"), logits="top:2")
    own = ["training.epochs=1", "training.batch_size=16", "training.schedule={type: onecycle}"]
    call = ["digits-resnet8", "--caches", str(path.parent), "--reduced", str(reduced.path)]
    weights = small_teacher().teacher.weights
    call += ["--device", "cpu", *own, *(f"teacher.{each}" for each in overrides_of(str(weights)))]
    call += ["--full", str(path)]
    assert cli(call) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert re.search(r"before the first step: cd \+0\.000 %, kd [-+]\d+\.\d{3} %, gkd", told)
    assert "after 4 steps: cd +0.000 %" in told
    assert "kd_change_trained" not in TeacherCache.open(reduced.path).measured
    assert cli([*call, "--record"]) == 0
    assert TeacherCache.open(reduced.path).measured["certified_steps"] == 4
    assert cli([*call, "--method", "kd"]) == 2
    assert "the method kd has no term cd" in capsys.readouterr().err


def test_a_cache_of_other_views_is_refused(
    study: Study, small_teacher: Callable[..., TeacherConfig], tmp_path: Path
) -> None:
    other = make_cache(small_teacher("views.seed=5", "taps.logits={top_k: 2}"), tmp_path / "other")
    with pytest.raises(CacheMismatch, match=r"views\.seed"):
        check_reduced(study.cache, other)
    alike = make_cache(small_teacher("taps.logits={top_k: 2}"), tmp_path / "other")
    check_reduced(study.cache, alike)


def test_a_method_without_connectors_for_cd_is_refused(study: Study) -> None:
    run = study.run("kd", 0)
    context = open_context(run, CPU)
    context.teacher.close()
    with pytest.raises(TrainError, match="has no term cd"):
        loss_changes(run, context, study.cache, 1)
