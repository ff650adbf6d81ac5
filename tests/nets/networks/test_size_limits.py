"""Network options that would exceed the memory or that a constructor rejects."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import teach_once.nets.networks.zoo
from teach_once.configs.load import ConfigError, load_teacher
from teach_once.nets.networks.archs import ArchError, Option
from teach_once.nets.networks.zoo import build, limited_size


@pytest.mark.parametrize("value", ["100000000", "-2000000", "1e999", "'" + "x" * 2000 + "'"])
def test_an_option_beyond_any_networks_sizes_is_refused_when_the_file_is_read(value: str) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.options"):
        load_teacher("digits-resnet20", [f"teacher.options={{depth: {value}}}"])


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("timm:test_vit", {"embed_dim": 10**6}),
        ("resnet20", {"width": 1e9}),
    ],
)
def test_a_network_larger_than_the_memory_is_refused_before_it_is_built(
    arch: str, options: dict[str, Option]
) -> None:
    with pytest.raises(ArchError, match=r"this machine has .* of memory"):
        build(arch, num_classes=3, stem="imagenet", options=options, image_size=(64, 64))


def test_a_network_of_endless_layers_is_refused_while_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teach_once.nets.networks.zoo, "MOST_TENSORS", 500)
    with pytest.raises(ArchError, match="more than 500 layers and parameters"):
        build("timm:test_vit", num_classes=3, options={"depth": 1000}, image_size=(64, 64))
    assert build("timm:test_vit", num_classes=3, options={"depth": 2}, image_size=(64, 64))


def test_ones_own_network_is_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teach_once.nets.networks.zoo, "total_memory", lambda: 1000)
    for make in (lambda: nn.Linear(20, 20), lambda: nn.BatchNorm1d(200)):
        with pytest.raises(ArchError, match="this machine has 1"), limited_size("mine"):
            make()
    with limited_size("mine"):
        nn.Linear(10, 10)
    nn.Linear(20, 20)  # nothing is counted outside


@pytest.mark.parametrize(
    "options",
    [{"act_layer": "nothing"}, {"norm_layer": 3}, {"num_heads": 0}, {"patch_size": 0}],
)
def test_an_option_that_a_constructor_cannot_use_is_an_error_without_a_traceback(
    options: dict[str, Option],
) -> None:
    with pytest.raises(ArchError, match=r"timm:test_vit.* cannot be built"):
        build("timm:test_vit", num_classes=3, options=options, image_size=(64, 64))


def test_counting_changes_no_weights() -> None:
    def weights(options: dict[str, Option]) -> torch.Tensor:
        network = build("timm:test_vit", num_classes=3, options=options, image_size=(64, 64))
        return network.head.weight  # type: ignore[no-any-return,union-attr]

    assert torch.equal(weights({}), weights({"depth": 6}))
