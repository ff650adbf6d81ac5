"""Check methods before anything runs.

Without a cache, both networks are built with fresh weights and run on a blank image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from teach_once.configs.schema import LossTerm, StudentConfig, TeacherConfig, TopLogits
from teach_once.nets.networks.archs import ArchError
from teach_once.nets.networks.layout import TapError
from teach_once.nets.student import build_student, describe_student
from teach_once.nets.teacher.classes import teacher_classes
from teach_once.nets.teacher.taps import Tap, taps_asked, teacher_stages
from teach_once.nets.teacher.teacher import fresh_teacher
from teach_once.nets.weights.source import is_downloadable
from teach_once.nets.weights.start import start_student
from teach_once.store.errors import fixes_spelled_by
from teach_once.store.format.spec import TapSpec
from teach_once.train.errors import TrainError
from teach_once.train.losses import lskd
from teach_once.train.method.connector_ends import check_ends
from teach_once.train.method.connectors import connectors_for, hint_stage
from teach_once.train.method.ensemble_taps import EnsembleTaps, combine_taps
from teach_once.train.runs.study import Study
from teach_once.train.runs.teachers import (
    StudyTeacher,
    check_combinable,
    check_same_views,
    pass_command,
    tap_names,
    teacher_configs,
)
from teach_once.train.schedule import weight_at
from teach_once.train.terms import (
    check_options,
    head_classes,
    looked_at,
    loss_named,
    taps_of,
)
from teach_once.views.augment.augment import check_augmentable, view_shape
from teach_once.views.datasets import Dataset, load_dataset


@dataclass(frozen=True)
class TapsOfTeacher:
    """The taps of a teacher that methods can read, from its cache or its future cache.

    top: number of stored logits per sample; None: all. lacks: start of an error about other taps.
    caches_dir: folder of the future cache.
    """

    teacher: TeacherConfig
    stages: Sequence[str]
    names: Collection[str]
    top: int | None
    lacks: str
    caches_dir: Path

    @classmethod
    def of_config(cls, teacher: TeacherConfig, caches_dir: Path) -> TapsOfTeacher:
        """Return the taps that a pass would store."""
        logits, stages = teacher.taps.logits, list(teacher_stages(teacher))
        top = logits.top_k if isinstance(logits, TopLogits) else None
        lacks = f"the teacher's file {teacher.name} leaves out"
        return cls(teacher, stages, tap_names(teacher), top, lacks, caches_dir)

    @classmethod
    def of_cache(cls, teacher: StudyTeacher) -> TapsOfTeacher:
        """Return the taps that a cache has or will have."""
        cache, stages = teacher.cache, list(teacher.stages)
        logits = cache.manifest.taps.get("logits")
        top, path = logits.top if logits else None, cache.path
        names = list(cache.manifest.taps)
        return cls(teacher.config, stages, names, top, f"{path} lacks", path.parent)

    def check(self, config: StudentConfig, methods: Sequence[str]) -> None:
        """Raise TrainError if a method needs other taps, or all logits."""
        if missing := missing_taps(config, methods, self.stages, self.names):
            raise missing_error(missing, methods, self)
        for method in methods:
            check_all_logits(method, config.methods[method], self.top)


def check_settings(
    config: StudentConfig, methods: Sequence[str], teachers: Sequence[TapsOfTeacher]
) -> None:
    """Raise TrainError if a method cannot work with the taps of these teachers."""
    for method in methods:
        check_terms(method, config.methods[method], config.training.epochs)
    for teacher in teachers:
        teacher.check(config, methods)
    if len(teachers) > 1:
        check_several_teachers(config, methods)


def check_methods(study: Study, methods: Sequence[str]) -> None:
    """Raise TrainError if a method cannot work with the study's caches.

    Raises CacheIncomplete if it needs records that the caches lack so far.
    """
    check_labels(study.config, methods, study.teacher.name, study.dataset)
    check_settings(study.config, methods, list(map(TapsOfTeacher.of_cache, study.teachers)))
    check_ends(study, methods)
    needed = [study.run(method, 0).needed_of_each for method in methods]
    for number, teacher in enumerate(study.teachers):
        spell = partial(pass_command, teacher.config, teacher.cache.path.parent)
        with fixes_spelled_by(spell):
            for of_each in needed:
                teacher.cache.refuse_incomplete(of_each[number])


def check_students(study: Study, methods: Sequence[str]) -> None:
    """Raise TrainError, ArchError or TapError unless each student fits the study's caches."""
    check_methods(study, methods)
    taps = [teacher.cache.taps for teacher in study.teachers]
    combined = combine_taps(taps, study.config.weight_of_each)
    for method in methods:
        check_student(study.config, method, combined, study.image_shape, study.dataset.num_classes)


