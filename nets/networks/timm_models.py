"""timm's models: their names, how they are built, and the modules that end their stages.

A model's properties are read from a copy on the meta device, which has no weights and takes a tenth
of a second to build.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from teach_once.nets.networks.archs import ArchError, Option, unknown_option
from teach_once.runtime.command.program import program_text
from teach_once.runtime.errors import did_you_mean
from teach_once.runtime.machine.torchvision_shim import import_torchvision

MOST_STAGES = 4  # as for torchvision's networks

Size = tuple[int, int]  # height and width in pixels


def import_timm() -> ModuleType:
    """Import timm, which imports torchvision."""
    import_torchvision()
    import timm

    return timm


def check_model(name: str) -> None:
    """Raise ArchError, suggesting the nearest name, unless timm has a model called `name`."""
    pretrained_cfg(name)


@functools.cache
def pretrained_cfg(name: str) -> Any:
    """Return timm's `PretrainedCfg` of a model: its image size, classes and weights.

    Raises ArchError if timm has no such model or tag.
    """
    timm = import_timm()
    try:
        if timm.is_model(name):
            return timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:  # a tag that this model lacks
        tags = sorted(timm.list_pretrained(f"{name.partition('.')[0]}.*"))
        raise ArchError(
            f"timm has no weights {name!r} for this model{did_you_mean(name, tags)}",
            fix=f"use one of {', '.join(tags)}" if tags else f"use {name.partition('.')[0]}",
        ) from None
    near = did_you_mean(name, timm.list_models())
    raise ArchError(
        f"timm has no model {name!r}{near}",
        fix=f"{program_text('nets')} list 'timm:*{name[:4]}*'",
    )


def native_size(name: str) -> Size:
    """Return (height, width) of the images that the model's published weights were trained on."""
    _, height, width = pretrained_cfg(name).input_size
    return height, width


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: Size | None = None,
    options: Mapping[str, Option] | None = None,
) -> nn.Module:
    """Build a model with fresh weights.

    num_classes: 0 omits the classifier. image_size: (H, W) for models whose parameters depend on
    it (position embeddings); None: the image size of the published weights. options: additional
    arguments of the constructor. Raises ArchError if the model cannot be built.
    """
    settings: dict[str, Any] = {**(options or {})}
    settings |= {"num_classes": num_classes, "in_chans": in_channels}
    if image_size is not None and pretrained_cfg(name).fixed_input_size:
        settings["img_size"] = image_size
    try:
        network: nn.Module = import_timm().create_model(name, **settings)
    except ArchError:  # it is too large
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if refused := unknown_option(f"timm:{name}", options or {}, error):
            raise refused from None
        reason = str(error) or type(error).__name__
        raise _does_not_fit(name, image_size or native_size(name), reason) from error
    if image_size is not None:
        _check_patches(name, network, image_size)
    return network


def _check_patches(name: str, network: nn.Module, image_size: Size) -> None:
    """Raise ArchError if the image size is not a multiple of a transformer's patch size."""
    ratio = getattr(getattr(network, "patch_embed", None), "feat_ratio", None)
    patch_px = ratio() if callable(ratio) else 1
    if any(side % patch_px for side in image_size):
        raise _does_not_fit(name, image_size, f"its patches have {patch_px} pixels")


def _does_not_fit(name: str, image_size: Size, reason: str) -> ArchError:
    shown, native = ("x".join(map(str, size)) for size in (image_size, native_size(name)))
    return ArchError(
        f"timm:{name} cannot be built for images of {shown} pixels: {reason}",
        fix=f"use images of {native} pixels: views.augment.size_px={native_size(name)[0]}",
    )


@functools.cache
def stages_of(name: str) -> tuple[str, ...]:
    """Return the modules that end the model's stages; () if timm names none that exist.

    They are the last module at each of the four coarsest resolutions. A model with one resolution,
    such as a plain transformer, has four evenly spaced blocks instead, including the last one.
    Raises ArchError if the model cannot be built.
    """
    check_model(name)
    with torch.device("meta"):
        model = import_timm().create_model(name)
    listed = getattr(model, "feature_info", None)
    if not listed:
        return ()
    infos: list[dict[str, Any]] = listed if isinstance(listed, list) else listed.info
    if not {info["module"] for info in infos} <= {module for module, _ in model.named_modules()}:
        return ()  # for mvitv2, twins and hrnet, timm names no modules that can be hooked
    by_resolution = {info.get("reduction"): info["module"] for info in infos}
    if len(by_resolution) > 1:
        return tuple(by_resolution.values())[-MOST_STAGES:]
    return tuple(_evenly([info["module"] for info in infos], MOST_STAGES))


def _evenly(items: list[str], count: int) -> list[str]:
    """Return `count` evenly spaced items including the last, or all items if there are fewer."""
    count = min(count, len(items))
    return [items[len(items) * number // count - 1] for number in range(1, count + 1)]
