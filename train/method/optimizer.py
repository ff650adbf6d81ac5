"""The optimizer with its parameter groups, the loss scaler of float16, and weight averaging.

All three are torch's. `train.engine.step` uses them.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from teach_once.configs.schema import AdamW, Training

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


class _WithoutDynamo(torch.optim.Optimizer):
    """An optimizer whose methods do not import torch's compiler.

    torch excludes each method of an optimizer from torch.compile with a decorator that imports
    torch._dynamo on the first call. This costs every program two seconds, although the compiler
    never sees the optimizer here: `training.compile` compiles only the network. This class has the
    same methods without their decorators.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class _SGD(_WithoutDynamo, torch.optim.SGD):
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class _AdamW(_WithoutDynamo, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def make_optimizer(
    modules: Sequence[nn.Module], training: Training, started: Collection[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Build the optimizer of all trainable parameters, on their device, with one kernel per group.

    started: pretrained parameters, whose learning rate is scaled.
    """
    groups = parameter_groups(modules, training, started)
    kind = training.optimizer
    if isinstance(kind, AdamW):
        return _AdamW(groups, lr=training.learning_rate, betas=kind.betas, eps=kind.eps, fused=True)
    optimizer = _SGD(
        groups,
        lr=training.learning_rate,
        momentum=training.momentum,
        nesterov=training.nesterov,
        fused=True,
    )
    # The fused step requires a momentum buffer for all parameters or none, but a parameter that no
    # loss reaches yet has none. Starting from zeros gives the same first step. (AdamW creates its
    # state per parameter, with the first gradient.)
    if training.momentum:
        for parameter in (each for group in optimizer.param_groups for each in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def parameter_groups(
    modules: Sequence[nn.Module], training: Training, started: Collection[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Group the trainable parameters of all modules by weight decay and learning rate factor."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    known = set(started)
    for is_decayed, parameter in _trainable(modules):
        decays = is_decayed or training.weight_decay_norm_bias
        factor = training.pretrained_lr_factor if parameter in known else 1.0
        key = (training.weight_decay if decays else 0.0, factor)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": each, "weight_decay": decay, "rate_factor": factor}
        for (decay, factor), each in groups.items()
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step, multiplied by each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)


def _trainable(modules: Sequence[nn.Module]) -> Iterator[tuple[bool, nn.Parameter]]:
    """Yield (True for a weight that decays, parameter) for each trainable parameter.

    Excluded from decay: norms, biases, other one-dimensional parameters, and parameters that a timm
    network lists itself, such as position embeddings.
    """
    seen: set[nn.Parameter] = set()
    for module in modules:
        named: set[str] = getattr(module, "no_weight_decay", set)()
        for path, owner in module.named_modules():
            for name, parameter in owner.named_parameters(path, recurse=False):
                if parameter.requires_grad and parameter not in seen:
                    seen.add(parameter)
                    is_weight = parameter.ndim > 1 and not isinstance(owner, _NORMS)
                    yield is_weight and name not in named, parameter


def loss_scaler(training: Training, device: torch.device) -> torch.amp.GradScaler:
    """Build the scaler of float16 losses, whose smallest gradients would be zero; else a no-op.

    If the scaled gradients overflow, the step is skipped and the scale is halved, on the device.
    """
    return torch.amp.GradScaler(device.type, enabled=training.precision == "float16")


class WeightAverage(AveragedModel):
    """The exponential moving average of a network's weights and of its saved real-valued buffers.

    Integer and boolean tensors (indices, counters, masks) and unsaved buffers are copied from the
    network, because a mean of indices is another index.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        super().__init__(network, multi_avg_fn=self._average, use_buffers=True)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Update the average; the first call copies all tensors.

        torch's method copies its counter to the device, which synchronizes in each step.
        """
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        if not self.n_averaged:
            for averaged, current in pairs:
                averaged.copy_(current)
        else:
            for dtype in dict.fromkeys(averaged.dtype for averaged, _ in pairs):
                of_type = [pair for pair in pairs if pair[0].dtype == dtype]
                if _is_real(of_type[0][0]):
                    self._average(*map(list, zip(*of_type, strict=True)), None)
        for averaged, current in zip(_copied(self.module), _copied(model), strict=True):
            averaged.copy_(current)
        self.n_averaged += 1


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _copied(network: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of a network that are copied instead of averaged."""
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            if not _is_real(parameter):
                yield parameter
        for name, buffer in module.named_buffers(recurse=False):
            if not _is_real(buffer) or name in module._non_persistent_buffers_set:
                yield buffer


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def weight_average(network: nn.Module, training: Training) -> WeightAverage | None:
    """Build the `WeightAverage` of a network in training, or return None without `training.ema`.

    It starts as a copy of the weights after the first step. Its counter stays in host memory,
    because each step reads it.
    """
    if training.ema is None:
        return None
    return WeightAverage(network, training.ema.decay).eval().requires_grad_(False)
