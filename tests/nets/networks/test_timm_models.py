"""timm's models: names, stages, and maps that are timm's own intermediate features."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from teach_once.configs.load import load_teacher, to_yaml
from teach_once.nets.networks.archs import ArchError
from teach_once.nets.networks.layout import layout_of
from teach_once.nets.networks.names import check_arch, stage_modules
from teach_once.nets.networks.timm_models import stages_of
from teach_once.nets.networks.zoo import build
from teach_once.nets.teacher.taps import as_is, read_stages

# Small models, one for each form that a stage's output has: maps, maps with channels last (by
# attribute, by class), tokens with a class token, with registers too, and without any.
FORMS = {
    "test_resnet": "layer4",
    "test_mambaout": "stages.3",
    "test_vit": "blocks.5",
    "vit_tiny_patch16_dinov3_qkvb": "blocks.11",
    "gmlp_ti16_224": "blocks.29",
    "xcit_nano_12_p8_224": "blocks.11",
    "volo_d1_224": "network.4",
}


@pytest.mark.parametrize(("model", "last"), FORMS.items())
def test_stages_are_timms_own_intermediate_features(model: str, last: str) -> None:
    network = build(f"timm:{model}", num_classes=3, image_size=(64, 64)).eval()
    stages = stage_modules(f"timm:{model}")
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode(), read_stages(network, stages, as_is, (64, 64)) as maps:
        network(images)
        theirs = network.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")
    assert list(stages.values())[-1] == last
    for ours in maps.values():
        assert any(
            ours.shape == each.shape and torch.allclose(ours, each, atol=1e-5) for each in theirs
        )


def test_stages_are_the_four_coarsest_resolutions_or_four_blocks_evenly() -> None:
    assert stages_of("resnet18") == ("layer1", "layer2", "layer3", "layer4")  # not the stem
    assert stages_of("mobilenetv3_small_050")[-1] == "blocks.5"
    assert stages_of("vit_tiny_patch16_224") == ("blocks.2", "blocks.5", "blocks.8", "blocks.11")
    assert stages_of("levit_128s") == ("stages.0", "stages.1", "stages.2")
    assert stages_of("mvitv2_tiny") == ()  # timm names modules that do not exist


def test_names_are_timms_with_or_without_a_tag() -> None:
    for name in ("convnext_tiny", "convnext_tiny.fb_in1k"):
        check_arch(f"timm:{name}")
    with pytest.raises(ArchError, match=r"'convnxt_tiny'; did you mean 'convnext_tiny'\?"):
        check_arch("timm:convnxt_tiny")
    with pytest.raises(ArchError, match=r"no weights 'convnext_tiny\.x'(?s:.*)fix: use one of"):
        check_arch("timm:convnext_tiny.x")


def test_weights_depend_on_the_seed_and_the_size_of_images_on_what_is_asked() -> None:
    def embedding(seed: int, size: int) -> nn.Parameter:
        return build("timm:test_vit", num_classes=2, seed=seed, image_size=(size, size)).pos_embed

    assert torch.equal(embedding(1, 32), embedding(1, 32))
    assert not torch.equal(embedding(1, 32), embedding(2, 32))
    assert embedding(1, 64).shape[1] == 1 + 4 * 4
    told = (
        r"test_vit cannot be built for images of 20x20 pixels: its patches have 16 pixels\n.*=160"
    )
    with pytest.raises(ArchError, match=told):
        build("timm:test_vit", num_classes=2, image_size=(20, 20))


def test_a_model_takes_images_of_one_channel() -> None:
    network = build("timm:test_resnet", num_classes=2, in_channels=1)
    assert network(torch.rand(2, 1, 32, 32)).shape == (2, 2)


def test_tokens_in_another_order_than_the_images_are_known_to_be() -> None:
    with torch.device("meta"):
        assert not layout_of(build("timm:hiera_tiny_224", num_classes=3)).row_by_row
        assert layout_of(build("timm:test_vit", num_classes=3)).row_by_row


def test_a_printed_config_of_a_timm_model_has_no_stem() -> None:
    shown = {
        arch: to_yaml(load_teacher("imagenet-resnet34", [f"teacher.arch={arch}"]))
        for arch in ("timm:test_vit", "resnet34")
    }
    assert "stem:" not in shown["timm:test_vit"]
    assert "  stem: imagenet\n" in shown["resnet34"]
