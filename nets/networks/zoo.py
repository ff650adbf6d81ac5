"""Build a network by name.

There are five kinds: the CIFAR ResNets of the usual small-image benchmark (three stages, 6n+2
layers); torchvision's ResNets, with their original stem or a stem for small images; torchvision's
other classifiers, unchanged; timm's models; and a user's own function. Taps are in `nets.teacher`.

The parameter-free shortcut of the 2015 paper is not implemented: current benchmarks use a 1x1
convolution, and so do the published results that this project compares with.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from teach_once.nets.networks.archs import (
    CIFAR_RESNETS,
    PYTHON_PREFIX,
    TORCHVISION_RESNETS,
    VISION_TRANSFORMERS,
    ArchError,
    Option,
    no_such_option,
    timm_model,
    unknown_option,
)
from teach_once.nets.networks.names import check_arch
from teach_once.runtime.command.user_code import CannotImport, import_named
from teach_once.runtime.formats import format_size
from teach_once.runtime.machine.resources import total_memory

MOST_TENSORS = 50_000  # timm's largest networks have a few thousand


def try_without_memory(arch: str, build: Callable[[], nn.Module]) -> None:
    """Build the network on the meta device and discard it. Raises ArchError if it is too large.

    All other errors are left to the real build, because some constructors fail on the meta device.
    """
    try:
        with torch.device("meta"), limited_size(arch):
            build()
    except ArchError:
        raise
    except Exception:  # the real build reports the error
        return


@contextmanager
def limited_size(arch: str) -> Iterator[None]:
    """Raise ArchError if a network built in this context exceeds this machine's memory."""
    most_bytes, tensors, num_bytes = total_memory(), 0, 0

    def count(module: nn.Module, name: str, value: Tensor | nn.Module | None) -> None:
        nonlocal tensors, num_bytes
        tensors += 1
        if isinstance(value, Tensor):
            num_bytes += value.numel() * value.element_size()
        if tensors > MOST_TENSORS:
            raise _too_large(arch, f"more than {MOST_TENSORS:,} layers and parameters")
        if num_bytes > most_bytes:
            raise _too_large(
                arch,
                f"parameters of at least {format_size(num_bytes)}; this machine has "
                f"{format_size(most_bytes)} of memory",
            )

    handles = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
        hooks.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _too_large(arch: str, has: str) -> ArchError:
    return ArchError(f"arch {arch!r} with these options has {has}", fix="use smaller options")


# Arguments of constructors that are not options, because the data or other keys determine them.
_SET_HERE = (
    *("num_classes", "in_channels", "in_chans", "img_size", "image_size", "blocks_per_stage"),
    *("widths", "weights", "pretrained", "checkpoint_path", "features_only", "cache_dir"),
    *("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "progress"),
)

_OF_ARGUMENTS = (AssertionError, RuntimeError, TypeError, ValueError)  # raised for bad arguments


class Net(Protocol):
    """The config of a teacher's or a student's network."""

    @property
    def arch(self) -> str: ...
    @property
    def stem(self) -> str: ...
    @property
    def options(self) -> Mapping[str, Option]: ...


def build_net(
    net: Net, *, num_classes: int, image_shape: tuple[int, int, int], seed: int = 0
) -> nn.Module:
    """Build a config's network for images of shape (H, W, C).

    Raises ArchError if it cannot be built.
    """
    height, width, channels = image_shape
    return build(
        net.arch,
        num_classes=num_classes,
        in_channels=channels,
        stem=net.stem,
        seed=seed,
        image_size=(height, width),
        options=net.options,
    )


def build(
    arch: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    stem: str = "cifar",
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    options: Mapping[str, Option] | None = None,
) -> nn.Module:
    """Build a network whose initial weights depend on `seed` alone.

    `python:package.module:function` calls function(num_classes=..., in_channels=...).

    num_classes: 0 omits the classifier (timm's models only). stem: "cifar" or "imagenet".
    image_size: (H, W), for networks that are built for one size (transformers); None: the usual
    size. options: additional arguments of the constructor.

    Raises ArchError if the network cannot be built or does not accept an option.
    """
    check_arch(arch)
    options = options or {}
    if reserved := [name for name in options if name in _SET_HERE]:
        raise ArchError(
            f"options.{reserved[0]} of arch {arch!r} is not an option: the program sets it itself",
            fix=f"remove options.{reserved[0]}",
        )
    make = functools.partial(_built, arch, num_classes, in_channels, stem, image_size, options)
    is_own = arch.startswith(PYTHON_PREFIX)
    if options and not is_own:
        try_without_memory(arch, make)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with limited_size(arch) if options else contextlib.nullcontext():
                network: nn.Module = make()
                return network
        except ArchError:
            raise
        except Exception as error:  # of options, constructors raise anything at all
            if not options or (is_own and not isinstance(error, _OF_ARGUMENTS)):
                raise
            given = ", ".join(f"{name}: {value}" for name, value in options.items())
            raise unknown_option(arch, options, error) or ArchError(
                f"arch {arch!r} cannot be built with options {{{given}}}: {error}"
            ) from error


def _built(
    arch: str,
    num_classes: int,
    in_channels: int,
    stem: str,
    image_size: tuple[int, int] | None,
    options: Mapping[str, Option],
) -> nn.Module:
    if arch in CIFAR_RESNETS:
        shape = CIFAR_RESNETS[arch]
        given: dict[str, Any] = dict(options)
        return CifarResNet(shape.blocks_per_stage, shape.widths, num_classes, in_channels, **given)
    if arch.startswith(PYTHON_PREFIX):
        return _python_network(arch, num_classes, in_channels, options)
    if model := timm_model(arch):
        from teach_once.nets.networks.timm_models import build_model

        return build_model(
            model,
            num_classes=num_classes,
            in_channels=in_channels,
            image_size=image_size,
            options=options,
        )
    if arch in TORCHVISION_RESNETS:
        return _torchvision_resnet(arch, num_classes, in_channels, stem, options)
    if stem != "imagenet" or in_channels != 3:
        raise ArchError(f"arch {arch!r} exists only with stem: imagenet and for RGB images")
    return _torchvision_network(arch, num_classes, image_size, options)


class CifarResNet(nn.Module):
    """CIFAR ResNet: 3x3 stem, three stages of basic blocks, global average pooling, classifier."""

    def __init__(
        self,
        blocks_per_stage: int,
        widths: Sequence[int],
        num_classes: int,
        in_channels: int,
        width: float = 1.0,  # factor of all widths
    ) -> None:
        super().__init__()
        widths = [max(1, round(channels * width)) for channels in widths]
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(widths[0], widths[1], blocks_per_stage, stride=1)
        self.layer2 = _stage(widths[1], widths[2], blocks_per_stage, stride=2)
        self.layer3 = _stage(widths[2], widths[3], blocks_per_stage, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, in_width: int, out_width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, out_width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_width)
        self.downsample = None
        if stride != 1 or in_width != out_width:
            shortcut = nn.Conv2d(in_width, out_width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_width))

    def forward(self, features: Tensor) -> Tensor:
        shortcut = features if self.downsample is None else self.downsample(features)
        features = self.relu(self.bn1(self.conv1(features)))
        outputs: Tensor = self.relu(self.bn2(self.conv2(features)) + shortcut)
        return outputs


