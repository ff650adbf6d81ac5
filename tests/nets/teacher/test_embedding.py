"""The embedding, and caches without logits or channel means, from the pass to the student."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import nn

import teach_once.precompute.command
import teach_once.precompute.verify
from teach_once.configs.load import ConfigError, to_yaml
from teach_once.configs.schema import StudentConfig, TapsConfig, TeacherConfig
from teach_once.nets.networks.classifier import classifiers_of, read_embedding
from teach_once.nets.networks.layout import TapError
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.compute.teacher_pass import PassOptions
from teach_once.precompute.run_pass import fill_cache
from teach_once.store import CacheError, TeacherCache
from teach_once.store.move.trim import trim_cache
from teach_once.train import losses
from teach_once.train.errors import TrainError
from teach_once.train.runs.study import Study
from teach_once.train.sessions.loop import EpochResult
from teach_once.train.sessions.student import train_student
from tests.support.caches.teacher_cache import CPU, make_cache, setup_of
from tests.support.training.training_runs import largest_relative

MakeStudy = Callable[..., Study]
MakeTeacher = Callable[..., TeacherConfig]
ONLY = ("taps.logits=null", "taps.channel_means=null", "taps.embedding=float32")
METHODS = ("methods.own=[{loss: ce}, {loss: embedding, weight: 2}, {loss: embedding_mse}]",)


def embedding_of(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    shape = (*images.shape[2:], images.shape[1])
    values: dict[str, torch.Tensor] = {}
    with torch.no_grad(), read_embedding(network, classifiers_of(network, shape), values):
        network(images)
    return values["embedding"]


@pytest.mark.parametrize("arch", ["resnet8", "mobilenet_v3_small", "timm:test_resnet"])
def test_the_embedding_is_what_the_classifier_makes_logits_of(arch: str) -> None:
    network = build(arch, num_classes=3, stem="imagenet").eval()
    images = torch.randn(2, 3, 32, 32)
    (name,) = classifiers_of(network, (32, 32, 3))
    logits = network.get_submodule(name)(embedding_of(network, images))
    assert torch.allclose(logits, network(images), atol=1e-6)


@pytest.mark.parametrize(
    "model",
    ["test_vit", "test_convnext", "mobilenetv3_small_050", "deit_tiny_distilled_patch16_224"],
)
@pytest.mark.parametrize("num_classes", [0, 3])
def test_the_embedding_is_timms_own(model: str, num_classes: int) -> None:
    network = build(f"timm:{model}", num_classes=num_classes, image_size=(32, 32)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        theirs = network.forward_head(network.forward_features(images), pre_logits=True)
    assert torch.allclose(embedding_of(network, images), theirs, atol=1e-6)
    if not num_classes:
        assert torch.allclose(network(images), theirs, atol=1e-6)


def test_a_network_that_ends_in_no_layer_has_no_embedding() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Softmax(dim=1))
    with pytest.raises(TapError, match="the network has no embedding"):
        classifiers_of(network, (2, 2, 3))
    maps = nn.Sequential(nn.Conv2d(3, 2, 1))
    with pytest.raises(TapError, match=r"classifier '0' has shape \(3, 2, 2\) per image"):
        embedding_of(maps, torch.randn(1, 3, 2, 2))


def test_the_losses_on_embeddings_against_their_definitions() -> None:
    ours, theirs = torch.randn(4, 6), torch.randn(4, 6)
    lengths = (ours.square().sum(dim=1) * theirs.square().sum(dim=1)).sqrt()
    cosines = (ours * theirs).sum(dim=1) / lengths
    assert losses.embedding(ours, theirs).item() == pytest.approx((1 - cosines).mean().item())
    assert losses.embedding(ours, 3 * ours).item() == pytest.approx(0.0, abs=1e-6)
    squares = (ours - theirs).square().mean()
    assert losses.embedding_mse(ours, theirs).item() == pytest.approx(squares.item())
    assert losses.embedding(ours.half(), theirs.half()).dtype == torch.float32


def test_a_cache_of_embeddings_alone_is_made_verified_and_trained_from(
    small_teacher: MakeTeacher, make_study: MakeStudy, tmp_path: Path, capsys
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(to_yaml(small_teacher(*ONLY)))
    arguments = [str(file), "--caches", str(tmp_path / "caches")]
    for _ in ("the pass", "nothing to do"):
        assert teach_once.precompute.command.cli(arguments) == 0
        assert "has no logits, so no error was measured" in " ".join(
            capsys.readouterr().out.split()
        )
    assert teach_once.precompute.verify.cli(arguments) == 0
    assert "valid:" in capsys.readouterr().out
    study = make_study(ONLY, METHODS)
    assert set(study.cache.taps) == {"embedding"}
    assert study.cache.taps["embedding"].shape == (64,)
    summary = train_student(study.run("own", 0), device="cpu")
    assert summary["last"]["top1_error"] < 90


def step_losses(study: Study, *, live: bool) -> list[float]:
    epochs: list[EpochResult] = []
    train_student(study.run("own", 0, live), device="cpu", on_epoch=epochs.append)
    return [loss for epoch in epochs for loss in epoch.step_losses]


@pytest.mark.parametrize("taps", [ONLY, ("taps.embedding=float32",)], ids=["alone", "beside"])
def test_a_cached_run_on_embeddings_equals_a_live_one(
    make_study: MakeStudy, taps: Sequence[str]
) -> None:
    study = make_study(taps, METHODS)
    cached, live = step_losses(study, live=False), step_losses(study, live=True)
    assert largest_relative(live, cached) < 1e-5
    assert cached[-1] < cached[0]


def test_an_embedding_is_added_to_a_cache_and_dropped_again(
    small_teacher: MakeTeacher, tmp_path: Path
) -> None:
    plain = make_cache(small_teacher(), tmp_path)
    grown = make_cache(small_teacher("taps.embedding=float16"), tmp_path)
    assert grown.path == plain.path
    assert set(grown.taps) - set(plain.taps) == {"embedding"}
    trim_cache(grown.path, drop_taps=["embedding"])
    assert set(TeacherCache.open(grown.path).taps) == set(plain.taps)
    alone = make_cache(small_teacher(*ONLY), tmp_path)
    with pytest.raises(CacheError, match="holds no other taps"):
        trim_cache(alone.path, drop_taps=["embedding"])
    trim_cache(alone.path, num_views=2)
    assert TeacherCache.open(alone.path).num_views == 2


def test_a_cache_without_logits_takes_weights_with_any_classifier(
    small_teacher: MakeTeacher, tmp_path: Path
) -> None:
    weights = tmp_path / "other.pt"
    source = build("resnet8", num_classes=1000, in_channels=1, seed=3)
    save_atomically(source.state_dict(), weights)
    config = small_teacher("taps.logits=null", f"teacher.weights={weights}", "training=null")
    cache = make_cache(config, tmp_path / "caches")
    assert list(cache.taps) == ["stage1", "stage2", "stage3"]
    setup = setup_of(small_teacher(f"teacher.weights={weights}", "training=null"), tmp_path)
    with pytest.raises(ValueError, match=r"fc\.weight has shape \(1000, 64\), expected \(10, 64\)"):
        fill_cache(setup, PassOptions(CPU, 256, 16), Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("taps", "method", "told"),
    [
        (ONLY, "kd", r"needs the taps logits\n  fix: .*taps\.logits=float16"),
        (
            ONLY,
            "cd",
            r"needs the taps stage1, stage2, stage3\n  fix: .*taps\.channel_means=float16",
        ),
        (ONLY, "rkd", r"needs the taps stage3\n  fix: .*taps\.channel_means=float16"),
        ((), "own", r"needs the taps embedding\n  fix: .*taps\.embedding=float16"),
    ],
)
def test_a_method_that_needs_another_kind_of_cache_says_which_key_adds_it(
    make_study: MakeStudy, taps: Sequence[str], method: str, told: str
) -> None:
    study = make_study(taps, METHODS)
    with pytest.raises(TrainError, match=told):
        train_student(study.run(method, 0), device="cpu")


def test_connectors_none_need_embeddings_of_one_size(make_study: MakeStudy) -> None:
    same = ("student.connector=none", *METHODS)
    train_student(make_study(ONLY, [*same, "training.epochs=2"]).run("own", 0), device="cpu")
    other = make_study(ONLY, [*same, "student.arch=resnet8x4"])
    with pytest.raises(
        TrainError, match=r"student's embedding has 256 numbers and the teacher's 64"
    ):
        train_student(other.run("own", 0), device="cpu")


def test_a_cache_holds_something() -> None:
    with pytest.raises(ValidationError, match="nothing is stored"):
        TapsConfig(logits=None, channel_means=None)


def test_the_key_of_what_is_new_changes_no_identity_where_it_is_not_used(
    small_teacher: MakeTeacher, tmp_path: Path
) -> None:
    identity = setup_of(small_teacher(), tmp_path).identity
    assert identity["taps"] == {"logits": "float16", "channel_means": "float16"}
    assert set(identity["teacher"]) == {
        *("arch", "stem", "stages", "weights_sha256", "bn", "precision")
    }
    grown = setup_of(small_teacher("taps.embedding=float16"), tmp_path).identity
    assert grown == identity


def test_a_picture_of_a_cache_without_logits_is_drawn(
    small_teacher: MakeTeacher, tmp_path: Path
) -> None:
    from teach_once.store.inspect.picture import picture

    cache = make_cache(small_teacher(*ONLY), tmp_path)
    assert picture(cache).startswith(b"\x89PNG")


def test_timms_published_weights_are_those_of_the_arch(
    small_teacher: MakeTeacher, small_student: Callable[..., StudentConfig]
) -> None:
    config = small_teacher("teacher.arch=timm:test_vit", "teacher.weights=timm:pretrained")
    assert config.teacher.weights == "timm:test_vit"
    with pytest.raises(ConfigError, match="requires an arch timm:NAME, but arch is re"):
        small_teacher("teacher.weights=timm:pretrained")


def test_the_pass_refuses_to_recalibrate_what_has_no_batch_norm(
    small_teacher: MakeTeacher, tmp_path: Path
) -> None:
    config = small_teacher(
        "teacher.arch=python:tests.support.own_network:make", "teacher.bn=recalibrated", *ONLY
    )
    with pytest.raises(
        ValueError, match=r"own_network:make has no batch norm\n  fix: set teacher\.bn=eval"
    ):
        fill_cache(setup_of(config, tmp_path), PassOptions(CPU), Console(file=io.StringIO()))


def test_values_of_both_kinds_are_exact(small_teacher: MakeTeacher, tmp_path: Path) -> None:
    cache = make_cache(
        small_teacher("taps.embedding=float32", "taps.channel_means=float32"), tmp_path
    )
    records = cache.read_view(1)
    assert np.allclose(records["embedding"], records["stage3"], atol=1e-5)  # of a ResNet