def check_without_cache(
    config: StudentConfig,
    first: TeacherConfig,
    methods: Sequence[str],
    caches_dir: Path = Path("caches"),
) -> None:
    """Raise TrainError, ArchError, TapError or DatasetError if a method could not work.

    first: the first teacher.
    """
    teachers = teacher_configs(config, first)
    dataset = load_dataset(first.dataset, caches_dir)
    check_labels(config, methods, first.name, dataset)
    of_each = [TapsOfTeacher.of_config(teacher, caches_dir) for teacher in teachers]
    check_settings(config, methods, of_each)
    taps = [check_teacher(first, dataset)]
    for other in teachers[1:]:
        theirs = load_dataset(other.dataset, caches_dir)
        check_same_views(first, dataset, other, theirs)
        taps.append(check_teacher(other, theirs))
    shape = view_shape(dataset.train.first_shape, first.views.augment)
    combined = combine_taps(taps, config.weight_of_each)
    for method in methods:
        check_student(config, method, combined, shape, dataset.num_classes)


def check_several_teachers(config: StudentConfig, methods: Sequence[str]) -> None:
    """Raise TrainError if a method needs outputs that several teachers cannot combine."""
    for method in methods:
        losses = [loss_named(term.loss) for term in config.methods[method]]
        taps = {tap for loss in losses for tap in loss.teacher_taps}
        check_combinable(method, taps, {part for loss in losses for part in loss.student})


def check_teacher(config: TeacherConfig, dataset: Dataset) -> dict[str, TapSpec]:
    """Return the taps of a future cache, found with fresh weights: name -> shape.

    Raises ArchError, TapError or DatasetError if they cannot be found.
    """
    for transform in (config.views.augment, config.views.eval_transform):
        check_augmentable(dataset.train.first_shape, transform)
    shape = view_shape(dataset.train.first_shape, config.views.augment)
    net, stages = config.teacher, teacher_stages(config)
    taps = taps_asked(config.taps, stages)
    try:
        teacher = fresh_teacher(
            net,
            stages,
            num_classes=teacher_classes(config, dataset.num_classes),
            image_shape=shape,
            has_embedding=bool(config.taps.embedding),
        )
        shapes = dataclasses.replace(teacher, precision="float32").tap_shapes(shape, taps)
    except TapError as error:
        raise TapError(f"taps.stages: {error.problem}", fix=error.fix) from None
    except RuntimeError as error:
        raise ArchError(
            f"teacher.arch: {net.arch} cannot process images of {shape[0]}x{shape[1]} pixels: "
            f"{str(error).splitlines()[0]}"
        ) from error
    hint_stage = {tap.name: tap.stage for tap in taps if tap.kind == "hint"}
    return {
        name: TapSpec(shape, "float32", stage=hint_stage.get(name))
        for name, shape in shapes.items()
    }


def check_labels(
    config: StudentConfig, methods: Sequence[str], teacher: str, dataset: Dataset
) -> None:
    """Raise TrainError if the images have no labels, but a loss of these methods needs them."""
    if dataset.has_labels:
        return
    for method in methods:
        losses = [term.loss for term in config.methods[method]]
        needing = [loss for loss in losses if loss_named(loss).needs_labels]
        if needing:
            fitting = [each for each, terms in config.methods.items() if not _needs_labels(terms)]
            others = f"one of the methods {', '.join(fitting)}" if fitting else "another method"
            raise TrainError(
                f"methods.{method}: the loss {needing[0]} needs labels, which the images of "
                f"{teacher} do not have",
                fix=f"use {others}; without labels cd, kd, embedding, at, fitnets, rkd and "
                f"residual work",
            )


def _needs_labels(terms: Sequence[LossTerm]) -> bool:
    return any(loss_named(term.loss).needs_labels for term in terms)


