"""Maps, channels-last maps and tokens are converted to one layout in the hook."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from teach_once.nets.networks.archs import VISION_TRANSFORMERS
from teach_once.nets.networks.layout import Layout, TapError, as_map, layout_of
from teach_once.nets.networks.names import stage_modules
from teach_once.nets.networks.zoo import build
from teach_once.nets.teacher.taps import as_is, changed_in_place, read_stages
from teach_once.runtime.machine.torchvision_shim import import_torchvision


def test_every_layout_of_the_same_values_becomes_the_same_map() -> None:
    image = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    tokens = image.flatten(2).transpose(1, 2)
    registers = torch.full((2, 5, 3), torch.nan)
    for output, layout in (
        (image, Layout()),
        (image.permute(0, 2, 3, 1), Layout(channels_last=True)),
        (tokens, Layout(num_prefix_tokens=0)),
        (torch.cat([registers, tokens], dim=1), Layout(num_prefix_tokens=5)),
        (tokens, Layout(num_prefix_tokens=1)),  # the class token joins later
    ):
        assert torch.equal(as_map("stage", output, layout, (32, 48)), image)


def test_a_map_is_a_view_so_that_a_change_in_place_is_noticed() -> None:
    class InPlace(nn.Module):
        output_fmt = "NHWC"

        def __init__(self) -> None:
            super().__init__()
            self.stage = nn.Identity()

        def forward(self, images: Tensor) -> Tensor:
            features = self.stage(images.permute(0, 2, 3, 1).contiguous())
            return features.add_(1.0).mean(dim=(1, 2))

    maps, changed = changed_in_place(InPlace(), {"stage1": "stage"}, torch.rand(1, 3, 2, 2))
    assert maps["stage1"].shape == (1, 3, 2, 2)
    assert changed == {"stage1"}


@pytest.mark.parametrize(
    ("shape", "layout", "told"),
    [
        ((1, 7), Layout(), r"of the module 'body' is of shape \(7,\) for an image"),
        ((1, 2, 3, 4, 5), Layout(), r"'body' is of shape \(2, 3, 4, 5\) for an image"),
        ((1, 17, 8), Layout(), r"is 17 tokens of 8 channels, and the number of class and register"),
        ((1, 17, 8), Layout(num_prefix_tokens=2), "with or without the first 2, they form no map"),
        ((1, 16, 8), Layout(num_prefix_tokens=0, row_by_row=False), "not in row-major order"),
    ],
)
def test_what_is_no_map_is_named_with_its_module_its_shape_and_what_is_possible(
    shape: tuple[int, ...], layout: Layout, told: str
) -> None:
    with pytest.raises(TapError, match=rf"{told}(?s:.*)\n  fix: "):
        as_map("body", torch.zeros(shape), layout, (32, 32))
    with pytest.raises(TapError, match="'body' is a tuple, not a map"):
        as_map("body", (torch.zeros(1),), Layout(), (32, 32))  # type: ignore[arg-type]


def test_tokens_of_images_that_are_not_square_have_their_proportions() -> None:
    tokens = torch.zeros(1, 1 + 2 * 8, 4)
    layout = Layout(num_prefix_tokens=1)
    assert as_map("blocks", tokens, layout, (32, 128)).shape == (1, 4, 2, 8)
    with pytest.raises(TapError, match="proportions of 32x64"):
        as_map("blocks", tokens, layout, (32, 64))


def test_torchvisions_swin_has_maps() -> None:
    network = build("swin_t", num_classes=3, stem="imagenet").eval()
    stages = stage_modules("swin_t")
    with torch.inference_mode(), read_stages(network, stages, as_is, (64, 64)) as maps:
        assert network(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert [tuple(each.shape[1:]) for each in maps.values()] == (
        [(96, 16, 16), (192, 8, 8), (384, 4, 4), (768, 2, 2)]
    )


@pytest.mark.parametrize("arch", [*VISION_TRANSFORMERS, "swin_b", "swin_v2_t"])
def test_the_stages_of_torchvisions_transformers_are_their_modules(arch: str) -> None:
    with torch.device("meta"):
        network = build(arch, num_classes=3, stem="imagenet", image_size=(64, 64))
    stages = stage_modules(arch).values()
    assert len(stages) == 4
    assert set(stages) <= {name for name, _ in network.named_modules()}


def test_the_class_token_of_torchvisions_transformer_is_left_out() -> None:
    import_torchvision()
    from torchvision.models import VisionTransformer

    network = VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=3).eval()  # not one of the zoo's
    assert layout_of(network).num_prefix_tokens == 1
    layer = "encoder.layers.encoder_layer_0"
    whole: list[Tensor] = []
    network.get_submodule(layer).register_forward_hook(lambda *call: whole.append(call[2]))
    with torch.inference_mode(), read_stages(network, {"stage1": layer}, as_is) as maps:
        network(torch.randn(1, 3, 32, 32))
    assert torch.equal(maps["stage1"].flatten(2).transpose(1, 2), whole[0][:, 1:])
