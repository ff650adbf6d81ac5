"""The teacher and the views of its dataset: compute the records of any samples.

All randomness of a view comes from `views`. Therefore batch size, order and interruptions do not
change the stored records, beyond float rounding in the teacher.
"""

from __future__ import annotations

import itertools
import math
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teach_once.nets.networks.archs import ArchError
from teach_once.nets.teacher.taps import Tap
from teach_once.nets.teacher.teacher import Teacher, load_teacher_network
from teach_once.precompute.compute.reuse import Carrier
from teach_once.precompute.compute.setup import Setup
from teach_once.runtime.command.options import SPOOL
from teach_once.runtime.machine.urls import spool_folder
from teach_once.runtime.safe.locks import Job
from teach_once.runtime.safe.text import one_line
from teach_once.store import CacheContent, TapSpec, TeacherCache
from teach_once.store.format.spec import SAMPLE_DIGEST
from teach_once.views.augment.augment import pixel_canary
from teach_once.views.datasets import Dataset
from teach_once.views.identity import preview_views
from teach_once.views.pixels.batches import ViewBatch
from teach_once.views.pixels.resident import calibration_batches, open_pixels
from teach_once.views.pixels.streaming import MOST_PART_BYTES

_NAMED = 20


@contextmanager
def naming_classes(dataset: Dataset, num_classes: int) -> Iterator[None]:
    """Add the dataset's classes to an ArchError about a classifier of another size.

    num_classes: classes of the network; 0: it has no classifier.
    """
    try:
        yield
    except ArchError as error:
        expected = rf"has shape \(([0-9]+)[^)]*\), expected \({num_classes}[,)]"
        found = re.search(expected, error.problem) if num_classes else None
        if found is None or int(found[1]) == num_classes:
            raise
        if dataset.class_names is None:
            raise ArchError(
                f"{error.problem}\n  The weights have {int(found[1]):,} classes, but "
                f"teacher.num_classes is {num_classes:,}",
                fix=f"set teacher.num_classes={found[1]}",
            ) from None
        names = dataset.class_names
        more = f", ... {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
        raise ArchError(
            f"{error.problem}\n  The weights have {int(found[1]):,} classes, the dataset "
            f"{dataset.name} has {num_classes:,}: {one_line(', '.join(names[:_NAMED]))}{more}",
            fix=error.fix or "remove folders that are not classes, or set other weights or images",
        ) from None


_BATCH_SIZE = 256
_VIEWS_AT_ONCE = 8  # views of a whole batch of samples; with more views, fewer samples
_SECONDS_AT_STAKE = 4.0
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class PassOptions:
    """Settings that affect the speed of a pass, but not its result."""

    device: torch.device
    batch_size: int | None = None  # images per forward pass; default: the fastest in a trial
    block_rows: int | None = None
    num_workers: int | None = None  # processes that read images, unless all are on the device
    check_every_byte: bool = True
    job: Job = field(default_factory=Job)
    carried_from: TeacherCache | None = None  # cache of another state of the dataset
    spool: Path = SPOOL  # folder for records of unfinished blocks of a pass to a URL


