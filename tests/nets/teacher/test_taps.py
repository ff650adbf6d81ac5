"""Names of taps, and their values from a teacher's outputs."""

from __future__ import annotations

import pytest
import torch

from teach_once.configs.schema import Hint, TapsConfig
from teach_once.nets.networks.layout import TapError
from teach_once.nets.networks.zoo import build
from teach_once.nets.teacher.taps import Tap, in_order, read_stages, taps_asked, taps_stored
from teach_once.nets.teacher.teacher import Teacher
from teach_once.store.format.spec import TapSpec, is_opt_in, kind_of, optional_taps

NAMES = {
    Tap("logits"): "logits",
    Tap("correct"): "correct",
    Tap("stage", "stage2"): "stage2",
    Tap("attention", "stage12"): "attention12",
    Tap("hint", "stage3"): "hint",
    Tap("embedding"): "embedding",
}


@pytest.mark.parametrize("tap", NAMES)
def test_a_taps_name_is_parsed_to_the_same_tap(tap: Tap) -> None:
    assert tap.name == NAMES[tap]
    assert Tap.parse(tap.name, "stage3" if tap.kind == "hint" else None) == tap


@pytest.mark.parametrize("name", ["", "stage", "stage0", "stage1x", "attention", "Logits", "hint2"])
def test_another_name_is_no_tap(name: str) -> None:
    with pytest.raises(TapError, match="unknown tap"):
        Tap.parse(name)


def test_taps_of_one_kind_are_in_the_order_of_their_stages() -> None:
    names = ["attention10", "stage10", "logits", "stage9", "attention2", "hint"]
    assert in_order(names, "stage") == ["stage9", "stage10"]
    assert in_order(names, "attention") == ["attention2", "attention10"]


def test_a_cache_holds_what_its_teachers_file_asks_for() -> None:
    config = TapsConfig(attention="float16", hint=Hint(stage="stage2"))
    asked = taps_asked(config, ["stage1", "stage2"])
    assert [tap.name for tap in asked] == (
        ["logits", "stage1", "stage2", "correct", "attention1", "attention2", "hint"]
    )
    specs = {
        tap.name: TapSpec((1,), "float16", stage=tap.stage if tap.kind == "hint" else None)
        for tap in asked
    }
    assert taps_stored(specs) == asked
    with pytest.raises(TapError, match=r"taps\.hint\.stage: stage2 is not one of stage1"):
        taps_asked(config, ["stage1"])


def test_the_store_tells_the_kinds_of_taps_by_the_same_names() -> None:
    for tap, name in NAMES.items():
        assert kind_of(name) == tap.kind
        assert is_opt_in(name) == (tap.kind in ("attention", "hint", "embedding"))


def test_a_teacher_gives_the_taps_that_are_asked_for_and_no_others() -> None:
    network = build("resnet8", num_classes=3, in_channels=1).eval()
    stages = {"stage1": "layer1", "stage2": "layer2"}
    teacher = Teacher(network, stages, "float32", torch.device("cpu"))
    images, labels = torch.rand(2, 1, 8, 8), torch.zeros(2).long()
    asked = [Tap("hint", "stage2"), Tap("attention", "stage1"), Tap("correct")]
    shapes = {name: tuple(v.shape) for name, v in teacher.outputs(images, labels, asked).items()}
    assert shapes == {"hint": (2, 32, 4, 4), "attention1": (2, 64), "correct": (2,)}
    assert set(teacher.outputs(images, labels)) == {"logits", "stage1", "stage2", "correct"}


def test_a_module_whose_output_is_no_map_cannot_be_tapped() -> None:
    network = build("resnet8", num_classes=3, in_channels=1).eval()
    with (
        read_stages(network, {"stage1": "fc"}, lambda stage, features: features),
        pytest.raises(TapError, match=r"'fc' is of shape \(3,\) for an image, not a map"),
    ):
        network(torch.rand(2, 1, 8, 8))


def test_only_a_cache_with_other_taps_may_lack_its_opt_in_ones() -> None:
    assert optional_taps(["stage1", "attention1", "embedding"]) == {"attention1", "embedding"}
    assert optional_taps(["attention1", "embedding"]) == set()
