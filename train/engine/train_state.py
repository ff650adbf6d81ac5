"""A network in training with its connectors, its optimizer, and the maps that losses read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from teach_once.configs.schema import Training
from teach_once.nets.networks.classifier import read_embedding
from teach_once.nets.networks.precision import autocast
from teach_once.nets.teacher.taps import changed_in_place, read_stages
from teach_once.nets.weights.start import Start
from teach_once.train.engine.ranks import ALONE, Ranks
from teach_once.train.engine.slices import Slices
from teach_once.train.errors import TrainError
from teach_once.train.method.connectors import Connectors
from teach_once.train.method.optimizer import loss_scaler, make_optimizer, weight_average
from teach_once.views.pixels.batches import Pixels


@dataclass
class TrainState:
    """Everything that changes during a run.

    stages: "stageN" -> module whose map losses read. classifiers: modules whose input a loss reads.
    maps: of the last forward pass while `capture_maps` is open, "stageN" -> (B, C, H, W) and
    "embedding" -> (B, D).
    """

    network: nn.Module
    connectors: Connectors | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None  # average of the network's weights
    forward: Callable[[Tensor], Tensor]  # the network's forward pass, perhaps compiled
    training: Training
    device: torch.device
    stages: Mapping[str, str]
    freeze_idle_classifier: bool
    start: Start | None = None  # pretrained weights, if any
    maps: dict[str, Tensor] = field(default_factory=dict)
    classifiers: tuple[str, ...] = ()
    mean_squares: Sequence[float] = ()  # mean squares of the teacher's channel means, by stage
    ranks: Ranks = ALONE  # the processes that train this network together
    distributed: DistributedDataParallel | None = None  # with several ranks

    @property
    def slices(self) -> Slices:
        return Slices(self.ranks, self.training.batch_size, self.training.gradient_accumulation)

    @property
    def precision(self) -> str:
        return self.training.precision

    def train(self) -> None:
        """Put the network into training mode, except its frozen modules."""
        self.network.train()
        for module in self.start.frozen if self.start else ():
            module.training = False

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters of the optimizer."""
        return [each for group in self.optimizer.param_groups for each in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "connectors": self.connectors.state_dict() if self.connectors else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy the tensors of a matching state (see `train.recording.checkpoint`).

        The optimizer keeps the config's settings.
        """
        self.network.load_state_dict(state["network"])
        if self.connectors:
            self.connectors.load_state_dict(state["connectors"])
        self.optimizer.load_state_dict(
            {
                "state": self._like_parameters(state["optimizer"]["state"]),
                "param_groups": self.optimizer.state_dict()["param_groups"],
            }
        )
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.load_state_dict(state["average"])

    def _like_parameters(self, state: Mapping[int, Mapping[str, Tensor]]) -> dict[int, Any]:
        """Copy the optimizer's tensors into the memory layout of their parameters."""
        parameters = self.parameters()
        return {
            index: {
                name: torch.empty_like(parameters[index], dtype=value.dtype).copy_(value)
                if value.shape == parameters[index].shape
                else value.clone()
                for name, value in of_one.items()
            }
            for index, of_one in state.items()
        }


def build_train_state(
    network: nn.Module,
    connectors: Connectors | None,
    training: Training,
    device: torch.device,
    *,
    stages: Mapping[str, str] | None = None,
    classifiers: tuple[str, ...] = (),
    freeze_idle_classifier: bool = True,
    start: Start | None = None,
    mean_squares: Sequence[float] = (),
    ranks: Ranks = ALONE,
) -> TrainState:
    """Move the modules to the device and build their optimizer, loss scaler and weight average.

    stages, classifiers, mean_squares: as in `TrainState`; without stages and classifiers no loss
    reads maps or the embedding. start: pretrained weights, if any. ranks: with several ranks, the
    caller passes the result to `train.engine.distributed.wrap_ddp`.
    """
    modules = [_on_device(each, device) for each in (network, connectors) if each is not None]
    return TrainState(
        network,
        connectors,
        make_optimizer(modules, training, start.parameters if start else ()),
        loss_scaler(training, device),
        weight_average(network, training),
        _compiled(network) if training.compile else network,
        training,
        device,
        stages or {},
        freeze_idle_classifier,
        start,
        classifiers=classifiers,
        mean_squares=mean_squares,
        ranks=ranks,
    )


def _on_device(network: nn.Module, device: torch.device) -> nn.Module:
    moved: nn.Module = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def _compiled(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compile the network, without reusing code of networks compiled earlier in this process.

    Networks of one class share compiled code, which has no guards for hooks: the code of a network
    without taps would also run for a network with taps, and read none.
    """
    torch.compiler.reset()
    compiled: Callable[[Tensor], Tensor] = torch.compile(network)
    return compiled


@contextmanager
def capture_maps(train_state: TrainState, pixels: Pixels, batch_size: int) -> Iterator[None]:
    """Let each forward pass store the maps that losses read in `train_state.maps`.

    The maps are the outputs of their modules, copied if a later operation modifies them in place.
    Raises TrainError if the last batch of an epoch is a single sample, which batch norm rejects.
    """
    changed = _try_batches(train_state, pixels, batch_size)

    def own(stage: str, features: Tensor) -> Tensor:
        return features.clone() if stage in changed else features

    size = pixels.shape[0], pixels.shape[1]
    network = train_state.network
    with (
        read_stages(network, train_state.stages, own, size) as train_state.maps,
        read_embedding(network, train_state.classifiers, train_state.maps),
    ):
        yield


def _try_batches(train_state: TrainState, pixels: Pixels, batch_size: int) -> set[str]:
    """Find the stages whose maps are modified in place, using blank images."""
    is_alone = not _all_have_company(
        len(pixels), batch_size, train_state.training.gradient_accumulation
    )
    if not train_state.stages and not is_alone:
        return set()
    try:
        return _show_blank(train_state, pixels.shape, 1 if is_alone else 2)
    except ValueError as error:  # raised by batch norm
        if not is_alone:
            raise
        raise _lone_sample(
            len(pixels), batch_size, train_state.training.gradient_accumulation, error
        ) from None


def _all_have_company(num_samples: int, batch_size: int, num_parts: int) -> bool:
    """Return True if every part of every batch has at least two samples."""
    sizes = (min(batch_size, num_samples), num_samples % batch_size)
    return all(size // num_parts > 1 for size in sizes if size)


def _show_blank(train_state: TrainState, shape: tuple[int, int, int], num_images: int) -> set[str]:
    height, width, channels = shape
    images = torch.zeros(num_images, channels, height, width, device=train_state.device)
    with autocast(train_state.precision, train_state.device):
        maps, changed = changed_in_place(
            train_state.network, train_state.stages, images.to(memory_format=torch.channels_last)
        )
        if train_state.stages and (connectors := train_state.connectors) is not None:
            with _buffers_kept(connectors):  # their batch norm updates its statistics
                connectors(maps)
                connectors.hint(maps)
                connectors.parts_of(maps)
    return changed


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Restore the module's buffers when the context exits."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    yield
    for buffer, value in before:
        buffer.copy_(value)


def _lone_sample(
    num_samples: int, batch_size: int, num_parts: int, error: ValueError
) -> TrainError:
    larger = range(batch_size + 1, num_samples + 1)
    better = next((n for n in larger if _all_have_company(num_samples, n, num_parts)), None)
    parts = f" and training.gradient_accumulation {num_parts}" if num_parts > 1 else ""
    last = "some part of the last batch" if num_parts > 1 else "the last batch of an epoch"
    return TrainError(
        f"training.batch_size is {batch_size}{parts}, so {last} is a single sample of "
        f"{num_samples:,}, which this network cannot be trained on: {error}",
        fix=f"set training.batch_size={better}" if better else "use more images",
    )
