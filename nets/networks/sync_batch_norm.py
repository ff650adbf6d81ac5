"""Batch norm over the batch of all processes, on GPUs and CPUs.

Each process has a slice of a batch. In training mode, the mean and variance are computed over all
slices, weighted by slice size. Outputs, gradients and running statistics therefore equal, up to
rounding, those of one process with the whole batch. On GPUs the kernels of torch.nn.SyncBatchNorm
compute this. It rejects CPU tensors, which this module supports in addition. In evaluation mode
processes do not communicate.

Each layer exchanges 2 C numbers in the forward pass and 2 C in the backward pass.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as GpuSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from teach_once.nets.networks.archs import ArchError

_TIMM = "timm.layers.norm_act.BatchNormAct2d"  # batch norm, perhaps dropout, and an activation


def synchronized(network: nn.Module) -> nn.Module:
    """Make the network's batch norms use the batch of all processes; returns the same network.

    The modules keep their identity, parameters, buffers, hooks and names; only their class changes.
    With one process nothing changes. Raises ArchError for an unsupported kind of batch norm.

    In training mode, all processes must call the network the same number of times. Gradients of
    weights and biases are those of this process's slice; their sum over the processes is the
    gradient for the whole batch.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return network
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, _SYNCHRONIZED):
            if (kind := _synchronized_class(type(module))) is None:  # type: ignore[arg-type]
                raise _unknown(type(module), name)
            module.__class__ = kind
    return network


@functools.cache
def _synchronized_class(kind: type[_BatchNorm]) -> type[_BatchNorm] | None:
    """Return the synchronized version of a class; None if the class overrides the forward pass."""
    is_timms = f"{kind.__module__}.{kind.__qualname__}" == _TIMM
    if not is_timms and kind.forward is not _BatchNorm.forward:
        return None
    base = _SynchronizedAct if is_timms else _Synchronized
    # Exclude the communication between processes from torch.compile. A decorator would import
    # torch._dynamo, which takes two seconds, in runs of one process too.
    disabled = torch.compiler.disable(base._synchronized)  # type: ignore[no-untyped-call]
    members = {"_synchronized": disabled}
    return cast(type[_BatchNorm], type(f"Synchronized{kind.__name__}", (base, kind), members))


def _unknown(kind: type[_BatchNorm], name: str) -> ArchError:
    return ArchError(
        f"the network's {name or 'outermost module'} is a {kind.__qualname__}, a batch norm with "
        f"its own forward pass, which cannot be synchronized over several processes",
        fix="set training.batch_norm=local",
    )


class _Synchronized(_BatchNorm):
    """Mixin that synchronizes a batch norm; the original class is the second base class."""

    def forward(self, input: Tensor) -> Tensor:
        return self._synchronized(input) if self.training else super().forward(input)

    def _synchronized(self, input: Tensor) -> Tensor:
        """Normalize this process's slice (B, C, ...), which may have any B."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        factor = self._count_batch()
        running = (
            (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        )
        if input.is_cuda:
            return _on_gpu(input, self.weight, self.bias, *running, self.eps, factor)
        mean, var, count = _batch_statistics(input)
        if running[0] is not None and running[1] is not None:
            running[0].lerp_(mean.to(running[0].dtype), factor)
            running[1].lerp_((var * count / (count - 1)).to(running[1].dtype), factor)
        output: Tensor = _Normalize.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, mean, var, count, self.eps
        )
        return output

    def _count_batch(self) -> float:
        """Count a batch; returns its weight in the running statistics."""
        if not self.track_running_stats or self.num_batches_tracked is None:
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        if self.momentum is None:  # cumulative mean over all batches
            return 1.0 / self.num_batches_tracked.item()
        return self.momentum


class _SynchronizedAct(_Synchronized):
    """Mixin for timm's batch norms, which include dropout and the activation."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        output: Tensor = self.act(self.drop(self._synchronized(input)))  # type: ignore[operator]
        return output


_SYNCHRONIZED = (_Synchronized, nn.SyncBatchNorm)


def _on_gpu(input: Tensor, *arguments: Any) -> Tensor:
    output: Tensor = GpuSyncBatchNorm.apply(  # type: ignore[no-untyped-call]
        input, *arguments, dist.group.WORLD, dist.get_world_size()
    )
    return output


@torch.no_grad()
def _batch_statistics(slice_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (C,), biased variance (C,) and values per channel (1,) of the batch, in float64.

    Means and variances of the slices are merged (Chan, Golub and LeVeque 1979). Unlike sums of
    squares, this does not lose precision if a mean is large.
    """
    channels = slice_.shape[1]
    own = torch.zeros(2 * channels + 1, dtype=torch.float64)
    if slice_.numel():
        kept = torch.promote_types(slice_.dtype, torch.float32)
        unused = torch.zeros(channels, dtype=kept), torch.zeros(channels, dtype=kept)
        mean, var = torch.batch_norm_update_stats(slice_.detach(), *unused, 0.0)
        count = torch.tensor([slice_.numel() // channels])
        own = torch.cat([mean.double(), var.double(), count.double()])
    means, vars, counts = torch.split(_of_all(own), [channels, channels, 1], dim=1)
    count = counts.sum(dim=0)
    if count.item() < 2:
        raise ValueError("batch norm needs more than 1 value per channel in training mode")
    mean = (means * counts).sum(dim=0) / count
    var = ((vars + (means - mean).square()) * counts).sum(dim=0) / count
    return mean, var, count


def _of_all(own: Tensor) -> Tensor:
    """Gather (n,) from every rank into (ranks, n); in gloo this takes half as long as a sum."""
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    return torch.stack(gathered)


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, with mean and var over all slices of x.

    weight, bias: (C,), or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        ctx.save_for_backward(x, weight, mean.to(dtype), var.to(dtype), count)
        ctx.eps = eps
        if not x.numel():
            return torch.empty_like(x)
        return F.batch_norm(x, mean.to(dtype), var.to(dtype), weight, bias, False, 0.0, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        of_x, of_weight, of_bias = _gradients_of_constants(ctx, grad)
        if ctx.needs_input_grad[0]:
            # The gradient through mean and var, to which all slices contribute.
            of_slices = _of_all(torch.cat([of_weight, of_bias]).double())
            sums = of_slices.sum(dim=0).view(2, -1)
            scale = (var.double() + ctx.eps).rsqrt() / count
            if weight is not None:
                scale = scale * weight
            sums = (sums * scale).to(mean.dtype)
            if x.numel():
                of_x -= F.batch_norm(x, mean, var, sums[0], sums[1], False, 0.0, ctx.eps)
        needed = [
            each if is_needed else None
            for each, is_needed in zip(
                (of_x, of_weight, of_bias), ctx.needs_input_grad[:3], strict=True
            )
        ]
        return *needed, None, None, None, None


def _gradients_of_constants(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of x, weight and bias for this slice, with mean and var held constant.

    The gradient of the weight is sum(grad * normalized x); the gradient of the bias is sum(grad).
    The gradient of x needs both sums even without a weight and a bias.
    """
    x, weight, mean, var, _ = ctx.saved_tensors
    if not x.numel():
        return torch.empty_like(x), torch.zeros_like(mean), torch.zeros_like(mean)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
    )
    return found
