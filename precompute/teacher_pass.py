"""The teacher over the views of its dataset: the records of any samples, computed again.

Everything random about a view comes from `views`, so neither batch size, nor order, nor how often a
pass was interrupted changes what is stored, beyond the float rounding of the teacher.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nets.error_rates import count_errors
from nets.taps import Tap
from nets.teacher import Teacher, load_teacher_network
from precompute.setup import Setup
from runtime.locks import Job
from store import CacheContent, TapSpec, TeacherCache
from store.layout import SAMPLE_CRC
from views.canary import pixel_canary
from views.pixels import calibration_batches, evaluation_pixels, open_pixels
from views.preview import preview_views

_BATCH_SIZE = 256
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class PassOptions:
    """What decides the speed of a pass and none of its bytes."""

    device: torch.device
    batch_size: int | None = None  # images per forward pass; default: what a trial finds fastest
    block_rows: int | None = None
    num_workers: int | None = None  # that read images, unless all images are on the device
    check_every_byte: bool = True
    job: Job = field(default_factory=Job)
    carried_from: TeacherCache | None = None  # of another state of the dataset


class TeacherPass:
    """A teacher and the views of its dataset on one device."""

    def __init__(self, setup: Setup, options: PassOptions) -> None:
        self.setup, self.options = setup, options
        self.batch_size = options.batch_size or _BATCH_SIZE
        config, dataset, device = setup.config, setup.dataset, options.device
        self._normalisation = config.dataset.normalisation
        self.pixels = open_pixels(
            dataset.train, config.views, self._normalisation, device, options.num_workers
        )
        self.teacher: Teacher = load_teacher_network(
            config.teacher,
            setup.stages,
            num_classes=dataset.num_classes,
            in_channels=self.pixels.shape[2],
            device=device,
            calibration=calibration_batches(self.pixels),
        )

    def tap_specs(self) -> dict[str, TapSpec]:
        """Tap name -> shape and how it is stored."""
        taps = self.setup.taps
        shapes = self.teacher.tap_shapes(self.pixels.shape, taps)
        return {tap.name: self.setup.tap_spec(tap, shapes[tap.name]) for tap in taps}

    def batches(
        self, views: Sequence[int], sample_ids: Ids, taps: Sequence[Tap]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Pairs of a view and the taps of a batch, name -> (B, ...) on the device.

        The samples' checksums come with them as "sample_crc32c", (B,) int64 on the host. All
        `views` of a batch of samples come one after the other.
        """
        for batch in self.pixels.batches(views, sample_ids, self.batch_size):
            values = self.teacher.outputs(batch.inputs, batch.labels, taps)
            assert batch.checksums is not None
            checksums = torch.from_numpy(batch.checksums.astype(np.int64))
            yield batch.view, {**values, SAMPLE_CRC: checksums}

    def records(self, view: int, sample_ids: Ids, taps: Sequence[Tap]) -> dict[str, Tensor]:
        """The taps of some samples, on the device: name -> (M, ...)."""
        parts = [values for _, values in self.batches([view], sample_ids, taps)]
        return {tap: torch.cat([part[tap] for part in parts]) for tap in parts[0]}

    def test_errors(self) -> dict[str, float]:
        """The teacher's error (%) on the test split."""
        test = evaluation_pixels(
            self.setup.dataset.test,
            self.setup.config.views,
            self._normalisation,
            self.options.device,
            self.options.num_workers,
        )
        batches = test.batches([0], np.arange(len(test)), self.batch_size)
        logits = [Tap("logits")]
        errors = count_errors(
            (self.teacher.outputs(batch.inputs, batch.labels, logits)["logits"], batch.labels)
            for batch in batches
        )
        return {"test_top1_error": errors.top1, "test_top5_error": errors.top5}

    def content(self) -> CacheContent:
        """What the cache is to hold."""
        import PIL
        import zarr

        setup = self.setup
        train, views = setup.dataset.train, setup.config.views
        return CacheContent(
            teacher=setup.config.name,
            identity=setup.identity,
            taps=self.tap_specs(),
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
            sample_crc32c=True,
        )
