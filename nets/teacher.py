"""The teacher as both stages run it: the same network, taps and precision."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from configs.schema import TeacherNet
from nets.precision import autocast
from nets.taps import Tap, read_stages
from nets.weights import load_weights
from nets.weights_file import fetched_weights
from nets.zoo import build_net


@dataclass(frozen=True)
class Teacher:
    """A network in evaluation mode; stages: its tapped modules, {"stage1": module, ...}."""

    network: nn.Module
    stages: Mapping[str, str]
    precision: str
    device: torch.device

    @torch.inference_mode()
    def outputs(
        self, images: Tensor, labels: Tensor, taps: Collection[Tap] | None = None
    ) -> dict[str, Tensor]:
        """The taps of a batch by name, on its device; default: those that every cache holds.

        images: (B, C, H, W) float32, normalised. labels: (B,) int64. Values are (B, ...) as `Tap`
        says, float32; `correct` is uint8, decided on the float32 logits.
        """
        taps = self._default_taps() if taps is None else taps
        at_stage = {s: [tap for tap in taps if tap.stage == s] for s in self.stages}
        stages = {stage: module for stage, module in self.stages.items() if at_stage[stage]}

        def reduce(stage: str, features: Tensor) -> dict[str, Tensor]:
            return {tap.name: tap.reduce(features) for tap in at_stage[stage]}

        with (
            autocast(self.precision, self.device),
            read_stages(
                self.network, stages, reduce, (images.shape[2], images.shape[3])
            ) as by_stage,
        ):
            logits = self.network(images).float()
        values = {"logits": logits, "correct": (logits.argmax(dim=1) == labels).to(torch.uint8)}
        for of_stage in by_stage.values():
            values |= of_stage
        return {tap.name: values[tap.name] for tap in taps}

    def tap_shapes(
        self, image_shape: tuple[int, int, int], taps: Collection[Tap]
    ) -> dict[str, tuple[int, ...]]:
        """Shape of each tap of one record, found by one pass over a blank (H, W, C) image."""
        height, width, channels = image_shape
        blank = torch.zeros(1, channels, height, width, device=self.device)
        label = torch.zeros(1, dtype=torch.int64, device=self.device)
        values = self.outputs(blank, label, taps)
        return {name: tuple(value.shape[1:]) for name, value in values.items()}

    def _default_taps(self) -> list[Tap]:
        return [Tap("logits"), *(Tap("stage", stage) for stage in self.stages), Tap("correct")]


def load_teacher_network(
    config: TeacherNet,
    stages: Mapping[str, str],
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    device: torch.device,
    calibration: Iterable[Tensor],
) -> Teacher:
    """Build the teacher, load its weights and freeze it. Raises ArchError.

    image_shape: (H, W, C). calibration: batches (B, C, H, W) on the device; read only with
    `bn: recalibrated`.
    """
    network = build_net(config, num_classes=num_classes, image_shape=image_shape)
    load_weights(network, fetched_weights(config.weights))
    network = network.eval().requires_grad_(False)
    network = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.bn == "recalibrated":
        with autocast(config.precision, device):
            recalibrate(network, calibration)
    return Teacher(network, stages, config.precision, device)


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of every batch norm by their mean over `batches` (B, ...).

    A batch is weighted by its size. All other modules stay in evaluation mode, and so does the
    whole network afterwards.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    num_samples = 0
    for inputs in batches:
        num_samples += len(inputs)
        for norm in norms:
            norm.momentum = len(inputs) / num_samples  # the newest batch's share of the mean
        network(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
