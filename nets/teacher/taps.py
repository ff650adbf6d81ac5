"""Taps: named outputs of a network, how they are hooked and reduced.

A tapped stage is the output of a named module, converted to a map (B, C, H, W) by
`nets.networks.layout`. It is read before later modules can modify it in place (`changed_in_place`
finds such modules). The teacher's maps are reduced inside the forward pass, so that memory holds
one map at a time. The student's maps are returned unchanged, because its connectors need them.
Does not import torch, so that names can be looked up quickly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from teach_once.nets.networks.layout import TapError, as_map, layout_of
from teach_once.nets.networks.names import default_stages, number_modules, stage_modules

if TYPE_CHECKING:
    from torch import Tensor, nn

    from teach_once.configs.schema import TapsConfig, TeacherConfig

Kind = Literal["logits", "correct", "stage", "attention", "hint", "embedding"]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Tap:
    """One named output of the teacher; stage: "stageN", for the kinds that are read at a stage.

    kind       name       value of one record
    logits     logits     (K,)
    correct    correct    (), 1 if the top class is the label
    stage      stageN     (C_N,), channel means
    attention     attentionN    (H_N * W_N,), an attention map
    hint       hint       (C_N, H_N, W_N), the map itself; a cache has one, so it has no number
    embedding  embedding  (D,), the classifier's input
    """

    kind: Kind
    stage: str | None = None

    @property
    def name(self) -> str:
        return f"{self.kind}{self.number}" if self.kind in ("stage", "attention") else self.kind

    @property
    def number(self) -> int:
        """Number of the tap's stage, from 1; 0 if it has no stage."""
        return int(self.stage.removeprefix("stage")) if self.stage else 0

    @staticmethod
    def parse(name: str, stage: str | None = None) -> Tap:
        """Return the tap called `name`; stage: the stage of a hint, which its name lacks.

        Raises TapError for an unknown name.
        """
        if numbered := re.fullmatch("(stage|attention)([1-9][0-9]*)", name):
            return Tap("stage" if numbered[1] == "stage" else "attention", f"stage{numbered[2]}")
        match name:
            case "logits" | "correct" | "embedding":
                return Tap(name)
            case "hint":
                return Tap(name, stage)
        raise TapError(
            f"unknown tap {name!r}; taps: logits, correct, stageN, attentionN, hint, embedding"
        )

    def reduce(self, features: Tensor) -> Tensor:
        """Reduce the map of its stage (B, C, H, W), of any float dtype, to (B, ...) float32."""
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


def taps_asked(config: TapsConfig, stages: Iterable[str], *, has_labels: bool = True) -> list[Tap]:
    """Return the taps that a teacher's config requests from a network with these stages.

    has_labels: without labels there is no tap `correct`. Raises TapError if the hint's stage is not
    one of them.
    """
    stages = list(stages)
    hint = config.hint
    if hint is not None and hint.stage not in stages:
        raise TapError(f"taps.hint.stage: {hint.stage} is not one of {', '.join(stages)}")
    return [
        *([Tap("logits")] if config.logits else []),
        *(Tap("stage", stage) for stage in stages if config.channel_means),
        *([Tap("correct")] if config.logits and has_labels else []),
        *(Tap("attention", stage) for stage in stages if config.attention),
        *([Tap("hint", hint.stage)] if hint else []),
        *([Tap("embedding")] if config.embedding else []),
    ]


def taps_stored(specs: Mapping[str, _StoredTap]) -> list[Tap]:
    """Return the taps of a cache from their specs, which contain the hint's stage.

    Raises TapError for an unknown name.
    """
    return [Tap.parse(name, spec.stage) for name, spec in specs.items()]


def in_order(names: Iterable[str], kind: Kind) -> list[str]:
    """Return the names that are taps of one kind, sorted by the number of their stage."""
    taps = (Tap.parse(name) for name in names)
    return [t.name for t in sorted((t for t in taps if t.kind == kind), key=lambda t: t.number)]


def teacher_stages(config: TeacherConfig) -> dict[str, str]:
    """Return the stages of a teacher, {"stage1": module name, ...}.

    Returns {} if its architecture has no default stages and no tap is read at a stage. Raises
    TapError if a tap needs a stage and there is none.
    """
    arch, taps = config.teacher.arch, config.taps
    if taps.reads_stages or taps.stages:
        return stage_modules(arch, taps.stages)
    return number_modules(default_stages(arch))


def channel_means(features: Tensor) -> Tensor:
    """Return the spatial mean (B, C) float32 of a map (B, C, H, W) of any float dtype."""
    means: Tensor = features.float().mean(dim=(2, 3))
    return means


def spatial_attention(features: Tensor) -> Tensor:
    """Return the attention map (B, H * W) float32 of a map (B, C, H, W).

    It is the mean over channels of the squares, L2-normalized per sample. A map of zeros stays
    zero. Source: Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", as in their
    code.
    """
    attention = features.float().square().mean(dim=1).flatten(1)
    length: Tensor = attention.norm(dim=1, keepdim=True)
    return attention / length.clamp(min=1e-12)


def own_copy(features: Tensor) -> Tensor:
    """Return a float32 copy, because modules after a stage may modify the map in place."""
    import torch

    return features.to(torch.float32, copy=True)


def as_is(stage: str, features: Tensor) -> Tensor:
    return features


class _OfStages(dict[str, Value]):
    """Values by stage; a stage whose module was not called raises TapError."""

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
    """Yield a dict that each forward pass fills: stage -> reduce(stage, map).

    The map is (B, C, H, W) for any layout of the module's output. image_size: (H, W) of the images;
    only the aspect ratio matters. Hooks are removed when the context exits.

    Raises TapError for an unknown module; during a forward pass, for an output that is not a map;
    and when the dict is read, for a stage whose module the network did not call.
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
    """Find the stages whose maps are modified in place by later modules.

    Runs a batch (B, C, H, W) through the network in its current mode and restores its state.
    Returns the maps of `stages` after the forward pass, and the stages whose maps were modified.
    Errors of the network are propagated.
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
    """Return a map with torch's count of writes to it."""
    return features, features._version