def check_student(
    config: StudentConfig,
    method: str,
    teachers: EnsembleTaps,
    image_shape: tuple[int, int, int],
    num_classes: int,
) -> None:
    """Raise ArchError, TapError or StageMismatch unless the student fits the teachers' taps."""
    terms = config.methods[method]
    net, outputs = config.student, looked_at(terms)
    network = build_student(
        net,
        outputs,
        hint_stage(teachers.specs),
        num_classes=head_classes(method, terms, num_classes, teachers.specs),
        image_shape=image_shape,
    )
    init = net.init
    if init is not None and not is_downloadable(init):
        start_student(network, config, image_shape)
    parts = describe_student(network, net, outputs, image_shape)
    connectors_for(parts, net.connector, outputs, teachers, 0)


def check_all_logits(method: str, terms: Sequence[LossTerm], top: int | None) -> None:
    """Raise TrainError if a loss needs all logits and only the `top` largest are stored."""
    functions = [loss_named(term.loss).function for term in terms]
    if top is not None and lskd in functions:  # under any name
        raise TrainError(
            f"methods.{method}: lskd divides by the standard deviation of all logits, but only the "
            f"{top} largest are stored",
            fix="set taps.logits=float16 in the teacher's file, or omit the method",
        )


def check_terms(method: str, terms: tuple[LossTerm, ...], epochs: int) -> None:
    """Raise TrainError if a term is never active, or if an epoch has no active term."""
    names = [term.loss for term in terms]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise TrainError(f"methods.{method}: duplicate loss {twice!r}; use a single term")
    for number, term in enumerate(terms):
        check_options(f"methods.{method}.{number}", term)
        if term.start_epoch > epochs:
            raise TrainError(
                f"methods.{method}.{number}.start_epoch is {term.start_epoch}, but training ends "
                f"after epoch {epochs}: this term would never be active",
                fix=f"set methods.{method}.{number}.start_epoch={epochs} or less",
            )
    for epoch in range(1, epochs + 1):
        if not any(weight_at(term, epoch) for term in terms):
            raise TrainError(f"methods.{method}: every weight is zero in epoch {epoch}")


# ---- taps that methods need


def missing_taps(
    config: StudentConfig, methods: Sequence[str], stages: Sequence[str], held: Collection[str]
) -> dict[str, set[str]]:
    """Return the taps that methods need and a cache lacks: {method: taps}, no empty entries."""
    needed = {method: taps_of(config.methods[method], stages) for method in methods}
    return {method: taps - set(held) for method, taps in needed.items() if taps - set(held)}


def format_missing(missing: Mapping[str, set[str]], who: str, stages: Sequence[str]) -> str:
    """Format missing taps; `who`: subject and verb. Raises TrainError for unknown taps."""
    lines = [f"methods.{m} needs the taps {', '.join(sorted(taps))}" for m, taps in missing.items()]
    possible = {
        "logits",
        "correct",
        "hint",
        "embedding",
        *stages,
        *(Tap("attention", stage).name for stage in stages),
    }
    if unknown := sorted(set().union(*missing.values()) - possible):
        known = ", ".join(sorted(possible))
        raise TrainError("\n  ".join([*lines, f"no cache has {', '.join(unknown)}, but {known}"]))
    return "\n  ".join([f"{who} taps that the methods need:", *lines])


def settings_that_add(missing: Mapping[str, set[str]], stages: Sequence[str]) -> list[str]:
    """Return overrides of the teacher's file that add these taps; a hint uses the middle stage."""
    every = set().union(*missing.values())
    kinds = {Tap.parse(name).kind for name in every}
    middle = stages[len(stages) // 2] if stages else "stage1"
    return [
        *(["taps.logits=float16"] if kinds & {"logits", "correct"} else []),
        *(["taps.channel_means=float16"] if "stage" in kinds else []),
        *(["taps.attention=float16"] if "attention" in kinds else []),
        *([f"taps.hint.stage={middle}"] if "hint" in kinds else []),
        *(["taps.embedding=float16"] if "embedding" in kinds else []),
    ]


def missing_error(
    missing: Mapping[str, set[str]], methods: Sequence[str], teacher: TapsOfTeacher
) -> TrainError:
    """Return the error for taps that a teacher lacks, with the command that adds them."""
    problem = format_missing(missing, teacher.lacks, teacher.stages)
    rest = " ".join(method for method in methods if method not in missing)
    without = f'; or omit these methods: METHODS="{rest}"' if rest else ""
    more = settings_that_add(missing, teacher.stages)
    fix = pass_command(teacher.teacher, teacher.caches_dir, more)
    return TrainError(f"{problem}{without}", fix=fix)
