"""Explains weights whose number of classes is not the dataset's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from nets.archs import ArchError
from runtime.text import one_line
from views.datasets import Dataset

_NAMED = 20


@contextmanager
def naming_classes(dataset: Dataset, num_classes: int) -> Iterator[None]:
    """Add the dataset's classes to an ArchError about a classifier of another size.

    num_classes: of the network; 0: it has no classifier.
    """
    try:
        yield
    except ArchError as error:
        expected = rf"has shape \(([0-9]+)[^)]*\), expected \({num_classes}[,)]"
        found = re.search(expected, error.problem) if num_classes else None
        if found is None or int(found[1]) == num_classes:
            raise
        names = dataset.class_names
        more = f", ... {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
        raise ArchError(
            f"{error.problem}\n  The weights have {int(found[1]):,} classes, the dataset "
            f"{dataset.name} has {num_classes:,}: {one_line(', '.join(names[:_NAMED]))}{more}",
            fix=error.fix or "remove folders that are not classes, or name other weights or images",
        ) from None
