"""The teacher network with its taps and precision, as used by both stages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teach_once.configs.schema import TeacherNet
from teach_once.nets.networks.archs import ArchError, timm_model
from teach_once.nets.networks.classifier import classifiers_of, embedding_read, read_embedding
from teach_once.nets.networks.layout import TapError
from teach_once.nets.networks.precision import autocast
from teach_once.nets.networks.zoo import build_net
from teach_once.nets.teacher.taps import Tap, read_stages
from teach_once.nets.weights.files import load_weights
from teach_once.nets.weights.source import fetched_weights


@dataclass(frozen=True)
class Teacher:
    """A network in evaluation mode with its taps.

    stages: tapped modules, {"stage1": module, ...}. classifiers: modules whose input is the
    embedding; () if the embedding is not requested.
    """

    network: nn.Module
    stages: Mapping[str, str]
    precision: str
    device: torch.device
    classifiers: tuple[str, ...] = ()

    @torch.inference_mode()
    def outputs(
        self, images: Tensor, labels: Tensor, taps: Collection[Tap] | None = None
    ) -> dict[str, Tensor]:
        """Return the taps of a batch by name, on the batch's device.

        images: (B, C, H, W) float32, normalized. labels: (B,) int64. taps: default: the taps that
        every cache contains. Values are (B, ...) float32 with the shapes in `Tap`; `correct` is
        uint8, computed from the float32 logits.
        """
        taps = self._default_taps() if taps is None else taps
        at_stage = {s: [tap for tap in taps if tap.stage == s] for s in self.stages}
        stages = {stage: module for stage, module in self.stages.items() if at_stage[stage]}

        def reduce(stage: str, features: Tensor) -> dict[str, Tensor]:
            return {tap.name: tap.reduce(features) for tap in at_stage[stage]}

        size = images.shape[2], images.shape[3]
        values: dict[str, Tensor] = {}
        with (
            autocast(self.precision, self.device),
            read_stages(self.network, stages, reduce, size) as by_stage,
            read_embedding(self.network, self.classifiers, values),
        ):
            logits = self.network(images).float()
        if self.classifiers:
            embedding_read(values, self.classifiers)
        values |= {"logits": logits, **{n: each.float() for n, each in values.items()}}
        for stage in stages:
            values |= by_stage[stage]
        if any(tap.kind == "correct" for tap in taps):
            values["correct"] = (logits.argmax(dim=1) == labels).to(torch.uint8)
        return {tap.name: values[tap.name] for tap in taps}

    def tap_shapes(
        self, image_shape: tuple[int, int, int], taps: Collection[Tap]
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tap of one record.

        It is found by a forward pass over a blank image of shape (H, W, C).
        """
        height, width, channels = image_shape
        blank = torch.zeros(1, channels, height, width, device=self.device)
        label = torch.zeros(1, dtype=torch.int64, device=self.device)
        values = self.outputs(blank, label, taps)
        return {name: tuple(value.shape[1:]) for name, value in values.items()}

    def _default_taps(self) -> list[Tap]:
        return [Tap("logits"), *(Tap("stage", stage) for stage in self.stages), Tap("correct")]


def fresh_teacher(
    config: TeacherNet,
    stages: Mapping[str, str],
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    has_embedding: bool = False,
    device: torch.device | None = None,
) -> Teacher:
    """Build the teacher with fresh weights on the CPU.

    num_classes: 0 if its logits are not needed. has_embedding: True if its embedding is needed.
    image_shape: (H, W, C). device: the device it will be moved to; None: the CPU.

    Raises ArchError if the network cannot be built and TapError if it has no embedding.
    """
    is_timms = bool(timm_model(config.arch))
    classes = num_classes if is_timms else num_classes or 1  # the classifier is not used
    network = build_net(config, num_classes=classes, image_shape=image_shape).eval()
    if config.bn == "recalibrated" and not _batch_norms(network):
        raise ArchError(
            f"teacher.bn is recalibrated, but {config.arch} has no batch norm",
            fix="set teacher.bn=eval",
        )
    classifiers = classifiers_of(network, image_shape) if has_embedding else ()
    return Teacher(network, stages, config.precision, device or torch.device("cpu"), classifiers)


def load_teacher_network(
    config: TeacherNet,
    stages: Mapping[str, str],
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    device: torch.device,
    calibration: Iterable[Tensor],
    has_embedding: bool = False,
) -> Teacher:
    """Build the teacher, load its weights and freeze it.

    num_classes: 0 if its logits are not needed; the weights may then have any classifier or none.
    image_shape: (H, W, C). calibration: batches (B, C, H, W) on the device, read only with
    `bn: recalibrated`.

    Raises ArchError if the network or its weights cannot be loaded and TapError if it has no
    embedding.
    """
    teacher = fresh_teacher(
        config,
        stages,
        num_classes=num_classes,
        image_shape=image_shape,
        has_embedding=has_embedding,
        device=device,
    )
    network = teacher.network
    load_weights(
        network,
        fetched_weights(config.weights),
        convert=_conversion(config.arch, num_classes, image_shape),
        without=() if num_classes else _classifiers_if_any(network, image_shape),
    )
    network = network.eval().requires_grad_(False)
    network = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.bn == "recalibrated":
        with autocast(config.precision, device):
            recalibrate(network, calibration)
    return dataclasses.replace(teacher, network=network)


def _conversion(
    arch: str, num_classes: int, image_shape: tuple[int, int, int]
) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """Return timm's conversion of published weights for a timm model; None for other networks."""
    if not (model := timm_model(arch)):
        return None
    from teach_once.nets.weights.timm_weights import converted

    size = image_shape[0], image_shape[1]
    return functools.partial(converted, model, num_classes=num_classes, image_size=size)


def _classifiers_if_any(network: nn.Module, image_shape: tuple[int, int, int]) -> tuple[str, ...]:
    try:
        return classifiers_of(network, image_shape)
    except TapError:
        return ()


def _batch_norms(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def use_batch_statistics(network: nn.Module, arch: str) -> None:
    """Make every batch norm use batch statistics; the running statistics do not change.

    The original implementation of Channel Distillation runs its teacher this way. Raises ArchError
    if the network has no batch norm.
    """
    if not (norms := _batch_norms(network)):
        raise ArchError(f"--live-bn: {arch} has no batch norm", fix="use --live-teacher")
    for norm in norms:
        norm.train()
        norm.momentum = 0.0


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of every batch norm by their mean over `batches` (B, ...).

    Batches are weighted by their size. All other modules stay in evaluation mode, as does the whole
    network afterwards.
    """
    norms = _batch_norms(network)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    num_samples = 0
    for inputs in batches:
        num_samples += len(inputs)
        for norm in norms:
            norm.momentum = len(inputs) / num_samples  # weight of the newest batch in the mean
        network(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
