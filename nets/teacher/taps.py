"""The taps: what is read of a network, how it is called, reduced, and hooked.

A tapped stage is a module by name, and what it returns is taken as a map (B, C, H, W), whatever its
own layout (`nets.networks.layout`), before any operation behind it that works in place
(`changed_in_place` finds these). The teacher's maps are reduced inside the forward pass, so that
none outlives its stage; the student's are handed over as they are, because its connectors need
them. Imports no torch, so that names can be looked up without loading it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from teach_once.nets.networks.layout import TapError, as_map, layout_of
from teach_once.nets.networks.names import default_stages

if TYPE_CHECKING:
    from torch import Tensor, nn

    from teach_once.configs.schema import TapsConfig, TeacherConfig

Kind = Literal["logits", "correct", "stage", "attention", "hint", "embedding"]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Tap:
    """One named output of the teacher; stage: "stageN", of the kinds that are read at a stage.

    kind       name       value of one record
    logits     logits     (K,)
    correct    correct    (), whether the first class is the label
    stage      stageN     (C_N,), channel means
    attention     attentionN    (H_N * W_N,), an attention map
    hint       hint       (C_N, H_N, W_N), the map itself; a cache has one, whose name has no number
    embedding  embedding  (D,), what enters the classifier
    """

    kind: Kind
    stage: str | None = None

    @property
    def name(self) -> str:
        return f"{self.kind}{self.number}" if self.kind in ("stage", "attention") else self.kind

    @property
    def number(self) -> int:
        """The number of its stage, from 1; 0 if it has none."""
        return int(self.stage.removeprefix("stage")) if self.stage else 0

    @staticmethod
    def parse(name: str, stage: str | None = None) -> Tap:
        """The tap of that name; stage: of a hint, whose name does not say it. Raises TapError."""
        if numbered := re.fullmatch("(stage|attention)([1-9][0-9]*)", name):
            return Tap("stage" if numbered[1] == "stage" else "attention", f"stage{numbered[2]}")
        match name:
            case "logits" | "correct" | "embedding":
                return Tap(name)
            case "hint":
                return Tap(name, stage)
        raise TapError(
            f"there is no tap {name!r}, but logits, correct, stageN, attentionN, hint and embedding"
        )

    def reduce(self, features: Tensor) -> Tensor:
        """The map of its stage (B, C, H, W), of any float dtype -> its values (B, ...) float32."""
        match self.kind:
            case "stage":
                return channel_means(features)
            case "attention":
                return spatial_attention(features)
            case "hint":
                return own_copy(features)
        raise AssertionError(f"{self.name} is not read at a stage")


class _StoredTap(Protocol):
    @property
    def stage(self) -> str | None: ...


def taps_asked(config: TapsConfig, stages: Iterable[str]) -> list[Tap]:
    """The taps that a teacher's file asks for, of a network with these stages.

    Raises TapError where the hint's stage is not one of them.
    """
    stages = list(stages)
    hint = config.hint
    if hint is not None and hint.stage not in stages:
        raise TapError(f"taps.hint.stage: {hint.stage} is not one of {', '.join(stages)}")
    return [
        *([Tap("logits")] if config.logits else []),
        *(Tap("stage", stage) for stage in stages if config.channel_means),
        *([Tap("correct")] if config.logits else []),
        *(Tap("attention", stage) for stage in stages if config.attention),
        *([Tap("hint", hint.stage)] if hint else []),
        *([Tap("embedding")] if config.embedding else []),
    ]


def taps_stored(specs: Mapping[str, _StoredTap]) -> list[Tap]:
    """The taps of a cache, whose specs say of the hint which stage's it is. Raises TapError."""
    return [Tap.parse(name, spec.stage) for name, spec in specs.items()]


def in_order(names: Iterable[str], kind: Kind) -> list[str]:
    """Those of the names that are taps of one kind, by the number of their stage."""
    taps = (Tap.parse(name) for name in names)
    return [t.name for t in sorted((t for t in taps if t.kind == kind), key=lambda t: t.number)]


