"""A torch Dataset of views with the teacher's outputs, for custom training loops.

An item is (input, label, {tap: row}). Pixels and rows are exactly those that this project's runs
use in the same epoch. Rows are read from memory-mapped files, so that worker processes and ranks
share one copy in the system's page cache.

Losses are in `train.losses`, as functions of tensors. Networks are not provided.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from teach_once.configs.commands import cache_command
from teach_once.configs.load import check_data_exists, load_teacher
from teach_once.configs.schema import StudentConfig, TeacherConfig
from teach_once.nets.networks.layout import TapError
from teach_once.runtime.command.options import MIRROR, MIRROR_GB
from teach_once.runtime.command.program import program_text
from teach_once.runtime.errors import did_you_mean
from teach_once.runtime.machine.urls import path_or_url
from teach_once.store import TeacherCache
from teach_once.store.errors import UnknownTap, fixes_spelled_by
from teach_once.store.format.spec import MANIFEST, kind_of
from teach_once.store.place.mirror_folder import use_mirror, used_mirror
from teach_once.store.read.mapped import MappedRows
from teach_once.store.read.mirror import (
    attach_again,
    attached,
    choose_mirror,
    local_caches,
    local_folder,
)
from teach_once.train.errors import TrainError
from teach_once.train.runs.check_methods import settings_that_add
from teach_once.train.runs.study import views_used
from teach_once.train.runs.teachers import open_cache, verified_pixels
from teach_once.views.augment.parameters import view_of_epoch
from teach_once.views.datasets import load_dataset
from teach_once.views.pixels.batches import Pixels, ViewBatch
from teach_once.views.pixels.resident import evaluation_pixels, open_pixels
from teach_once.views.seeds import permutation

ItemType = TypeVar("ItemType")


class Indexed(Protocol[ItemType]):
    """A dataset that reads a batch at a time."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> list[ItemType]: ...


def item_or_items(dataset: Indexed[ItemType], index: object) -> ItemType | list[ItemType]:
    """Return the item at an integer or the items at a slice; negative ones count from the end.

    Raises IndexError if there is no such item, TrainError if the index is neither an integer nor a
    slice.
    """
    if isinstance(index, slice):
        numbers = range(*index.indices(len(dataset)))
        return dataset.__getitems__(numbers) if numbers else []
    try:
        number = operator.index(index)  # type: ignore[arg-type]
    except TypeError:
        raise TrainError(
            f"a dataset's index is an integer or a slice, not {type(index).__name__}",
            fix="use torch.utils.data.Subset(dataset, [0, 5, 7]) for a list of samples",
        ) from None
    if not -len(dataset) <= number < len(dataset):
        raise IndexError(f"no sample {number}: there are {len(dataset):,}")
    return dataset.__getitems__([number % len(dataset)])[0]


Item = tuple[Tensor, Tensor, dict[str, Tensor]]

_CPU = torch.device("cpu")
_NOT_SET = -1
_MIRRORS = "mirrors"  # key in the state sent to a worker


