"""What `dataset[index]` returns, for the datasets of `train.dataset`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Protocol

from train.errors import TrainError


class Indexed(Protocol):
    """A dataset that reads a batch at a time."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> list[Any]: ...


def item_or_items(dataset: Indexed, index: object) -> Any:
    """The item at an integer, or the list of items at a slice; negative ones count from the end.

    Raises IndexError if there is no such item, TrainError if the index is neither.
    """
    if isinstance(index, slice):
        numbers = range(*index.indices(len(dataset)))
        return dataset.__getitems__(numbers) if numbers else []
    try:
        number = operator.index(index)  # type: ignore[arg-type]
    except TypeError:
        raise TrainError(
            f"a dataset's index is an integer or a slice, not {type(index).__name__}",
            fix="for a list of samples use torch.utils.data.Subset(dataset, [0, 5, 7])",
        ) from None
    if not -len(dataset) <= number < len(dataset):
        raise IndexError(f"no sample {number}: there are {len(dataset):,}")
    return dataset.__getitems__([number % len(dataset)])[0]