def stage_modules(
    arch: str, stages: Sequence[str] | None = None, *, key: str = "taps.stages"
) -> dict[str, str]:
    """{"stage1": module name, ...}: `stages` if given, else the architecture's own.

    key: where the config names them, for the TapError where there are none.
    """
    modules = default_stages(arch) if stages is None else stages
    if not modules:
        raise TapError(f"arch {arch!r} has no default stages: name its modules under {key}")
    return _numbered(modules)


def teacher_stages(config: TeacherConfig) -> dict[str, str]:
    """The stages of a teacher, {"stage1": module name, ...}.

    {} where its architecture has none by default, and no tap is read at a stage. Raises TapError.
    """
    arch, taps = config.teacher.arch, config.taps
    if taps.reads_stages or taps.stages:
        return stage_modules(arch, taps.stages)
    return _numbered(default_stages(arch))


def _numbered(modules: Sequence[str]) -> dict[str, str]:
    return {f"stage{number}": module for number, module in enumerate(modules, start=1)}


def channel_means(features: Tensor) -> Tensor:
    """(B, C, H, W) of any float dtype -> (B, C) float32: the spatial mean."""
    means: Tensor = features.float().mean(dim=(2, 3))
    return means


def spatial_attention(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W) float32: the mean over channels of the squares, of length one.

    Source: Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", in the form of
    their code. A map of zeros stays zeros.
    """
    attention = features.float().square().mean(dim=1).flatten(1)
    length: Tensor = attention.norm(dim=1, keepdim=True)
    return attention / length.clamp(min=1e-12)


def own_copy(features: Tensor) -> Tensor:
    """The same in float32 and in its own memory, as operations behind a stage may work in place."""
    import torch

    return features.to(torch.float32, copy=True)


def as_is(stage: str, features: Tensor) -> Tensor:
    return features


class _OfStages(dict[str, Value]):
    """Values by stage. Some networks have modules that no forward pass calls."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        super().__init__()
        self._modules = modules

    def __missing__(self, stage: str) -> Value:
        raise TapError(
            f"the network does not call its module {self._modules[stage]!r}, so that {stage} cannot"
            f" be tapped"
        )


@contextmanager
def read_stages(
    network: nn.Module,
    stages: Mapping[str, str],
    reduce: Callable[[str, Tensor], Value],
    image_size: tuple[int, int] = (1, 1),
) -> Iterator[dict[str, Value]]:
    """While open, each forward pass fills the yielded dict: stage -> reduce(stage, map).

    The map is (B, C, H, W), whatever the layout of the module's output. image_size: (H, W) of the
    images; only their proportions matter. The hooks go when the context closes, also on an error.
    Raises TapError for an unknown module, in a pass for an output that is not a map, and where the
    dict is asked for a stage whose module the network did not call.
    """
    layout = layout_of(network)
    modules = dict(network.named_modules())
    missing = [module for module in stages.values() if module not in modules]
    if missing:
        top = ", ".join(name for name, _ in network.named_children())
        raise TapError(f"the network has no module {missing[0]!r} to tap; its top modules: {top}")
    values: dict[str, Value] = _OfStages(stages)

    def hook_for(stage: str, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            values[stage] = reduce(stage, as_map(name, output, layout, image_size))

        return keep

    handles = [modules[m].register_forward_hook(hook_for(stage, m)) for stage, m in stages.items()]
    try:
        yield values
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

    from teach_once.nets.teacher.draws import seeded

    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    size = images.shape[2], images.shape[3]
    with seeded(0), read_stages(network, stages, _with_version, size) as versioned:
        functional_call(network, buffers, (images,))
    seen = {stage: versioned[stage] for stage in stages}
    maps = {stage: features for stage, (features, _) in seen.items()}
    return maps, {stage for stage, (now, version) in seen.items() if now._version != version}


def _with_version(stage: str, features: Tensor) -> tuple[Tensor, int]:
    """A map and how often it has been written to, which torch counts."""
    return features, features._version
