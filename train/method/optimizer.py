"""What changes the weights: the optimizer with its groups of parameters, the scale of float16
losses, and the moving average of the weights.

All three are torch's own. `train.engine.step` shows how they act in a step.
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

    torch excludes each method of an optimizer from torch.compile by a decorator that imports
    torch._dynamo when the method is first called: two seconds of every program, for a compiler that
    never sees the optimizer here, as `training.compile` compiles the network alone. These are the
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
    # A parameter that no loss reaches yet would have no buffer while the others have theirs, which
    # the fused step refuses. Starting from zeros gives the same first step. (AdamW's state is each
    # parameter's own, and begins with its first gradient.)
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
    """Set the learning rate of the next step, times the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)


def _trainable(modules: Sequence[nn.Module]) -> Iterator[tuple[bool, nn.Parameter]]:
    """Each trainable parameter once, and whether it is a weight in the narrow sense.

    Not of a norm, no bias, nor anything else of one dimension; and not what a network of timm's
    names itself, such as the embedding of positions.
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
    """Build the scaler of float16 losses, whose smallest gradients would be zero; else one that
    does nothing.

    A step whose scaled gradients overflow is skipped and the scale halved, on the device.
    """
    return torch.amp.GradScaler(device.type, enabled=training.precision == "float16")


class WeightAverage(AveragedModel):
    """The exponential moving average of a network's weights and of its saved, real buffers.

    Integer and boolean tensors (indices, counters, masks) and buffers that are not saved are copied
    from the network: a mean of indices is another index.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        super().__init__(network, multi_avg_fn=self._average, use_buffers=True)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Update the average; the first time, copy all tensors.

        torch's own method copies its counter to the device, and so waits for the device in each
        step.
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
    """Yield the tensors of a network of which no mean is taken."""
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
    """Build the moving average of a network that is trained, as `WeightAverage`.

    It starts as a copy of the weights after the first step. Its counter stays in host memory, since
    each step reads it.
    """
    if training.ema is None:
        return None
    return WeightAverage(network, training.ema.decay).eval().requires_grad_(False)
