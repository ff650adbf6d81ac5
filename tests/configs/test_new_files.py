"""`teach-once new-teacher` and `new-student` write configs that state their cost and work."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import teach_once.nets.command
import teach_once.new_student
import teach_once.new_teacher
from teach_once.configs.load import load_student, load_teacher
from teach_once.configs.schema import TeacherConfig, as_plain
from teach_once.nets.networks.archs import ArchError
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.new_student import student_file
from teach_once.new_teacher import teacher_file
from teach_once.train.runs.check_methods import check_without_cache
from teach_once.train.runs.study import open_study
from teach_once.train.sessions.trial import first_losses
from teach_once.views.datasets import DatasetError
from tests.support.caches.teacher_cache import CPU, make_cache
from tests.support.datasets.other_formats import picture


def written(folder: Path, photographs: Path, model: str, weights: str = "timm:pretrained") -> Path:
    """A teacher's file, as `new-teacher` prints it for one view."""
    data = {"type": "imagefolder", "root": str(photographs)}
    (folder / "t.yaml").write_text(teacher_file(f"timm:{model}", data, weights, 1))
    return folder / "t.yaml"


def test_a_teachers_file_has_the_models_pixels_stages_and_true_bytes(
    photographs: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "w.pt"
    save_atomically(build("timm:test_convnext", num_classes=2).state_dict(), weights)
    file = written(tmp_path, photographs, "test_convnext", str(weights))
    config = load_teacher(file)
    assert config.dataset.normalization.mean == (0.5, 0.5, 0.5)
    assert config.views.augment.size_px == 160
    assert config.views.augment.interpolation == "bicubic"
    assert config.views.eval_transform.resize_px == int(160 / 0.95)
    assert config.taps.stages == ("stages.0", "stages.1", "stages.2", "stages.3")
    assert config.taps.logits == "float16"  # the weights have two classes, as the folder
    cache = make_cache(config, tmp_path / "caches", batch_size=8)
    assert f"A record takes {cache.manifest.record_bytes:,} bytes" in file.read_text()


@pytest.mark.parametrize(
    ("model", "told", "taps"),
    [
        ("test_convnext", "the weights have 1,000 classes, the images have 2", "means"),
        ("vit_small_patch14_dinov2", "the weights are without a classifier", "means"),
        ("twins_svt_small", "the weights have 1,000 classes", "embedding"),
    ],
)
def test_what_a_model_cannot_give_is_left_out_and_said(
    model: str, told: str, taps: str, photographs: Path, tmp_path: Path
) -> None:
    file = written(tmp_path, photographs, model)
    assert told in file.read_text()
    config = load_teacher(file)
    assert config.taps.logits is None
    assert config.taps.embedding == "float16"
    assert bool(config.taps.channel_means) == (taps == "means")


@pytest.mark.parametrize(
    ("model", "evaluation"),
    [
        ("test_convnext", {"type": "center-crop", "resize_px": 168, "crop_px": 160}),
        ("dm_nfnet_f0", {"type": "squash", "resize_px": 213, "crop_px": 192}),
        (
            "deepseek_vit_412m_enc.deepseek_v4_flash_vision_exp",
            {"type": "border", "resize_px": 392, "crop_px": 392},
        ),
    ],
)
def test_test_images_are_cropped_as_the_models_weights_were_tested(
    model: str, evaluation: dict[str, object], photographs: Path
) -> None:
    data = {"type": "imagefolder", "root": str(photographs)}
    draft = teach_once.new_teacher.Draft(f"timm:{model}", data, "timm:pretrained", 1)
    found = draft.config({"logits": "float16"})
    color = tuple(round(255 * channel) for channel in found.dataset.normalization.mean)
    expected = evaluation | ({"fill": color} if evaluation["type"] == "border" else {})
    assert {key: getattr(found.views.eval_transform, key) for key in expected} == expected


def test_a_students_file_has_the_methods_that_work(photographs: Path, tmp_path: Path) -> None:
    teacher = written(tmp_path, photographs, "test_convnext")
    terms = {"timm:test_resnet": ["ce", "cd", "embedding"], "resnet20": ["ce", "embedding"]}
    for arch, left_out in (("timm:test_resnet", "cd+gkd"), ("resnet20", "cd+embedding")):
        file = tmp_path / f"{arch[-4:]}.yaml"
        file.write_text(student_file(arch, str(teacher), 30, 64))
        assert f"# {left_out} is left out: " in file.read_text()
        config = load_student(file)
        assert left_out not in config.methods
        assert [term.loss for term in config.methods["distill"]] == terms[arch]
    assert "the student has 3 stages and the cache 4" in file.read_text()


@pytest.mark.parametrize(("size_px", "stem"), [(64, "cifar"), (65, "imagenet")])
def test_student_file_of_a_network_with_more_stages_than_the_teacher_takes_its_last(
    size_px: int, stem: str, photographs: Path, tmp_path: Path
) -> None:
    data = {"type": "imagefolder", "root": str(photographs)}
    text = teacher_file("timm:test_resnet", data, "timm:pretrained", 1, size_px)
    config = load_teacher("t.yaml", text=text)
    assert config.taps.stages is not None
    last = ", ".join(config.taps.stages[-2:])
    (tmp_path / "t.yaml").write_text(text.replace(", ".join(config.taps.stages), last))
    student = load_student("s.yaml", text=student_file("resnet18", str(tmp_path / "t.yaml"), 30, 8))
    assert student.student.stages == ("layer3", "layer4")
    assert student.student.stem == stem


def test_student_file_of_a_published_model_offers_its_weights(
    photographs: Path, tmp_path: Path
) -> None:
    teacher = str(written(tmp_path, photographs, "test_convnext"))
    file = tmp_path / "s.yaml"
    text = student_file("timm:test_resnet", teacher, 30, 64)
    file.write_text(text)
    assert load_student(file).student.init is None
    file.write_text(text.replace("# init:", "init:"))
    assert load_student(file).student.init == "timm:pretrained"
    for unpublished in ("resnet20", "timm:convnext_atto_rms"):
        assert "init" not in student_file(unpublished, teacher, 30, 64)


def test_a_teacher_with_logits_has_a_method_distill_too(photographs: Path, tmp_path: Path) -> None:
    save_atomically(build("timm:test_vit", num_classes=2).state_dict(), tmp_path / "w.pt")
    teacher = written(tmp_path, photographs, "test_vit", str(tmp_path / "w.pt"))
    for arch, terms in (("timm:test_vit", ["ce", "gkd", "cd"]), ("resnet8", ["ce", "kd"])):
        (tmp_path / "s.yaml").write_text(student_file(arch, str(teacher), 30, 64))
        config = load_student(tmp_path / "s.yaml")
        assert [term.loss for term in config.methods["distill"]] == terms


@pytest.mark.parametrize("model", ["coat_tiny", "crossvit_tiny_240"])
def test_a_stage_that_the_network_never_calls_is_said_to_be_none(
    model: str, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = teach_once.new_teacher.cli([f"timm:{model}", "--root", str(photographs)])
    out, err = capsys.readouterr()
    assert "the network does not call its " in out + err
    assert "Traceback" not in err
    if ended == 0:
        (tmp_path / "t.yaml").write_text(out)
        assert load_teacher(tmp_path / "t.yaml").taps.embedding == "float16"
    else:
        assert "fix: " in err


def test_weights_of_another_model_are_an_error(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_atomically(build("timm:test_resnet", num_classes=2).state_dict(), tmp_path / "w.pt")
    arguments = ["--root", str(photographs), "--weights", str(tmp_path / "w.pt")]
    assert teach_once.new_teacher.cli(["timm:test_convnext", *arguments]) == 2
    assert "w.pt do not fit the network" in capsys.readouterr().err


def test_weights_of_another_classifier_leave_the_logits_out_and_are_to_be_checked(
    photographs: Path, tmp_path: Path
) -> None:
    save_atomically(build("timm:test_convnext", num_classes=7).state_dict(), tmp_path / "w.pt")
    text = written(tmp_path, photographs, "test_convnext", str(tmp_path / "w.pt")).read_text()
    assert "# No logits: the weights in" in text
    assert "  logits: null" in text
    assert "check that yours were trained with it" in text
    assert "# expected_error: " in text


def test_a_size_of_ones_own_scales_the_evaluation(photographs: Path, tmp_path: Path) -> None:
    data = {"type": "imagefolder", "root": str(photographs)}
    text = teacher_file("timm:test_convnext", data, "timm:pretrained", 1, 96)
    (tmp_path / "t.yaml").write_text(text)
    views = load_teacher(tmp_path / "t.yaml").views
    assert views.augment.size_px == 96
    assert (views.eval_transform.resize_px, views.eval_transform.crop_px) == (101, 96)


def test_a_message_about_a_new_file_names_no_folder_of_its_own(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--root", str(photographs)]
    for arguments in (
        ["--root", "nowhere"],
        [*root, "--weights", "no.pt"],
        [*root, "--count", "70000"],
    ):
        assert teach_once.new_teacher.cli(["timm:test_convnext", *arguments]) == 2
        assert tempfile.gettempdir() not in capsys.readouterr().err.replace(str(tmp_path), "")


def test_wrong_names_and_folders_are_told_with_the_fix(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"type": "imagefolder", "root": str(tmp_path / "nowhere")}
    with pytest.raises(DatasetError, match=r"folder .* not found"):
        teacher_file("timm:test_vit", data, "timm:pretrained", 1)
    with pytest.raises(ArchError, match="did you mean 'test_vit'"):
        written(tmp_path, photographs, "tset_vit")
    assert teach_once.new_teacher.cli(["timm:test_vit"]) == 2
    assert "fix: add --root PATH" in capsys.readouterr().err
    assert teach_once.new_teacher.cli(["resnet34", "--root", str(photographs)]) == 2
    assert "did you mean 'timm:resnet34'?" in capsys.readouterr().err
    assert teach_once.new_student.cli(["resnet65", "--teacher", "digits-resnet20"]) == 2
    assert "did you mean 'resnet56'" in capsys.readouterr().err


def test_networks_are_listed_by_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert teach_once.nets.command.cli(["list", "timm:test_vit*"]) == 0
    told = capsys.readouterr().out
    assert "timm:test_vit.r160_in1k" in told
    assert "160x160 px" in told
    assert teach_once.nets.command.cli(["list", "resnet1*"]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[0].startswith("resnet14 ")
    assert "timm" not in told
    assert teach_once.nets.command.cli(["list", "nothing-like-it"]) == 2
    assert "fix: python -m nets list" in capsys.readouterr().err


def test_cd_begins_at_the_cross_entropy_of_a_guess(
    small_teacher: Callable[..., TeacherConfig], tmp_path: Path
) -> None:
    teacher = tmp_path / "t.yaml"
    plain = as_plain(small_teacher("taps.stages=[layer1, layer2.0.bn2, layer3]"))
    teacher.write_text(yaml.safe_dump({key: plain[key] for key in plain if key != "name"}))
    estimated = student_file("resnet8", str(teacher), 30, 16, tmp_path / "caches")
    assert "{loss: cd, weight: 0.768, normalize: true}" in estimated
    assert "estimated as 1 for each of 3 stages" in estimated
    make_cache(load_teacher(teacher), tmp_path / "caches")
    measured = student_file("resnet8", str(teacher), 30, 16, tmp_path / "caches")
    assert "the term begins at ln 10 = 2.3, as ce does" in measured
    (tmp_path / "s.yaml").write_text(measured)
    student, places = load_student(tmp_path / "s.yaml"), {"runs_dir": tmp_path / "runs"}
    study = open_study(student, load_teacher(teacher), caches_dir=tmp_path / "caches", **places)
    (_, cd) = study.config.methods["cd"]
    losses = first_losses(study.run("cd", 0), CPU)
    assert cd.weight * losses["cd"] == pytest.approx(math.log(10), rel=0.01)


def test_files_for_images_without_labels_work_together(tmp_path: Path) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for number in range(12):
        (tmp_path / "photos" / "a" / f"{number}.png").write_bytes(picture(number))
    data = {"type": "images", "root": str(tmp_path / "photos")}
    text = teacher_file("timm:test_vit", data, "timm:pretrained", 1, 64)
    assert "# timm:test_vit on 11 images without labels." in text
    assert "for kd,\n# set taps.logits: float16 and teacher.num_classes." in text
    (tmp_path / "t.yaml").write_text(text)
    config = load_teacher(tmp_path / "t.yaml")
    assert config.taps.logits is None
    assert config.taps.embedding == "float16"
    student = student_file("timm:test_resnet", str(tmp_path / "t.yaml"), 3, 8)
    assert "  distill: [{loss: embedding}]" in student
    assert "# kd is left out: " in student
    assert "loss: ce" not in student
    (tmp_path / "s.yaml").write_text(student)
    check_without_cache(load_student(tmp_path / "s.yaml"), config, ["distill"], tmp_path)
