"""timm's weights, from a file or downloaded, converted if necessary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from teach_once.configs.schema import TeacherConfig, TeacherNet
from teach_once.nets.networks.archs import ArchError
from teach_once.nets.networks.timm_models import import_timm
from teach_once.nets.networks.zoo import build
from teach_once.nets.teacher.identity import known_sha256
from teach_once.nets.teacher.teacher import load_teacher_network
from teach_once.nets.weights.source import fetched_weights, weights_file
from teach_once.store.identity import file_sha256
from teach_once.store.inspect.find import find_cache
from tests.support.caches.teacher_cache import make_cache, setup_of

MODEL = "test_vit"


def loaded(weights: str, *, size: int = 160, num_classes: int = 1000) -> torch.nn.Module:
    """The teacher's network for images of that size."""
    return load_teacher_network(
        TeacherNet(arch=f"timm:{MODEL}", weights=weights),
        {},
        num_classes=num_classes,
        image_shape=(size, size, 3),
        device=torch.device("cpu"),
        calibration=(),
    ).network


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A file as timm publishes it: for images of 160 pixels and 1,000 classes."""
    state = build(f"timm:{MODEL}", num_classes=1000, seed=7).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of downloads, empty, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def downloaded(published: Path, hub: Path, model: str = MODEL) -> Path:
    """The file where the hub's library puts it."""
    cfg = import_timm().get_pretrained_cfg(model)
    folder = hub / f"models--{cfg.hf_hub_id.replace('/', '--')}"
    file = folder / "snapshots" / ("a" * 40) / "model.safetensors"
    for each in (file, folder / "refs" / "main"):
        each.parent.mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    file.write_bytes(published.read_bytes())
    return file


def test_a_safetensors_file_fills_the_model(published: Path) -> None:
    network, source = loaded(str(published)), build(f"timm:{MODEL}", num_classes=1000, seed=7)
    for name, value in source.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"x" * 100])
def test_a_damaged_safetensors_file_is_refused_by_name(
    published: Path, damage: Callable[[bytes], bytes]
) -> None:
    published.write_bytes(damage(published.read_bytes()))
    with pytest.raises(ArchError, match=r"model\.safetensors is not a readable \.safetensors"):
        loaded(str(published))
    with pytest.raises(ArchError, match=r"weights file .*gone\.safetensors not found"):
        loaded(str(published.with_name("gone.safetensors")))


def test_position_embeddings_are_resampled_for_images_of_another_size_as_timm_does(
    published: Path,
) -> None:
    theirs = import_timm().create_model(
        MODEL,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(published)},
        img_size=(64, 64),
    )
    ours = loaded(str(published), size=64).state_dict()
    assert ours["pos_embed"].shape[1] == 1 + 4 * 4
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("size", [160, 64])
def test_classes_that_differ_are_refused_unless_logits_are_left_out(
    published: Path, size: int
) -> None:
    told = r"head\.weight has shape \(1000, 64\), expected \(3, 64\)"
    with pytest.raises(ArchError, match=told):
        loaded(str(published), size=size, num_classes=3)
    network = loaded(str(published), size=size, num_classes=0)
    assert network(torch.randn(2, 3, size, size)).shape == (2, 64)
    expected = build(f"timm:{MODEL}", num_classes=1000, seed=7).state_dict()
    assert torch.equal(network.state_dict()["norm.weight"], expected["norm.weight"])
    assert torch.equal(network.state_dict()["blocks.5.mlp.fc1.weight"],
                       expected["blocks.5.mlp.fc1.weight"])  # fmt: skip


def test_published_weights_are_found_where_they_were_downloaded(published: Path, hub: Path) -> None:
    assert not weights_file(f"timm:{MODEL}").is_file()
    assert known_sha256(f"timm:{MODEL}") is None
    file = downloaded(published, hub)
    assert fetched_weights(f"timm:{MODEL}") == file
    assert known_sha256(f"timm:{MODEL}") == file_sha256(published)
    assert torch.equal(loaded("timm:pretrained").head.bias, loaded(str(published)).head.bias)


def test_without_a_network_the_error_names_the_file_to_fetch(hub: Path) -> None:
    with pytest.raises(ArchError, match=rf"(?s)weights of {MODEL} \(160x160 pixels\) cannot be "
                       r"downloaded.*fix: download http\S*model\.safetensors where there is a "
                       r"network, and set teacher\.weights=PATH"):  # fmt: skip
        fetched_weights(f"timm:{MODEL}")
    with pytest.raises(ArchError, match="timm publishes no weights for"):
        fetched_weights("timm:botnet50ts_256")


def test_the_cache_suffices_where_published_weights_are_not_at_hand(
    small_teacher: Callable[..., TeacherConfig], published: Path, hub: Path, tmp_path: Path
) -> None:
    config = small_teacher(
        "teacher.arch=timm:test_resnet",
        "teacher.weights=timm:pretrained",
        "taps.logits=null",
        "training=null",
    )
    state = build("timm:test_resnet", num_classes=1000, in_channels=1).state_dict()
    save_file(state, published)
    file = downloaded(published, hub, "test_resnet")
    cache = make_cache(config, tmp_path / "caches")
    file.unlink()
    setup = setup_of(config, tmp_path / "caches")
    assert setup.identity["teacher"]["weights_sha256"] is None
    assert find_cache(tmp_path / "caches", config.name, setup.identity).path == cache.path