def _stage(in_width: int, out_width: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_width, out_width, stride)
    rest = [BasicBlock(out_width, out_width, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(first, *rest)


def _torchvision_network(
    arch: str,
    num_classes: int,
    image_size: tuple[int, int] | None,
    options: Mapping[str, Option],
) -> nn.Module:
    from teach_once.runtime.machine.torchvision_shim import import_torchvision

    import_torchvision()
    from torchvision import models

    settings: dict[str, Any] = {"num_classes": num_classes, **options}
    if arch in VISION_TRANSFORMERS and image_size is not None:
        if image_size[0] != image_size[1]:
            size = "x".join(map(str, image_size))
            raise ArchError(f"arch {arch!r} needs square images, but these have {size} pixels")
        settings["image_size"] = image_size[0]
    try:
        network: nn.Module = getattr(models, arch)(weights=None, **settings)
    except AssertionError as error:
        raise ArchError(f"arch {arch!r} cannot be built for {image_size}: {error}") from error
    known = inspect.signature(type(network).__init__).parameters
    for name in options:  # some constructors silently accept unknown options
        if name not in known:
            raise no_such_option(arch, name)
    return network


def _torchvision_resnet(
    arch: str, num_classes: int, in_channels: int, stem: str, options: Mapping[str, Option]
) -> nn.Module:
    network = _torchvision_network(arch, num_classes, None, options)
    if stem == "cifar":
        network.conv1 = _fresh_conv(in_channels, 3, stride=1, padding=1)
        network.maxpool = nn.Identity()
    elif in_channels != 3:
        network.conv1 = _fresh_conv(in_channels, 7, stride=2, padding=3)
    return network


def _python_network(
    arch: str, num_classes: int, in_channels: int, options: Mapping[str, Option]
) -> nn.Module:
    _, module, function = arch.split(":")
    try:
        make = import_named(module, function)
    except CannotImport as error:
        raise ArchError(
            f"arch {arch!r} cannot be loaded: {error.problem}",
            fix=error.fix,
        ) from None
    if not callable(make):
        raise ArchError(f"arch {arch!r} names a {type(make).__name__}, expected a function")
    try:
        network = make(num_classes=num_classes, in_channels=in_channels, **options)
    except TypeError as error:  # usually a function with other parameters
        if refused := unknown_option(arch, options, error):
            raise refused from None
        raise ArchError(f"arch {arch!r} cannot be built: {error}") from error
    if not isinstance(network, nn.Module):
        raise ArchError(
            f"arch {arch!r} returned a {type(network).__name__}, expected a torch.nn.Module"
        )
    return network


def _fresh_conv(in_channels: int, kernel: int, stride: int, padding: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, 64, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
