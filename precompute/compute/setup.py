"""Build the setup of a pass from a teacher's config: data, identity, folder and taps; no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from teach_once.configs.commands import teacher_command
from teach_once.configs.load import ConfigError, check_data_exists, load_teacher
from teach_once.configs.paths import no_weights
from teach_once.configs.schema import TapsConfig, TeacherConfig, TopLogits, ViewsConfig, as_plain
from teach_once.nets.networks.archs import ArchError
from teach_once.nets.networks.names import check_arch
from teach_once.nets.teacher.classes import teacher_classes
from teach_once.nets.teacher.identity import teacher_identity
from teach_once.nets.teacher.taps import Tap, taps_asked, teacher_stages
from teach_once.nets.weights.source import fetched_weights, known_sha256
from teach_once.runtime.command.options import SPOOL
from teach_once.runtime.machine.urls import spool_folder
from teach_once.store.errors import CacheError
from teach_once.store.format.manifest import MAX_CUT_CLASSES
from teach_once.store.format.spec import TapSpec
from teach_once.store.identity import (
    Identity,
    cache_identity,
    evaluation_identity,
    knows_weights,
    with_weights,
)
from teach_once.store.inspect.find import cache_folder
from teach_once.store.read.evaluation import PROBES, TEST, evaluation_name, evaluation_path
from teach_once.store.read.reader import TeacherCache
from teach_once.views.datasets import Dataset, load_dataset
from teach_once.views.identity import views_identity
from teach_once.views.probe import load_probe


@dataclass(frozen=True)
class Setup:
    """A teacher, its dataset, and the folder or URL of its cache."""

    config: TeacherConfig
    dataset: Dataset
    stages: dict[str, str]
    identity: Identity
    path: Path

    @property
    def taps(self) -> list[Tap]:
        """Taps requested by the config."""
        return taps_asked(self.config.taps, self.stages, has_labels=self.dataset.has_labels)

    @property
    def num_classes(self) -> int:
        """Number of the teacher's classes; 0 if its logits are not requested.

        Raises ArchError if it is unknown.
        """
        return teacher_classes(self.config, self.dataset.num_classes)

    @property
    def tap_names(self) -> list[str]:
        return [tap.name for tap in self.taps]

    def tap_spec(self, tap: Tap, shape: tuple[int, ...]) -> TapSpec:
        """Return how a tap with records of `shape` is stored. Raises ConfigError if impossible."""
        return tap_spec(self.config.taps, tap, shape)

    def is_held_by(self, held: Mapping[str, TapSpec]) -> bool:
        """Return True if these taps include all requested taps in the requested dtypes."""
        return all(
            tap.name in held and held[tap.name] == self.tap_spec(tap, held[tap.name].shape)
            for tap in self.taps
        )


def tap_spec(taps: TapsConfig, tap: Tap, shape: tuple[int, ...]) -> TapSpec:
    """Return how a tap with records of `shape` is stored. Raises ConfigError if impossible."""
    match tap.kind:
        case "correct":
            return TapSpec(shape, "uint8")
        case "logits":
            if isinstance(taps.logits, TopLogits):
                return TapSpec(shape, "float16", top=_top(taps.logits.top_k, shape[0]))
            scale = "row" if taps.logits == "uint8" else None
            return TapSpec(shape, str(taps.logits), scale)
        case "stage":
            scale = "block" if taps.channel_means == "uint8" else None
            return TapSpec(shape, str(taps.channel_means), scale)
        case "attention":
            return TapSpec(shape, str(taps.attention))
        case "embedding":
            return TapSpec(shape, str(taps.embedding))
        case "hint":
            assert taps.hint is not None
            return TapSpec(shape, taps.hint.dtype, stage=tap.stage)


def _top(asked: int, num_classes: int) -> int:
    """Return `top_k`. Raises ConfigError unless it is smaller than the number of classes."""
    if not asked < num_classes <= MAX_CUT_CLASSES:
        raise ConfigError(
            f"taps.logits.top_k is {asked}, but it must be less than the number of classes "
            f"({num_classes:,}), which must be at most {MAX_CUT_CLASSES:,}",
            fix="set taps.logits=float16 to store all logits",
        )
    return asked


def prepare(name: str, overrides: Sequence[str], caches_dir: Path, spool: Path = SPOOL) -> Setup:
    """Build the setup of a pass; downloads a library's weights.

    caches_dir: a folder or a URL. spool: local folder of a pass to a URL. Raises ConfigError,
    DatasetError, TapError, and ArchError (also for missing weights).
    """
    return require_weights(describe_setup(name, overrides, caches_dir, spool))


def describe_setup(
    name: str, overrides: Sequence[str], caches_dir: Path, spool: Path = SPOOL
) -> Setup:
    """Build the setup without requiring the weights file; its identity may be partly unknown."""
    config = load_teacher(name, overrides)
    check_data_exists(config)
    check_arch(config.teacher.arch)
    dataset = load_dataset(config.dataset, spool_folder(caches_dir, spool))
    load_probe(config, dataset, spool_folder(caches_dir, spool))  # raises if it cannot be used
    return setup_of(config, dataset, caches_dir)


def setup_of(config: TeacherConfig, dataset: Dataset, caches_dir: Path) -> Setup:
    """Build the setup of a config from a loaded dataset. Raises TapError or ArchError."""
    stages = teacher_stages(config)
    taps_asked(config.taps, stages)  # raises if the hint's stage is not one of them
    teacher_classes(config, dataset.num_classes)  # raises if it is unknown
    identity = cache_identity(views_identity(config, dataset), teacher_identity(config))
    path = cache_folder(caches_dir, config.name, identity)
    return Setup(config, dataset, stages, identity, path)


def require_weights(setup: Setup) -> Setup:
    """Return the setup with its weights file, downloaded if possible.

    Raises ArchError if it is missing.
    """
    if knows_weights(setup.identity):
        return setup
    config = setup.config
    weights = fetched_weights(config.teacher.weights)
    if not weights.is_file():
        help_text = "put the file there or set teacher.weights=PATH"
        if config.training is not None:
            help_text = f"train the teacher first: {teacher_command(config)}"
        raise ArchError(no_weights(config, weights), fix=help_text)
    identity = with_weights(setup.identity, known_sha256(config.teacher.weights))
    path = cache_folder(setup.path.parent, config.name, identity)
    return dataclasses.replace(setup, identity=identity, path=path)


# ---- the evaluation cache inside a cache


@dataclass(frozen=True)
class EvaluatedImages:
    """Images whose teacher outputs are stored in one view, inside the cache.

    prefix: of the evaluation cache's name. dataset: its training samples are the images.
    """

    prefix: str
    dataset: Dataset


def evaluated_images(setup: Setup) -> list[EvaluatedImages]:
    """Return the test images, and the two parts of the config's probe if it has one.

    Raises DatasetError if the probe's images cannot be used.
    """
    dataset, found = setup.dataset, load_probe(setup.config, setup.dataset, setup.path.parent)
    tested = dataclasses.replace(dataset, train=dataset.test, digest=dataset.test_digest)
    probes = dict(zip(PROBES, found or (), strict=False))
    return [
        EvaluatedImages(TEST, tested),
        *(EvaluatedImages(prefix, each) for prefix, each in probes.items()),
    ]


def evaluation_setup(setup: Setup, images: EvaluatedImages | None = None) -> Setup:
    """Return the setup of an evaluation cache inside the cache of `setup`.

    images: default: the test images. They are its training samples, and its only view is the
    evaluation transform. It is small, so everything is stored in float32: an image whose outputs
    overflow float16 must not stop a pass. Of a probe's images only the embedding is stored, or,
    without `taps.embedding`, the channel means.
    """
    images = images or evaluated_images(setup)[0]
    config, dataset = setup.config, images.dataset
    transform, digest = config.views.eval_transform, dataset.digest
    if images.prefix != TEST:
        has_embedding = bool(config.taps.embedding)
        own = dataclasses.replace(
            config.taps,
            logits=None,
            channel_means=None if has_embedding else config.taps.channel_means,
            stages=None if has_embedding else config.taps.stages,
        )
        config = dataclasses.replace(config, taps=own)
    taps = dataclasses.replace(
        config.taps,
        logits="float32" if config.taps.logits else None,
        channel_means="float32" if config.taps.reads_stages else None,
        embedding="float32" if config.taps.embedding else None,
        attention=None,
        hint=None,
    )
    views = ViewsConfig(augment=transform, seed=config.views.seed, count=1)
    identity = evaluation_identity(setup.identity, digest, as_plain(transform))
    return dataclasses.replace(
        setup,
        config=dataclasses.replace(config, views=views, taps=taps),
        dataset=dataset,
        identity=identity,
        path=evaluation_path(setup.path, evaluation_name(identity, images.prefix)),
    )


def open_evaluated(
    setup: Setup, images: EvaluatedImages | None = None, *, every_byte: bool
) -> TeacherCache | None:
    """Open the evaluation cache of some images; None if it is missing or damaged.

    images: default: the test images. every_byte: compare all checksums.
    """
    evaluation = evaluation_setup(setup, images)
    try:
        cache = TeacherCache.open(evaluation.path, num_views=1, taps=evaluation.tap_names)
    except CacheError:
        return None
    if cache.identity != evaluation.identity or cache.source.faults(every_byte=every_byte):
        return None
    return cache
