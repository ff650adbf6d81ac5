"""Where a network's taps are, as data, and the hooks that read them.

A stage is a module by name. The teacher's stages are reduced to channel means inside the forward
pass, so no feature map outlives its stage; the student's are handed over as maps, because its
connectors need them. Both are what the module returned, before any operation behind it that works
in place (`changed_in_place` finds these). Imports no torch, so that names can be looked up without
loading it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from nets.archs import DEFAULT_STAGES
from runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


Value = TypeVar("Value")


class TapError(UserError, ValueError):
    """A stage that the network does not have."""


def stage_modules(
    arch: str, stages: Sequence[str] | None = None, *, key: str = "taps.stages"
) -> dict[str, str]:
    """{"stage1": module name, ...}: `stages` if given, else the architecture's own.

    key: where the config names them, for the TapError where there are none.
    """
    modules = DEFAULT_STAGES.get(arch) if stages is None else stages
    if not modules:
        raise TapError(f"arch {arch!r} has no default stages: name its modules under {key}")
    return {f"stage{number}": module for number, module in enumerate(modules, start=1)}


def channel_means(features: Tensor) -> Tensor:
    """(B, C, H, W) of any float dtype -> (B, C) float32: the spatial mean."""
    return features.float().mean(dim=(2, 3))


def spatial_energy(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W) float32: the mean over channels of the squares, of length one.

    Source: Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", in the form of
    their code. A map of zeros stays zeros.
    """
    energy = features.float().square().mean(dim=1).flatten(1)
    return energy / energy.norm(dim=1, keepdim=True).clamp(min=1e-12)


def as_is(stage: str, features: Tensor) -> Tensor:
    return features


@contextmanager
def read_stages(
    network: nn.Module, stages: Mapping[str, str], reduce: Callable[[str, Tensor], Value]
) -> Iterator[dict[str, Value]]:
    """While open, each forward pass fills the yielded dict: stage -> reduce(stage, output).

    The hooks go when the context closes, also on an error. Raises TapError for an unknown module.
    """
    modules = dict(network.named_modules())
    missing = [module for module in stages.values() if module not in modules]
    if missing:
        top = ", ".join(name for name, _ in network.named_children())
        raise TapError(f"the network has no module {missing[0]!r} to tap; its top modules: {top}")
    found: dict[str, Value] = {}

    def hook_for(stage: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            found[stage] = reduce(stage, output)

        return keep

    handles = [modules[m].register_forward_hook(hook_for(stage)) for stage, m in stages.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def changed_in_place(
    network: nn.Module, stages: Mapping[str, str], images: Tensor
) -> tuple[dict[str, Tensor], set[str]]:
    """Show a batch (B, C, H, W) in the mode that the network is in, and leave it as it was.

    Returns the maps of `stages` as they are after the pass, and which of them the operations behind
    their modules changed. Raises what the network raises.
    """
    from torch.func import functional_call

    from nets.draws import seeded

    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with seeded(0), read_stages(network, stages, _with_version) as found:
        functional_call(network, buffers, (images,))
    maps = {stage: features for stage, (features, _) in found.items()}
    return maps, {stage for stage, (now, version) in found.items() if now._version != version}


def _with_version(stage: str, features: Tensor) -> tuple[Tensor, int]:
    """A map and how often it has been written to, which torch counts."""
    return features, features._version
