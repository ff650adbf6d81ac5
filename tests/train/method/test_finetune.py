"""Fine-tuning: weights that are loaded, replaced and frozen, and their learning rates."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from teach_once.configs.load import ConfigError, load_student, load_teacher
from teach_once.configs.schema import TeacherConfig
from teach_once.nets.networks.archs import ArchError
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.nets.weights.source import weights_file
from teach_once.nets.weights.start import start_from
from teach_once.runtime.command.options import Compute
from teach_once.train.errors import TrainError
from teach_once.train.recording.checkpoint import Partial
from teach_once.train.recording.options import Recording
from teach_once.train.recording.recorder import Recorder
from teach_once.train.runs.study import Study
from teach_once.train.runs.weights import TeacherExists
from teach_once.train.sessions.student import open_context, train_student
from teach_once.train.sessions.teacher import train_teacher
from tests.support.caches.teacher_cache import CPU

MakeStudy = Callable[..., Study]
DIGIT = (8, 8, 1)
RATE = 0.01


def weights_of(
    folder: Path, *, arch: str = "resnet8", classes: int = 10, seed: int = 7, width: float = 1.0
) -> Path:
    """A file of weights that no run here begins with by itself."""
    path = folder / f"{arch}-{classes}-{seed}.pt"
    options = {"width": width}
    network = build(arch, num_classes=classes, in_channels=1, seed=seed, options=options)
    save_atomically(network.state_dict(), path)
    return path


def begun(study: Study, method: str = "ce") -> nn.Module:
    return open_context(study.run(method, 0), CPU).train_state.network


def state(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


# ---- what is filled


def test_a_student_begins_with_the_weights_of_a_file(make_study: MakeStudy, tmp_path: Path) -> None:
    path = weights_of(tmp_path)
    network = begun(make_study(student=[f"student.init={path}"]))
    assert all(
        torch.equal(value, state(path)[name]) for name, value in network.state_dict().items()
    )


def test_a_classifier_of_another_size_is_replaced_and_said_so(
    make_study: MakeStudy, tmp_path: Path, console
) -> None:
    path = weights_of(tmp_path, classes=7)
    study = make_study(student=[f"student.init={path}", "training.epochs=2"])
    network = begun(study)
    for name, value in network.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(value, state(path)[name]), name
    fresh = build("resnet8", num_classes=10, in_channels=1, seed=0)
    assert torch.equal(network.fc.weight, fresh.fc.weight)
    train_student(study.run("ce", 0), device="cpu", console=console)
    told = f"the student starts from {path}; a new classifier in place of its own: fc"
    assert told in console.file.getvalue()


@pytest.mark.parametrize(
    ("arch", "width", "told"), [("resnet14", 1.0, "unexpected"), ("resnet8", 0.5, "has shape")]
)
def test_nothing_but_the_classifier_may_differ(
    make_study: MakeStudy, tmp_path: Path, arch: str, width: float, told: str
) -> None:
    path = weights_of(tmp_path, arch=arch, classes=7, width=width)
    with pytest.raises(ArchError, match=f"student.init: the weights in .*(?s:.*){told}") as caught:
        begun(make_study(student=[f"student.init={path}"]))
    assert "fc." not in str(caught.value)


def test_a_file_that_is_missing_is_named_with_its_key(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    study = make_study(student=[f"student.init={tmp_path}/no.pt"])
    told = r"student.init: file .*no.pt not found\n  fix: set student.init=PATH"
    with pytest.raises(TrainError, match=told):
        train_student(study.run("ce", 0), device="cpu")


def test_the_bytes_of_the_file_decide_the_run_not_its_path(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    path, other = weights_of(tmp_path), weights_of(tmp_path, seed=8)
    moved = tmp_path / "moved.pt"
    shutil.copyfile(path, moved)
    one, same, another, none = (
        make_study(student=[f"student.init={each}"]).run("ce", 0).sha256
        for each in (path, moved, other, "null")
    )
    assert one == same
    assert len({one, another, none}) == 3


def test_weights_that_torchvision_names_are_taken_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name = "torchvision:ResNet18_Weights.IMAGENET1K_V1"
    published = build("resnet18", num_classes=1000, stem="imagenet", seed=7).state_dict()
    save_atomically(published, weights_file(name))
    network = build("resnet18", num_classes=3, stem="imagenet")
    started = start(network, "resnet18", name, "frozen_stages=4")
    assert started is not None
    assert "a new classifier in place of its own: fc" in started.said
    assert torch.equal(network.layer4[1].conv2.weight, published["layer4.1.conv2.weight"])
    trained = [name for name, each in network.named_parameters() if each.requires_grad]
    assert trained == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("model", "classifiers"),
    [("resnet10t", "fc"), ("deit_tiny_distilled_patch16_224", "head, head_dist")],
)
def test_a_model_of_timm_s_begins_with_a_file_for_other_classes_and_images(
    tmp_path: Path, model: str, classifiers: str
) -> None:
    path, arch = tmp_path / "published.pt", f"timm:{model}"
    published = build(arch, num_classes=1000, seed=7, image_size=(224, 224))
    save_atomically(published.state_dict(), path)
    network = build(arch, num_classes=3, image_size=(64, 64))
    started = start(network, arch, str(path), "frozen_stages=1", shape=(64, 64, 3))
    assert started is not None
    assert started.said.startswith(f"starts from {path}; a new classifier in place of its own: ")
    assert classifiers in started.said
    last = "blocks.11.mlp.fc2.weight" if "deit" in model else "layer4.0.conv2.weight"
    assert torch.equal(network.state_dict()[last], published.state_dict()[last])
    frozen = [name for name, each in network.named_parameters() if not each.requires_grad]
    first = "cls_token" if "deit" in model else "conv1.0.weight"
    assert first in frozen
    assert last not in frozen


def start(
    network: nn.Module,
    arch: str,
    init: str,
    setting: str,
    shape: tuple[int, int, int] = (32, 32, 3),
):
    overrides = [f"training.{setting}", f"student.init={init}"]
    training = load_student("digits-resnet8", overrides).training
    key = "student.init"
    return start_from(network, arch, init, training, key=key, stages=None, image_shape=shape)


# ---- how fast the rest learns


def test_what_was_filled_learns_at_a_factor_of_the_rate_and_a_new_classifier_at_the_whole(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    path = weights_of(tmp_path, classes=7)
    settings = [f"student.init={path}", "training.epochs=1", "training.schedule={type: cosine}"]
    plain = ["training.batch_size=60", "training.momentum=0.0", "training.weight_decay=0.0"]
    changes = {}
    for factor in ("1.0", "0.1"):
        study = make_study(student=[*settings, *plain, f"training.pretrained_lr_factor={factor}"])
        before = {name: value.clone() for name, value in begun(study).state_dict().items()}
        train_student(study.run("ce", 0), device="cpu")  # one step
        after = state(study.run("ce", 0).folder / "last.pt")
        changes[factor] = {name: after[name] - before[name] for name in after}
    for name in ("conv1.weight", "layer3.0.bn2.bias"):
        assert torch.allclose(changes["0.1"][name], 0.1 * changes["1.0"][name], atol=1e-7), name
        assert changes["1.0"][name].abs().max() > 1e-5
    assert torch.equal(changes["0.1"]["fc.weight"], changes["1.0"]["fc.weight"])


# ---- what is frozen


@pytest.mark.parametrize("optimizer", ["{type: sgd}", "{type: adamw}"])
def test_frozen_stages_keep_their_weights_and_statistics_to_the_bit(
    make_study: MakeStudy, tmp_path: Path, optimizer: str
) -> None:
    path = weights_of(tmp_path)
    study = make_study(
        student=[
            f"student.init={path}",
            "training.frozen_stages=2",
            f"training.optimizer={optimizer}",
            "training.freeze_idle_classifier=false",
            "training.ema.decay=0.5",
        ]
    )
    train_student(study.run("cd+gkd", 0), device="cpu")
    for name in ("last.pt", "last-ema.pt"):
        trained = state(study.run("cd+gkd", 0).folder / name)
        for key, first in state(path).items():
            is_frozen = key.startswith(("conv1.", "bn1.", "layer1.", "layer2."))
            assert torch.equal(trained[key], first) == is_frozen, key


def test_a_run_from_frozen_stages_resumes_exactly(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [f"student.init={weights_of(tmp_path, classes=7)}", "training.frozen_stages=1"]
    run = make_study(student=[*settings, "training.pretrained_lr_factor=0.1"]).run("cd", 0)
    keep = Recorder.save

    def kept_then_killed(self: Recorder, partial: Partial) -> None:
        keep(self, partial)
        if partial.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "save", kept_then_killed)
        with pytest.raises(KeyboardInterrupt):
            train_student(run, device="cpu", checkpoint_minutes=0)
    resumed = train_student(run, device="cpu")["files_sha256"]
    shutil.rmtree(run.folder)
    assert train_student(run, device="cpu")["files_sha256"] == resumed


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["frozen_stages=1"], "training.frozen_stages requires pretrained weights: set st"),
        (["pretrained_lr_factor=0.1"], "training.pretrained_lr_factor requires pretrained weights"),
        (["frozen_stages=-1"], "training.frozen_stages: Input should be greater than or equal"),
        (
            ["pretrained_lr_factor=0.0"],
            "training.pretrained_lr_factor: Input should be greater than 0",
        ),
        (["init=x.pt"], "training.init: unknown key"),
    ],
)
def test_fine_tuning_without_weights_is_refused(settings: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_student("digits-resnet8", [f"training.{setting}" for setting in settings])
    assert told in str(caught.value)
    if "init=" not in settings[0]:
        with pytest.raises(ConfigError, match=r"training"):
            load_teacher("digits-resnet20", [f"training.{setting}" for setting in settings])


def test_more_frozen_stages_than_there_are_is_refused(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    settings = [f"student.init={weights_of(tmp_path)}", "training.frozen_stages=4"]
    with pytest.raises(ArchError, match="frozen_stages is 4, but the network has 3 stages"):
        begun(make_study(student=settings))


# ---- a teacher


def test_a_teacher_is_trained_from_weights_for_other_classes(
    small_teacher: Callable[..., TeacherConfig], tmp_path: Path, console
) -> None:
    init = weights_of(tmp_path, classes=7)

    def config(*more: str) -> TeacherConfig:
        settings = ["training.epochs=1", "training.max_per_class=6", "training.frozen_stages=3"]
        target = f"teacher.weights={tmp_path / 'teacher.pt'}"
        return small_teacher(target, f"training.init={init}", *settings, *more)

    summary = train_teacher(config(), Compute("cpu"), Recording(console=console))
    trained = state(tmp_path / "teacher.pt")
    assert torch.equal(trained["layer3.0.conv1.weight"], state(init)["layer3.0.conv1.weight"])
    assert trained["fc.weight"].shape == (10, 64)
    assert "the teacher starts from" in console.file.getvalue()
    assert "; the first 3 stages are frozen" in console.file.getvalue()
    assert len(summary["settings"]["training"]["init"]) == 64  # hexadecimal digits of a sha256
    from teach_once.train.runs.weights import existing_weights

    assert existing_weights(config()).notes == []
    other = weights_of(tmp_path, classes=7, seed=8)
    with pytest.raises(TeacherExists, match=r"training.init"):
        existing_weights(config(f"training.init={other}"))
    init.unlink()
    assert "cannot check its initial weights" in existing_weights(config()).notes[0]


# ---- options of the constructor


def test_options_reach_the_constructor() -> None:
    half = build("resnet8", num_classes=10, options={"width": 0.5})
    assert (half.conv1.out_channels, half.fc.in_features) == (8, 32)
    tiny = {"stochastic_depth_prob": 0.2, "layer_scale": 1e-3}
    convnext = build("convnext_tiny", num_classes=3, stem="imagenet", options=tiny)
    depths = [m.p for m in convnext.modules() if type(m).__name__ == "StochasticDepth"]
    assert max(depths) == pytest.approx(0.2)
    vit = build("timm:vit_tiny_patch16_224", num_classes=3, options={"drop_path_rate": 0.3})
    assert vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("arch", "option", "told"),
    [
        ("resnet8", {"drop_path_rate": 0.1}, "arch 'resnet8' has no option 'drop_path_rate'"),
        ("convnext_tiny", {"drop_path_rate": 0.1}, "has no option 'drop_path_rate'"),
        ("timm:resnet10t", {"stochastic": 0.1}, "arch 'timm:resnet10t' has no option 'stochastic'"),
        ("python:tests.support.own_network:make", {"depth": 3}, "has no option 'depth'"),
        ("resnet18", {"weights": "DEFAULT"}, "options.weights of arch 'resnet18' is not an option"),
        ("timm:resnet10t", {"pretrained": True}, "options.pretrained of arch"),
        ("resnet8", {"width": "half"}, "cannot be built with options {width: half}"),
    ],
)
def test_options_that_a_constructor_does_not_take_are_refused_by_name(
    arch: str, option: dict[str, float], told: str
) -> None:
    with pytest.raises(ArchError) as caught:
        build(arch, num_classes=3, stem="imagenet", options=option)
    assert told in str(caught.value)


def test_a_student_s_options_are_part_of_its_run_and_of_its_export(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    from teach_once.train.recording.export import export_student

    study = make_study(student=["student.options={width: 0.5}", "training.epochs=2"])
    assert study.run("cd", 0).identity["student"]["options"] == {"width": 0.5}
    assert make_study().run("cd", 0).identity["student"]["options"] == {}
    train_student(study.run("cd", 0), device="cpu")
    (card,) = export_student(study.run("cd", 0), ["last"], tmp_path / "out", device="cpu")
    assert card["options"] == {"width": 0.5}
    assert state(tmp_path / "out" / "student.pt")["fc.weight"].shape == (10, 32)
