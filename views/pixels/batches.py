"""Batches of views on the training device, and the steps shared by all sources of images.

Images arrive from `views.augment.augment.cut_views`. Flip, erasing, mixing and normalization are
applied here, on the device.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from teach_once.configs.schema import Normalization, ViewsConfig
from teach_once.views.augment.augment import finish, partner_shares
from teach_once.views.augment.parameters import PARTNER, view_parameters
from teach_once.views.splits import Digests, Ids, Split


def normalize(view: Tensor, normalization: Normalization) -> Tensor:
    """Normalize (B, H, W, C) uint8 to (B, C, H, W) float32, channels-last, on the same device."""
    mean, std = _moments(normalization, view.shape[2], view.device)
    rows = view.flatten(2).to(mean.dtype, copy=True)  # rows of W * C values; C alone would be slow
    rows.div_(255.0).sub_(mean).div_(std)  # in place: allocation costs more than the arithmetic
    return rows.reshape(view.shape).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=16)
def _moments(
    normalization: Normalization, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each value of a row of pixels, (width * C,) float32.

    They are cached on the device, because copying them in each step would block.
    """
    mean = torch.tensor(normalization.mean * width, dtype=torch.float32, device=device)
    return mean, torch.tensor(normalization.std * width, dtype=torch.float32, device=device)


def equal_parts(num_samples: int, num_parts: int) -> list[int]:
    """Return sizes that are as equal as possible, larger ones first; some may be 0."""
    size, larger = divmod(num_samples, num_parts)
    return [size + (part < larger) for part in range(num_parts)]


@dataclass(frozen=True)
class ViewBatch:
    """View `view` of some samples, on the device.

    ids, labels: (B,) int64; host_ids: the ids in host memory. inputs: (B, C, H, W) float32,
    normalized, channels-last. digests: (B, 16) uint8 in host memory, of the samples' source bytes.
    `labels` are -1 without labels. If views are mixed, `labels` belong to the larger part,
    `other_labels` (B,) to the smaller part, and `other_shares` (B,) float32 in [0, 1/2] is the
    fraction of the smaller part.
    """

    view: int
    ids: Tensor
    host_ids: Tensor
    inputs: Tensor
    labels: Tensor
    other_labels: Tensor | None = None
    other_shares: Tensor | None = None
    digests: Digests | None = None

    def split(self, num_parts: int) -> list[ViewBatch]:
        """Split in order into parts of nearly equal size, at most one per sample."""
        if num_parts == 1:
            return [self]
        return self.cut(equal_parts(len(self.ids), num_parts))

    def cut(self, sizes: Sequence[int]) -> list[ViewBatch]:
        """Split into parts of the given sizes, in order, without empty ones."""
        ends = [0, *itertools.accumulate(sizes)]
        pairs = itertools.pairwise(ends)
        return [self._rows(slice(start, end)) for start, end in pairs if start < end]

    def _rows(self, rows: slice) -> ViewBatch:
        per_sample = {
            each.name: getattr(self, each.name)[rows]
            for each in dataclasses.fields(self)
            if each.name != "view" and getattr(self, each.name) is not None
        }
        return dataclasses.replace(self, **per_sample)


class Pixels(Protocol):
    """The views of one split."""

    shape: tuple[int, int, int]  # height, width and channels of a view
    where: str  # description of the source of the images
    is_streamed: bool  # True if every call of `batches` reads and decodes images

    def __len__(self) -> int: ...

    def batches(self, views: Sequence[int], ids: Ids, batch_size: int) -> Iterator[ViewBatch]:
        """Yield batches of `views` of samples `ids`, in order.

        All views of a batch of samples are consecutive, so that each image is read once.
        """
        ...


@dataclass(frozen=True)
class AugmentedSplit:
    """A split with its augmentation, normalization and device."""

    split: Split
    config: ViewsConfig
    normalization: Normalization
    device: torch.device


@dataclass(frozen=True)
class Drawn:
    """The parameters of one view of some samples.

    host_ids, ids: (M,) int64 in host memory and on the device. rows: (M, 3) or (M, 13) of
    `view_parameters`, on the device. partners: the same for the mixing partners, if views are
    mixed.
    """

    host_ids: Ids
    ids: Tensor
    rows: Tensor
    partners: Drawn | None = None

    def part(self, start: int, stop: int) -> Drawn:
        """Return the samples from `start` to `stop` (exclusive)."""
        some = slice(start, stop)
        partners = self.partners and self.partners.part(start, stop)
        return Drawn(self.host_ids[some], self.ids[some], self.rows[some], partners)


class Finisher:
    """Base of resident and streamed pixels: parameters of views, and the second step."""

    def __init__(self, source: AugmentedSplit, shape: tuple[int, int, int]) -> None:
        self.shape, self._source, self._augment = shape, source, source.config.augment
        self._device = source.device
        self._labels = torch.from_numpy(source.split.label_values).to(source.device)

    def __len__(self) -> int:
        return len(self._labels)

    def _drawn(self, view: int, ids: Ids) -> Drawn:
        """Draw the parameters of a view; time and memory grow with `ids`, not with the split."""
        rows = self._rows(view, ids)
        drawn = Drawn(ids, self._on_device(ids), self._on_device(rows))
        if self._augment.mix is None:
            return drawn
        partners = rows[:, PARTNER].copy()
        theirs = self._on_device(self._rows(view, partners))
        return replace(drawn, partners=Drawn(partners, self._on_device(partners), theirs))

    def _rows(self, view: int, ids: Ids) -> Ids:
        return view_parameters(self._source.config, view, len(self), self.shape, ids=ids)

    def _on_device(self, values: Ids) -> Tensor:
        """Copy to the device; on a GPU from pinned memory, which does not block."""
        on_host = torch.from_numpy(values)
        if self._device.type == "cuda":
            on_host = on_host.pin_memory()
        return on_host.to(self._device, non_blocking=True)

    def _finished(
        self, view: int, images: Tensor, digests: Digests, drawn: Drawn, others: Tensor | None
    ) -> ViewBatch:
        """Apply the second step to images of the first; others: partners, if views are mixed."""
        partners = drawn.partners
        partner_rows = None if partners is None else partners.rows
        pixels = finish(images, drawn.rows, others, partner_rows, self._augment)
        inputs = normalize(pixels, self._source.normalization)
        labels = self._labels.index_select(0, drawn.ids)
        host_ids = torch.from_numpy(drawn.host_ids)
        if partners is None:
            return ViewBatch(view, drawn.ids, host_ids, inputs, labels, digests=digests)
        other_labels = self._labels.index_select(0, partners.ids)
        shares = partner_shares(drawn.rows, self.shape).float()
        is_own = shares <= 0.5
        return ViewBatch(
            view,
            drawn.ids,
            host_ids,
            inputs,
            torch.where(is_own, labels, other_labels),
            torch.where(is_own, other_labels, labels),
            torch.where(is_own, shares, 1 - shares),
            digests,
        )
