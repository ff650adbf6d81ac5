"""Configs: every file loads, and every mistake is reported with its location and a fix."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from teach_once.configs.command import cli
from teach_once.configs.load import (
    CONFIG_DIR,
    ConfigError,
    available,
    load_student,
    load_teacher,
    split_overrides,
    to_yaml,
)
from teach_once.configs.schema import as_plain
from teach_once.nets.networks.names import check_arch


@pytest.mark.parametrize("name", available("teacher"))
def test_every_teacher_config_loads_and_prints_what_it_resolved_to(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_teacher(name)
    check_arch(config.teacher.arch)
    assert name.endswith(config.teacher.arch)
    monkeypatch.chdir(tmp_path)  # relative paths stay the same ones
    Path(f"{name}.yaml").write_text(to_yaml(config))
    assert load_teacher(f"{name}.yaml") == config


@pytest.mark.parametrize("name", available("student"))
def test_every_student_config_loads_and_names_a_teacher_that_exists(
    name: str, tmp_path: Path
) -> None:
    config = load_student(name)
    check_arch(config.student.arch)
    load_teacher(config.teacher)
    again = tmp_path / f"{name}.yaml"
    again.write_text(to_yaml(config))
    assert load_student(again) == config


@pytest.fixture
def write(tmp_path: Path):
    def write_yaml(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write_yaml


GOOD = (CONFIG_DIR / "teacher" / "digits-resnet20.yaml").read_text()


def message(call) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


def test_all_mistakes_are_told_at_once_with_their_dotted_paths(write) -> None:
    text = GOOD.replace("weights:", "weigths:").replace("batch_size: 64", "batch_size: big")
    text = text.replace("pad_px: 1", "pad_pxs: 1").replace("epochs: 20", "epochs: 0")
    told = message(lambda: load_teacher(write(text)))
    assert "mine.yaml" in told
    assert "teacher.weights: missing" in told
    assert "teacher.weigths: unknown key; did you mean 'weights'?" in told
    assert "views.augment.pad_pxs: unknown key; did you mean 'pad_px'?" in told
    assert "training.batch_size: Input should be a valid integer (found 'big')" in told
    assert "training.epochs: Input should be greater than or equal to 1 (found 0)" in told


def test_exponents_without_a_dot_are_numbers(write) -> None:
    config = load_teacher(write(GOOD.replace("5e-4", "1e-3")))
    assert config.training is not None
    assert config.training.weight_decay == 0.001


@pytest.mark.parametrize("text", ["yes", "'1'", "1", "on"])
def test_only_true_and_false_are_booleans(write, text: str) -> None:
    told = message(lambda: load_teacher(write(GOOD.replace("flip: false", f"flip: {text}"))))
    assert "views.augment.flip: Input should be a valid boolean" in told


def test_a_key_that_stands_twice_is_refused(write) -> None:
    told = message(lambda: load_teacher(write(GOOD + "\nteacher: {arch: resnet8, weights: x}\n")))
    assert "duplicate key 'teacher'" in told


def test_a_count_above_the_space_is_refused_with_the_largest_possible(write) -> None:
    told = message(lambda: load_teacher(write(GOOD.replace("count: all", "count: 10"))))
    assert "views: count is 10, but this augmentation has only 9 distinct views" in told


def test_a_kind_that_does_not_exist_is_refused_with_those_that_do(write) -> None:
    told = message(lambda: load_teacher(write(GOOD.replace("type: digits", "type: digit"))))
    assert "dataset" in told
    assert "'imagefolder'" in told


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("training.accumulate=2", "gradient_accumulation"),
        ("training.clip_gradient_norm=1", "max_grad_norm"),
        ("training.evaluate_every=2", "eval_every"),
        ("training.init_rate_factor=1", "pretrained_lr_factor"),
        ("training.decay_norms_and_biases=true", "weight_decay_norm_bias"),
        ("training.schedule={type: cosine, last_learning_rate: 0}", "final_learning_rate"),
        ("taps.energy=float16", "attention"),
        ("taps.means=float16", "channel_means"),
        ("taps.logits={top: 3}", "top_k"),
        ("dataset.limit=3", "max_per_class"),
        ("dataset.kind=digits", "type"),
        ("dataset.normalisation=null", "normalization"),
        ("views.augment.colour_jitter=null", "color_jitter"),
        ("views.augment.erasing=null", "random_erasing"),
    ],
)
def test_config_with_an_old_key_names_the_new_one(override: str, meant: str) -> None:
    told = message(lambda: load_teacher("digits-resnet20", [override]))
    assert f"unknown key; did you mean '{meant}'" in told


def test_an_unknown_loss_is_refused_by_its_place() -> None:
    told = message(lambda: load_student("digits-resnet8", ["methods.kd.1.loss=kdd"]))
    assert "methods.kd.1.loss" in told
    assert "did you mean 'kd'? " in told
    assert "configs reference lists all (found 'kdd')" in told


def test_a_temperature_where_there_is_none_is_refused() -> None:
    told = message(lambda: load_student("digits-resnet8", ["methods.cd.1.temperature=2"]))
    assert "methods.cd.1: the loss 'cd' has no option 'temperature'" in told


def test_nesterov_without_momentum_is_refused() -> None:
    overrides = ["training.nesterov=true", "training.momentum=0.0"]
    told = message(lambda: load_student("digits-resnet8", overrides))
    assert "training: nesterov: true requires a momentum above 0" in told


def test_load_with_an_unknown_name_is_refused_with_the_nearest_and_the_command_that_lists() -> None:
    told = message(lambda: load_teacher("digits-resnet21"))
    assert "did you mean 'digits-resnet20' or 'imagenet-resnet34'?" in told
    assert re.search(r"\n  fix: .*configs list$", told)
    assert "file /nowhere/x.yaml not found" in message(lambda: load_student("/nowhere/x.yaml"))


@pytest.mark.parametrize("text", ["", "- a list", "a: [unclosed", "\x00"])
def test_what_is_no_mapping_is_refused(write, text: str) -> None:
    assert "mine.yaml" in message(lambda: load_teacher(write(text)))


def test_overrides_reach_nested_keys_lists_and_whole_blocks() -> None:
    config = load_student(
        "digits-resnet8",
        ["training.epochs=7", "methods.kd.1.weight=2.5", 'training.schedule={"type":"onecycle"}'],
    )
    assert config.training.epochs == 7
    assert config.methods["kd"][1].weight == 2.5
    assert config.training.schedule.type == "onecycle"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.epochs", "expected key.sub=value"),
        ("training.epoch=3", "training.epoch: unknown key; did you mean 'epochs'?"),
        ("methods.kd.9.weight=1", "'9' is not an index into 2 items"),
        ("methods.kd.2.weight=1", "'2' is not an index into 2 items"),
        ("methods.cd.²=1", "'²' is not an index into 2 items"),
        (f"methods.cd.{'9' * 5000}=1", "9...' is not an index into 2 items"),
        (f"training.epochs={'9' * 5000}", "too many digits"),
        ("training.epochs=2001-01-01", "a valid integer (found '2001-01-01')"),
        ("training.epochs=!!python/name:os.system", "could not determine a constructor"),
        ("training.schedule={<<: {type: onecycle}}", "training.schedule.type: missing"),
        (f"training.epochs={'[' * 3000}", "not a config: more than 20 levels"),
        ('student.arch="\\0"', "control characters"),
        ("teacher.arch.x=1", "block 'arch' not found"),
        ("training.epochs=[1", "not valid YAML"),
        ("training.epochs=1.5", "training.epochs: Input should be a valid integer"),
    ],
)
def test_bad_overrides_are_named(override: str, told: str) -> None:
    assert told in message(lambda: load_student("digits-resnet8", [override]))


def test_overrides_for_the_teacher_are_told_apart() -> None:
    own, teachers = split_overrides(["training.epochs=1", "teacher.dataset.max_per_class=2"])
    assert (own, teachers) == (["training.epochs=1"], ["dataset.max_per_class=2"])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["dataset.max_per_class=0100"],
            "dataset.max_per_class: Input should be a valid integer (found '0100')",
        ),
        (["dataset.max_per_class=0100"], "; write 100"),
        (
            ["dataset.max_per_class=1:30"],
            "dataset.max_per_class: Input should be a valid integer (found '1:30')",
        ),
        (["views.count=1_0"], "a valid integer or 'all' (found '1_0'); write 10"),
        (["views.augment.pad_px=91", "views.augment.flip=true"], "use pad_px: 90 or less"),
        (["views.augment.pad_px=128"], "use pad_px: 127 or less"),
        (
            ["views.evaluation={type: center-crop, flip: true}"],
            "views.evaluation: the test transform must not be",
        ),
        (["views.evaluation={type: center-crop, flip: true}"], "must not be random: remove flip"),
        (["views.evaluation={type: center-crop, mix: {type: mixup}}"], "remove mix"),
        (
            ["views.evaluation={type: center-crop, random_erasing: {}, color_jitter: {}}"],
            "remove color_jitter, random_erasing",
        ),
        (
            ["training.schedule={type: multistep, milestones: [8, 21]}"],
            "milestones [8, 21] exceed the last epoch, 20",
        ),
        (["teacher.expected_error=101"], "teacher.expected_error: Input should be less than"),
    ],
)
def test_nonsense_in_a_teachers_file_is_named_with_what_would_be_right(
    overrides: list[str], told: str
) -> None:
    assert told in message(lambda: load_teacher("digits-resnet20", overrides))


def test_a_normalization_of_pixels_up_to_255_is_refused_with_its_values_scaled() -> None:
    given = "{mean: [123.675], std: [58.395]}"
    told = message(lambda: load_teacher("digits-resnet20", [f"dataset.normalization={given}"]))
    assert "mean is [123.675], but pixels are scaled to [0, 1]" in told
    assert "divided by 255: mean=[0.485]" in told
    given = "{mean: [0.5], std: [1.2]}"
    told = message(lambda: load_teacher("digits-resnet20", [f"dataset.normalization={given}"]))
    assert "std is [1.2], but pixels are scaled" in told
    given = "{mean: [0.0], std: [1.0]}"
    load_teacher("digits-resnet20", [f"dataset.normalization={given}"])


def test_the_largest_values_that_make_sense_are_accepted() -> None:
    fine = [
        "views.augment.pad_px=90",
        "views.augment.flip=true",
        "views.evaluation={type: center-crop, crop_px: 6}",
    ]
    assert load_teacher("digits-resnet20", fine).views.num_views == 65_522
    assert load_teacher("digits-resnet20", ["views.augment.pad_px=127"]).views.num_views == 65_025
    load_student("digits-resnet8", ["training.epochs=32"])


@pytest.mark.parametrize("epochs", [1, 10, 31])
def test_milestones_that_an_override_of_the_epochs_puts_out_of_reach_are_refused(
    epochs: int,
) -> None:
    told = message(lambda: load_student("digits-resnet8", [f"training.epochs={epochs}"]))
    assert f"schedule.milestones [12, 24, 32] exceed the last epoch, {epochs}" in told
    (closer,) = re.findall(r"use, for example, (\[.*?\])", told)
    recipe = [f"training.epochs={epochs}", f"training.schedule.milestones={closer}"]
    assert load_student("digits-resnet8", recipe).training.epochs == epochs


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("methods.x=[{weight: 1}]", "methods.x.0.loss: missing"),
        ("methods.x=[{loss: kdd}]", "methods.x.0.loss: unknown loss; did you mean 'kd'"),
        ("methods.x=3", "methods.x: Input should be a list (found 3)"),
        ("methods.kd.0=3", "methods.kd.0: Input should be a block of keys (found 3)"),
        ("training.schedule={}", "training.schedule.type: missing"),
        ("methods.x=[]", "methods.x: must not be empty"),
    ],
)
def test_one_mistake_is_one_line(override: str, told: str) -> None:
    first, line = message(lambda: load_student("digits-resnet8", [override])).splitlines()
    assert first == "configs/student/digits-resnet8.yaml cannot be used:"
    assert line.startswith(f"  {told}")


def test_what_yaml_says_of_a_long_word_is_cut(write) -> None:
    told = message(lambda: load_teacher(write(f"{GOOD}x: *{'a' * 10_000}")))
    assert "found undefined alias 'aaa" in told
    assert len(told) < 1000


def test_keys_that_are_not_text_are_named_with_their_line(write) -> None:
    assert "line 28 is not text: 3" in message(lambda: load_teacher(write(GOOD + "  3: x\n")))


def test_how_a_config_was_named_is_no_part_of_it(write) -> None:
    plain, path = load_teacher("digits-resnet20"), write(GOOD)
    named = load_teacher(path, ["views.count=9"])
    assert named.source is not None
    assert (named.source.name, named.source.overrides) == (str(path), ("views.count=9",))
    assert "source" not in as_plain(named)
    renamed = load_teacher("digits-resnet20", ["views.count=all"])
    assert renamed == plain
    assert "source: unknown key" in message(lambda: load_teacher(write(GOOD + "\nsource: x\n")))


@pytest.mark.parametrize(
    ("name", "told"), [("x" * 300, "unknown teacher config"), (f"{'x' * 300}.yaml", "not found")]
)
def test_a_name_that_is_too_long_for_a_file_is_one_that_is_not_there(name: str, told: str) -> None:
    assert told in message(lambda: load_teacher(name))


def test_the_command_prints_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["teacher", "digits-resnet20", "views.count=2"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["views"]["count"] == 2
    assert cli(["teacher-of", "digits-resnet8"]) == 0
    assert capsys.readouterr().out == "digits-resnet20\n"
    assert cli(["nonsense"]) == 2


def test_an_override_of_the_other_file_is_refused_with_the_key_to_write() -> None:
    for key in ("dataset.max_per_class=6", "views={seed: 1}", "taps.channel_means=uint8"):
        with pytest.raises(ConfigError, match="is a key of the teacher's file") as refusal:
            load_student("digits-resnet8", [key])
        assert refusal.value.fix == f"write teacher.{key}"
        with pytest.raises(ConfigError, match=r"the prefix teacher\. is for") as refusal:
            load_teacher("digits-resnet20", [f"teacher.{key}"])
        assert refusal.value.fix == f"write {key}"
    load_teacher("digits-resnet20", ["teacher.arch=resnet8"])
    load_student("digits-resnet8", ["teacher=digits-resnet20"])