class TeacherPass:
    """A teacher and the views of its dataset on one device."""

    def __init__(self, setup: Setup, options: PassOptions, teacher: Teacher | None = None) -> None:
        """Load the teacher, unless another pass has loaded it. Raises ArchError or DatasetError."""
        self.setup, self.options = setup, options
        self.batch_size = options.batch_size or _BATCH_SIZE
        self.images_per_second = 0.0  # set by a trial
        old = options.carried_from
        self.carrier = None if old is None else Carrier(setup, old)
        config, dataset, device = setup.config, setup.dataset, options.device
        self._normalization = config.dataset.normalization
        self.pixels = open_pixels(
            dataset.train, config.views, self._normalization, device, options.num_workers
        )
        self.teacher = teacher or self._load_teacher()

    def _load_teacher(self) -> Teacher:
        setup, config = self.setup, self.setup.config
        with naming_classes(setup.dataset, setup.num_classes):
            return load_teacher_network(
                config.teacher,
                setup.stages,
                num_classes=setup.num_classes,
                image_shape=self.pixels.shape,
                device=self.options.device,
                calibration=calibration_batches(self.pixels),
                has_embedding=bool(config.taps.embedding),
            )

    @property
    def folder(self) -> Path:
        """The cache's own folder; for a cache at a URL, the local folder of unfinished records."""
        return spool_folder(self.setup.path, self.options.spool)

    def tap_specs(self) -> dict[str, TapSpec]:
        """Shape and storage of each tap, by name."""
        taps = self.setup.taps
        shapes = self.teacher.tap_shapes(self.pixels.shape, taps)
        return {tap.name: self.setup.tap_spec(tap, shapes[tap.name]) for tap in taps}

    def batches(
        self, views: Sequence[int], sample_ids: Ids, taps: Sequence[Tap]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield (view, taps of a batch), taps being name -> (B, ...) on the device.

        They include the samples' digests as "sample_digest", (B, 16) uint8 on the host.
        """
        for batch in self.pixels.batches(views, sample_ids, self.batch_size):
            values = self.teacher.outputs(batch.inputs, batch.labels, taps)
            yield batch.view, {**values, SAMPLE_DIGEST: _digests(batch)}

    @property
    def views_per_reading(self) -> int:
        """Return the number of views per decoded image: all that fit into a worker's memory."""
        if not self.pixels.is_streamed:
            return 1
        most = MOST_PART_BYTES // math.prod(self.pixels.shape)
        return max(most, _VIEWS_AT_ONCE)

    @property
    def images_per_reading(self) -> int:
        """Return the largest number of views in memory at once, over all samples of a reading."""
        return self.batch_size * (_VIEWS_AT_ONCE if self.pixels.is_streamed else 1)

    def readings(
        self, views: Sequence[int], sample_ids: Ids, taps: Sequence[Tap]
    ) -> Iterator[dict[int, dict[str, Tensor]]]:
        """Yield {view: taps} of the next samples, with all `views` made from one decoding.

        With more views, fewer samples are read at once, so that a reading is at most a few batches
        and, if the rate is known, takes at most a few seconds. This limits the loss when the pass
        is killed. The teacher runs on batches of the usual size.
        """
        most = self.images_per_reading
        if self.images_per_second:
            most = min(most, int(self.images_per_second * _SECONDS_AT_STAKE))
        at_once = most // len(views)
        num_samples = min(max(at_once, 1), self.batch_size)
        num_merged = self.batch_size // num_samples
        batches = self.pixels.batches(views, sample_ids, num_samples)
        while of_samples := list(itertools.islice(batches, len(views))):
            found: dict[int, dict[str, Tensor]] = {}
            for start in range(0, len(views), num_merged):
                found |= self._outputs_together(of_samples[start : start + num_merged], taps)
            yield found

    def _outputs_together(
        self, batches: Sequence[ViewBatch], taps: Sequence[Tap]
    ) -> dict[int, dict[str, Tensor]]:
        """Compute several views of the same samples in one forward pass; returns {view: taps}."""
        inputs = torch.cat([batch.inputs for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])
        values = self.teacher.outputs(inputs, labels, taps)
        digests = _digests(batches[0])
        sizes = [len(batch.labels) for batch in batches]
        split = {tap: torch.split(tensor, sizes) for tap, tensor in values.items()}
        return {
            batch.view: {**{tap: split[tap][i] for tap in split}, SAMPLE_DIGEST: digests}
            for i, batch in enumerate(batches)
        }

    def records(self, view: int, sample_ids: Ids, taps: Sequence[Tap]) -> dict[str, Tensor]:
        """Return the taps of samples `sample_ids` on the device: name -> (M, ...)."""
        parts = [values for _, values in self.batches([view], sample_ids, taps)]
        return {tap: torch.cat([part[tap] for part in parts]) for tap in parts[0]}

    def content(self) -> CacheContent:
        """Return the content of the new cache."""
        import PIL
        import zarr

        setup = self.setup
        train, views = setup.dataset.train, setup.config.views
        return CacheContent(
            teacher=setup.config.name,
            identity=setup.identity,
            taps=self.tap_specs(),
            num_samples=len(train),
            labels=train.labels,
            num_views=views.num_views,
            class_names=setup.dataset.class_names,
            canary=pixel_canary(train, views),
            preview=preview_views(train, views),
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
                "zarr": zarr.__version__,
                "pillow": PIL.__version__,
            },
        )


def _digests(batch: ViewBatch) -> Tensor:
    assert batch.digests is not None
    return torch.from_numpy(batch.digests.copy())
