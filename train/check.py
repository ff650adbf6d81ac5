"""What can be known of a study before its teacher runs: it is checked while an error costs nothing.

Builds both networks with fresh weights and shows them one blank image; reads no cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from configs.schema import LossTerm, StudentConfig, TeacherConfig
from nets.archs import ArchError
from nets.taps import TapError, stage_modules, taps_asked
from nets.teacher import Teacher
from nets.zoo import build
from store.layout import TapSpec
from train.connectors import connectors_for
from train.needs import check_before_the_pass
from train.student import check_terms
from views.augment import check_augmentable, view_shape
from views.datasets import Dataset, load_dataset


def check_study(
    config: StudentConfig,
    teacher: TeacherConfig,
    methods: Sequence[str],
    caches_dir: Path = Path("caches"),
) -> None:
    """Raise TrainError, ArchError, TapError or DatasetError where a method cannot work."""
    for method in methods:
        check_terms(method, config.methods[method], config.training.epochs)
    check_before_the_pass(config, teacher, methods, caches_dir)
    dataset = load_dataset(teacher.dataset)
    taps = check_teacher(teacher, dataset)
    shape = view_shape(dataset.train.first_shape, teacher.views.augment)
    for method in methods:
        check_student(config, config.methods[method], taps, shape, dataset.num_classes)


def check_teacher(config: TeacherConfig, dataset: Dataset) -> dict[str, TapSpec]:
    """The taps that a cache will hold, found with fresh weights: name -> shape.

    Raises ArchError, TapError, DatasetError.
    """
    check_augmentable(dataset.train.first_shape, config.views.augment)
    shape = view_shape(dataset.train.first_shape, config.views.augment)
    net, device = config.teacher, torch.device("cpu")
    network = build(net.arch, num_classes=dataset.num_classes, in_channels=shape[2], stem=net.stem)
    stages = stage_modules(net.arch, config.taps.stages)
    taps = taps_asked(config.taps, stages)
    try:
        shapes = Teacher(network.eval(), stages, "float32", device).tap_shapes(shape, taps)
    except TapError as error:
        raise TapError(f"taps.stages: {error.problem}", fix=error.fix) from None
    except RuntimeError as error:
        raise ArchError(
            f"teacher.arch: {net.arch} cannot take images of {shape[0]}x{shape[1]} pixels: "
            f"{str(error).splitlines()[0]}"
        ) from error
    hint_stage = {tap.name: tap.stage for tap in taps if tap.kind == "hint"}
    return {
        name: TapSpec(shape, "float32", stage=hint_stage.get(name))
        for name, shape in shapes.items()
    }


def check_student(
    config: StudentConfig,
    terms: Sequence[LossTerm],
    taps: Mapping[str, TapSpec],
    image_shape: tuple[int, int, int],
    num_classes: int,
) -> None:
    """Raise ArchError, TapError or StageMismatch unless the student fits these taps."""
    network = build(
        config.student.arch,
        num_classes=num_classes,
        in_channels=image_shape[2],
        stem=config.student.stem,
    )
    connectors_for(network, config.student, terms, taps, image_shape, seed=0)