class DistillationDataset(Dataset[Item]):
    """The training images of a cache, one view per epoch, with the teacher's outputs.

    Items: input (C, H, W) float32, normalized; label () int64; {tap: row}, with rows as stored in
    the cache (float16 unless configured otherwise; `correct` is 0 or 1). If `views.augment` mixes
    images, the label is (num_classes,) float32, the fraction of each class.
    `torch.nn.functional.cross_entropy` accepts both kinds of labels. Without labels, the label is
    -1, which it rejects.

    Call `set_epoch` before each epoch's loader is iterated. It also reaches worker processes,
    including persistent ones, with any start method.
    """

    def __init__(
        self,
        config: StudentConfig | TeacherConfig,
        cache: TeacherCache | str | Path,
        taps: Sequence[str] | None = None,
        *,
        first_epoch: int = 1,
        mirror: str | Path = MIRROR,
        mirror_gb: float = MIRROR_GB,
    ) -> None:
        """Open the images and the cache, and check that they match.

        config: a teacher's, or a student's, whose `num_views` then applies. cache: the teacher's
        cache, its path, or the folder of caches that contains it; paths may be
        "s3://bucket/prefix". taps: outputs to read; default: all. first_epoch: number of the loop's
        first epoch; timm, Accelerate and the Hugging Face Trainer count from 0. mirror, mirror_gb:
        local folder for data fetched from a URL, and its maximum size in 10^9 bytes.

        Raises TrainError, ConfigError, DatasetError or CacheError.
        """
        self.teacher, self.num_views = _teacher_and_views(config)
        self._first_epoch = first_epoch
        # In shared memory, so that workers read the number written by the main process.
        self._epoch = torch.tensor(_NOT_SET).share_memory_()  # type: ignore[no-untyped-call]
        self._verified_view: int | None = None
        path = _local_path(cache, self.teacher.name, Path(mirror), mirror_gb)
        self._opened = _open(self.teacher, self.num_views, path, taps)
        self._path, self.taps = self._opened.cache.path, tuple(self._opened.taps)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Labels (N,) of all samples, not mixed, for samplers that balance classes; or None."""
        return self._opened.labels

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self._opened.class_names

    @property
    def epoch(self) -> int:
        """Current epoch, counted from 1 for any loop. Raises TrainError if it is not set."""
        number = int(self._epoch)
        if number == _NOT_SET:
            raise TrainError(
                "no epoch is set, and the epoch determines the view",
                fix=f"call dataset.set_epoch(epoch) before each epoch, from {self._first_epoch} on",
            )
        return number

    @property
    def view(self) -> int:
        """View of the current epoch. Raises TrainError if no epoch is set."""
        return view_of_epoch(self.epoch, self.num_views)

    def set_epoch(self, epoch: int) -> None:
        """Use the view of this epoch from now on, after verifying its checksums.

        Items already prepared by workers do not change, so call it between epochs. Raises
        TrainError for an epoch before the first one, and CacheDamaged.
        """
        number = operator.index(epoch) - self._first_epoch + 1
        if number < 1:
            counted = "DistillationDataset(..., first_epoch=0) if the loop counts from 0"
            raise TrainError(
                f"set_epoch({epoch}): the first epoch is {self._first_epoch}",
                fix=counted if epoch == 0 else f"count epochs from {self._first_epoch} on",
            )
        view = view_of_epoch(number, self.num_views)
        if view != self._verified_view:
            self._opened.rows.verify(view)
            self._verified_view = view
        self._epoch.fill_(number)

    def __len__(self) -> int:
        return len(self._opened.pixels)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        """Return the item at an integer, or the list of items at a slice."""
        return item_or_items(self, index)

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Return a whole batch at once, as requested by a DataLoader."""
        ids, view = np.asarray(indices, dtype=np.int64), self.view
        (batch,) = self._opened.pixels.batches([view], ids, len(ids))
        found = self._opened.rows.read(view, ids)
        rows = {tap: torch.from_numpy(values) for tap, values in found.items()}
        labels = _labels(batch, len(self.class_names or ()))
        return [
            (batch.inputs[i], labels[i], {tap: values[i] for tap, values in rows.items()})
            for i in range(len(ids))
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a worker that is not forked: paths to open and the shared epoch."""
        own = {key: value for key, value in self.__dict__.items() if key != "_opened"}
        return {**own, _MIRRORS: (attached(), used_mirror())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = dict(state)
        folders, chosen = own.pop(_MIRRORS)
        attach_again(folders)
        use_mirror(chosen)
        self.__dict__.update(own)
        self._opened = _open(self.teacher, self.num_views, self._path, self.taps)


class EvaluationDataset(Dataset[tuple[Tensor, Tensor]]):
    """The test images, prepared as in this project's runs.

    Items: input (C, H, W) float32, normalized; label () int64.
    """

    def __init__(
        self,
        config: StudentConfig | TeacherConfig,
        split: Literal["test", "validation"] = "test",
    ) -> None:
        """Open the images.

        Raises ConfigError, DatasetError, or TrainError if no validation samples are held out.
        """
        self.teacher, _ = _teacher_and_views(config)
        self._split = split
        self._pixels = _evaluation_pixels(self.teacher, split)

    def __len__(self) -> int:
        return len(self._pixels)

    @overload
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[Tensor, Tensor]]: ...

    def __getitem__(
        self, index: int | slice
    ) -> tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor]]:
        """Return the item at an integer, or the list of items at a slice."""
        return item_or_items(self, index)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        ids = np.asarray(indices, dtype=np.int64)
        (batch,) = self._pixels.batches([0], ids, len(ids))
        return list(zip(batch.inputs, batch.labels, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_pixels"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pixels = _evaluation_pixels(self.teacher, self._split)


class RunOrder(Sampler[int]):
    """The order of samples of a run with this seed, in the dataset's current epoch.

    For one process; use torch's DistributedSampler for several.
    """

    def __init__(self, dataset: DistillationDataset, seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __iter__(self) -> Iterator[int]:
        order = permutation(self._seed, self._dataset.epoch, len(self._dataset))
        return iter(order.tolist())

    def __len__(self) -> int:
        return len(self._dataset)


class _Opened(NamedTuple):
    """The state that is not sent to a worker that is not forked."""

    cache: TeacherCache
    taps: Sequence[str]
    rows: MappedRows
    pixels: Pixels
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...] | None


def _teacher_and_views(config: StudentConfig | TeacherConfig) -> tuple[TeacherConfig, int]:
    if isinstance(config, StudentConfig):
        if config.teachers:
            raise TrainError(
                f"{config.name} has several teachers, and a dataset reads one cache",
                fix=f"open a dataset for each teacher's config, or use `{program_text('train')}`",
            )
        teacher = load_teacher(config.teacher)
        num_views = views_used(config, teacher)
    elif isinstance(config, TeacherConfig):
        teacher, num_views = config, config.views.num_views
    else:
        raise TrainError(
            f"config is {type(config).__name__}: expected a student's or a teacher's config",
            fix="from teach_once.configs.load import load_student; load_student(NAME or PATH)",
        )
    check_data_exists(teacher)
    return teacher, num_views


def _local_path(
    cache: TeacherCache | str | Path, teacher: str, mirror: Path, mirror_gb: float
) -> Path:
    """Return the local path of a cache or of a folder of caches; for a URL, its path in the mirror.

    Packed images at a URL are read through the same mirror, for any location of the cache. Raises
    BadUrl.
    """
    choose_mirror(mirror, mirror_gb)
    if isinstance(cache, TeacherCache):
        return cache.path
    path = path_or_url(cache)
    if _has_name_of_a_cache(path, teacher):
        folder, found = local_caches(path.parent, path, mirror, mirror_gb)
        return found or folder
    return local_folder(path, mirror, mirror_gb)


def _has_name_of_a_cache(path: Path, teacher: str) -> bool:
    return path.name.startswith(f"{teacher}-")


def _open(
    teacher: TeacherConfig, num_views: int, path: Path, taps: Sequence[str] | None
) -> _Opened:
    """Open a cache by its path, or find the teacher's cache in a folder of caches.

    path: from `_local_path`. A missing path is a cache if its name has the form of a cache's name.
    """
    is_cache = path.is_file() or (path / MANIFEST).exists()
    caches_dir = path.parent if is_cache or _has_name_of_a_cache(path, teacher.name) else path
    dataset = load_dataset(teacher.dataset, caches_dir)
    cache_path = path if is_cache else None
    opened = open_cache(teacher, dataset, num_views, caches_dir=caches_dir, cache_path=cache_path)
    names = list(opened.taps) if taps is None else _known_taps(taps, opened, teacher, caches_dir)
    with fixes_spelled_by(lambda more: cache_command(teacher, caches_dir=caches_dir, more=more)):
        rows = MappedRows(opened, names)
    normalization = teacher.dataset.normalization
    pixels = open_pixels(dataset.train, teacher.views, normalization, _CPU, num_workers=0)
    pixels = verified_pixels(pixels, dataset, opened, teacher)
    return _Opened(opened, names, rows, pixels, dataset.train.labels, dataset.class_names)


def _known_taps(
    taps: Sequence[str], cache: TeacherCache, teacher: TeacherConfig, caches_dir: Path
) -> list[str]:
    """Return the taps. Raises UnknownTap, with the setting that adds the tap, for a missing one."""
    if isinstance(taps, str):
        raise TrainError(
            f"taps is the string {taps!r}, expected a list", fix=f"pass taps=[{taps!r}]"
        )
    held = cache.manifest.taps
    for tap in taps:
        if tap not in held:
            adding = _settings_for(tap, held)
            again = cache_command(teacher, caches_dir=caches_dir, more=adding)
            raise UnknownTap(
                f"no tap {tap!r}: {cache.path} has {', '.join(held)}{did_you_mean(tap, held)}",
                fix=again if adding else f"pass taps={list(held)}",
            )
    return list(taps)


def _settings_for(tap: str, held: Collection[str]) -> list[str]:
    """Return overrides that add a tap to a cache with these taps; [] if none can."""
    if kind_of(tap) in map(kind_of, held):  # a stage that the teacher lacks
        return []
    try:
        return settings_that_add({"": {tap}}, [name for name in held if name.startswith("stage")])
    except TapError:  # not available in any cache
        return []


def _evaluation_pixels(teacher: TeacherConfig, split: str) -> Pixels:
    dataset = load_dataset(teacher.dataset)
    images = dataset.test if split == "test" else dataset.validation
    if images is None:
        raise TrainError(
            "no samples are held out for validation",
            fix="set dataset.validation_fraction in the teacher's file, or use split='test'",
        )
    normalization = teacher.dataset.normalization
    return evaluation_pixels(images, teacher.views, normalization, _CPU, num_workers=0)


def _labels(batch: ViewBatch, num_classes: int) -> Tensor:
    """Return labels (B,) int64; for mixed images (B, num_classes) float32, fractions by class.

    num_classes: 0 without labels.
    """
    if batch.other_labels is None or batch.other_shares is None or not num_classes:
        return batch.labels
    shares = torch.zeros(len(batch.labels), num_classes)
    rows = torch.arange(len(shares))
    shares[rows, batch.labels] = 1 - batch.other_shares
    shares[rows, batch.other_labels] += batch.other_shares
    return shares
