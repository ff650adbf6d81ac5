"""From a teacher's config to what a pass needs: its data, identity, place and taps; no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.commands import teacher_command
from configs.load import load_teacher, refuse_missing_data
from configs.paths import no_weights
from configs.schema import TeacherConfig
from nets.archs import ArchError, check_arch
from nets.identity import teacher_identity
from nets.taps import TapError, stage_modules
from nets.weights_file import fetched_weights, known_sha256
from store.identity import Identity, cache_identity, knows_weights, with_weights
from store.layout import TapSpec
from store.reader import cache_folder
from views.datasets import Dataset, load_dataset
from views.identity import views_identity

_SCALES = {"logits": "row", "means": "block"}  # what uint8 codes are relative to


@dataclass(frozen=True)
class Setup:
    """One teacher on one dataset, and the folder of its cache."""

    config: TeacherConfig
    dataset: Dataset
    stages: dict[str, str]
    identity: Identity
    path: Path

    @property
    def tap_names(self) -> list[str]:
        """The taps that the config asks for."""
        energies = [stage.replace("stage", "energy") for stage in self.stages]
        taps = self.config.taps
        return [
            "logits",
            *self.stages,
            "correct",
            *(energies if taps.energy else []),
            *(["hint"] if taps.hint else []),
        ]

    @property
    def extra_outputs(self) -> list[str]:
        """The outputs to ask the teacher for besides those it always gives."""
        hint = self.config.taps.hint
        names = [name for name in self.tap_names if name.startswith("energy")]
        return [*names, f"hint:{hint.stage}"] if hint else names

    def tap_spec(self, name: str, shape: tuple[int, ...]) -> TapSpec:
        """How a tap of that name and shape is stored."""
        taps = self.config.taps
        if name == "correct":
            return TapSpec(shape, "uint8")
        if name == "hint":
            assert taps.hint is not None
            return TapSpec(shape, taps.hint.dtype, stage=taps.hint.stage)
        if name.startswith("energy"):
            return TapSpec(shape, str(taps.energy))
        kind = "logits" if name == "logits" else "means"
        dtype = getattr(taps, kind)
        return TapSpec(shape, dtype, scale=_SCALES[kind] if dtype == "uint8" else None)

    def is_held_by(self, taps: Mapping[str, TapSpec]) -> bool:
        """Whether these taps include all that the config asks for, stored as it asks."""
        return all(
            name in taps and taps[name] == self.tap_spec(name, taps[name].shape)
            for name in self.tap_names
        )


def prepare(name: str, overrides: Sequence[str], caches_dir: Path) -> Setup:
    """The setup of a pass; downloads weights that torchvision names.

    Raises ConfigError, DatasetError, TapError, ArchError (also where there are no weights).
    """
    return at_hand(described(name, overrides, caches_dir))


def described(name: str, overrides: Sequence[str], caches_dir: Path) -> Setup:
    """The same where the weights need not be at hand: the identity then knows them in part."""
    config = load_teacher(name, overrides)
    refuse_missing_data(config)
    check_arch(config.teacher.arch)
    return setup_of(config, load_dataset(config.dataset), caches_dir)


def setup_of(config: TeacherConfig, dataset: Dataset, caches_dir: Path) -> Setup:
    """The setup of a dataset that is loaded. Raises TapError."""
    stages = stage_modules(config.teacher.arch, config.taps.stages)
    if config.taps.hint is not None and config.taps.hint.stage not in stages:
        raise TapError(f"taps.hint.stage: {config.taps.hint.stage} is none of {', '.join(stages)}")
    identity = cache_identity(views_identity(config, dataset), teacher_identity(config))
    path = cache_folder(caches_dir, config.name, identity)
    return Setup(config, dataset, stages, identity, path)


def at_hand(setup: Setup) -> Setup:
    """The setup with its weights there, downloaded if need be; ArchError where they are not."""
    if knows_weights(setup.identity):
        return setup
    config = setup.config
    weights = fetched_weights(config.teacher.weights)
    if not weights.is_file():
        help_text = "put the file there or set teacher.weights=PATH"
        if config.training is not None:
            help_text = f"train the teacher first: {teacher_command(config)}"
        raise ArchError(f"{no_weights(config, weights)}\n  fix: {help_text}")
    identity = with_weights(setup.identity, known_sha256(config.teacher.weights))
    path = cache_folder(setup.path.parent, config.name, identity)
    return dataclasses.replace(setup, identity=identity, path=path)
