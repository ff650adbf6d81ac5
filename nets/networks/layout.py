"""Convert stage outputs of any layout to maps (B, C, H, W).

A tapped output is a map (B, C, H, W), a map with channels last (B, H, W, C), or tokens (B, N, C),
which may begin with class and register tokens. The layouts of torchvision's and timm's networks are
known. A user's own network declares its layout with timm's attributes, `output_fmt = "NHWC"` and
`num_prefix_tokens = 1`. Does not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from teach_once.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

# Classes of torchvision and timm that return (B, H, W, C) without declaring it.
_CHANNELS_LAST = ("torchvision.SwinTransformer", "timm.VOLO", "timm.VisionTransformerSAM")
_ONE_CLASS_TOKEN = ("torchvision.VisionTransformer",)
# Of timm, whose tokens are in the order of windows or of patches of several sizes.
_OUT_OF_ORDER = ("Hiera", "NaFlexVit", "Qwen3Vit", "Gemma4Vit", "DeepseekVit")


class TapError(UserError, ValueError):
    """A tap that does not exist, or a stage that the network lacks."""


@dataclass(frozen=True)
class Layout:
    """Layout of the outputs of a network's stages.

    channels_last: four-dimensional outputs are (B, H, W, C). num_prefix_tokens: number of class and
    register tokens at the start of tokens (B, N, C); None if unknown. row_by_row: the remaining
    tokens are in row-major order of the image.
    """

    channels_last: bool = False
    num_prefix_tokens: int | None = None
    row_by_row: bool = True


def layout_of(network: nn.Module) -> Layout:
    """Return the layout of the outputs of a network's stages."""
    kind = type(network)
    library = kind.__module__.partition(".")[0]
    name = f"{library}.{kind.__name__}"
    is_timms, says = library == "timm", str(getattr(network, "output_fmt", "NCHW"))
    unsaid = 1 if name in _ONE_CLASS_TOKEN else 0 if is_timms else None
    return Layout(
        channels_last=says == "NHWC" or name in _CHANNELS_LAST,
        num_prefix_tokens=getattr(network, "num_prefix_tokens", unsaid),
        row_by_row=not (is_timms and kind.__name__.startswith(_OUT_OF_ORDER)),
    )


def as_map(module: str, output: Tensor, layout: Layout, image_size: tuple[int, int]) -> Tensor:
    """Return a module's output as a map (B, C, H, W), without a copy.

    image_size: (H, W) of the images; the grid of tokens has the same aspect ratio. Raises TapError
    if the output is not a map.
    """
    shape = tuple(getattr(output, "shape", ()))
    if len(shape) == 4:
        return output.permute(0, 3, 1, 2) if layout.channels_last else output
    if len(shape) == 3:
        return _tokens_as_map(module, output, layout, image_size)
    what = f"of shape {shape[1:]} for an image" if shape else f"a {type(output).__name__}"
    raise TapError(
        f"the output of the module {module!r} is {what}, not a map (C, H, W) or (H, W, C), nor "
        f"tokens (N, C)",
        fix="choose a module that returns one of these",
    )


def _tokens_as_map(
    module: str, tokens: Tensor, layout: Layout, image_size: tuple[int, int]
) -> Tensor:
    """Convert tokens (B, N, C) to a map (B, C, H, W) without the prefix tokens.

    A module that runs before the class token is added returns no prefix tokens.
    """
    count, prefix = tokens.shape[1], layout.num_prefix_tokens
    what = f"the output of the module {module!r} is {count} tokens of {tokens.shape[2]} channels"
    if not layout.row_by_row:
        raise TapError(
            f"{what}, which are not in row-major order, so they do not form a map",
            fix="set taps.channel_means=null taps.embedding=float16 to store the classifier's "
            "input alone",
        )
    if prefix is None:
        raise TapError(
            f"{what}, and the number of class and register tokens is unknown",
            fix="give the network an attribute num_prefix_tokens (0 if every token is a position)",
        )
    for left_out in dict.fromkeys((prefix, 0)):
        positions = count - left_out
        if positions > 0 and (grid := size_like(*image_size, positions)) is not None:
            return tokens[:, left_out:].transpose(1, 2).reshape(len(tokens), -1, *grid)
    raise TapError(
        f"{what}; with or without the first {prefix}, they form no map of the proportions of "
        f"{image_size[0]}x{image_size[1]}",
        fix="choose another module, or correct the network's num_prefix_tokens",
    )


def size_like(height: int, width: int, positions: int) -> tuple[int, int] | None:
    """Return (height, width) of a map with `positions` positions and the given aspect ratio.

    height, width: size of the images. Each side may be off by less than one position, because
    strides round. Returns None if no size is that close, or if two are equally close.
    """
    ideal = (positions * height / width) ** 0.5
    sizes = sorted(
        (abs(rows - ideal), rows)
        for rows in range(max(1, math.ceil(ideal) - 1), math.floor(ideal) + 2)
        if positions % rows == 0 and abs(positions / rows - positions / ideal) < 1
    )
    if not sizes or sizes[0][0] >= 1 or (len(sizes) > 1 and sizes[1][0] - sizes[0][0] < 0.1):
        return None
    return sizes[0][1], positions // sizes[0][1]
