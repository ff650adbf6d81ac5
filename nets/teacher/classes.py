"""The number of a teacher's classes: that of the images; without labels `teacher.num_classes`."""

from __future__ import annotations

from teach_once.configs.schema import TeacherConfig
from teach_once.nets.networks.archs import ArchError


def teacher_classes(config: TeacherConfig, num_classes: int) -> int:
    """Return the number of classes of the teacher's logits; 0 if they are not stored.

    num_classes: of the images; 0 without labels. Raises ArchError if the number is unknown, or if
    `teacher.num_classes` differs from the images' classes.
    """
    if not config.taps.logits:
        return 0
    own = config.teacher.num_classes
    if num_classes and own not in (None, num_classes):
        raise ArchError(
            f"teacher.num_classes is {own:,}, but the images have {num_classes:,} classes",
            fix="remove teacher.num_classes, or set taps.logits=null",
        )
    if not (num_classes or own):
        raise ArchError(
            f"{config.name}: the images have no labels, so the number of the teacher's classes is "
            f"unknown",
            fix="set teacher.num_classes, such as 1000, to store logits; or taps.logits=null",
        )
    return num_classes or own or 0
