"""Batches of views on the training device, and the steps that are the same wherever images lie.

Images arrive as `views.augment.augment.cut_views` leaves them; flip, erasing, mixing and
normalization happen here, on the device.
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
    """(B, H, W, C) uint8 -> (B, C, H, W) float32 in channels-last memory, on the same device."""
    mean, std = _moments(normalization, view.shape[2], view.device)
    rows = view.flatten(2).to(mean.dtype, copy=True)  # of W * C values: three would be too few
    rows.div_(255.0).sub_(mean).div_(std)  # in place: new memory costs more than the arithmetic
    return rows.reshape(view.shape).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=16)
def _moments(
    normalization: Normalization, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each value of a row of pixels, (width * C,) float32.

    Kept on the device: a copy per step would make it wait.
    """
    mean = torch.tensor(normalization.mean * width, dtype=torch.float32, device=device)
    return mean, torch.tensor(normalization.std * width, dtype=torch.float32, device=device)


def equal_parts(num_samples: int, num_parts: int) -> list[int]:
    """Sizes as equal as possible, the larger ones first; some are 0 where samples are fewer."""
    size, larger = divmod(num_samples, num_parts)
    return [size + (part < larger) for part in range(num_parts)]


@dataclass(frozen=True)
class ViewBatch:
    """View `view` of some samples, on the device.

    ids, labels: (B,) int64; host_ids: the ids again, in host memory. inputs: (B, C, H, W)
    float32, normalized, in channels-last memory. digests: (B, 16) uint8 in host memory, of the
    bytes that the samples were read from.
    Where views are mixed, `labels` are those of the larger share, `other_labels` (B,) those of the
    smaller, and `other_shares` (B,) float32 in [0, 1/2] how large that is.
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
        """As equal parts as possible, in order; fewer where there are fewer samples."""
        if num_parts == 1:
            return [self]
        return self.cut(equal_parts(len(self.ids), num_parts))

    def cut(self, sizes: Sequence[int]) -> list[ViewBatch]:
        """Parts of these sizes, in order, but for empty ones."""
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

    shape: tuple[int, int, int]  # of a view: height, width, channels
    where: str  # the images come from, in words
    is_streamed: bool  # whether images are read and decoded anew for every call of `batches`

    def __len__(self) -> int: ...

    def batches(self, views: Sequence[int], ids: Ids, batch_size: int) -> Iterator[ViewBatch]:
        """`views` of the samples `ids`, in their order.

        All views of a batch of samples come one after the other, so an image is read once.
        """
        ...


@dataclass(frozen=True)
class AugmentedSplit:
    """A split, how its samples are augmented and normalized, and on which device."""

    split: Split
    config: ViewsConfig
    normalization: Normalization
    device: torch.device


@dataclass(frozen=True)
class Drawn:
    """How one view of some samples is finished.

    host_ids, ids: (M,) int64 in host memory and on the device. rows: (M, 3) or (M, 13) of
    `view_parameters`, on the device. partners: the same of who is mixed in, where views are mixed.
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
    """What resident and streamed pixels share: parameters per view, and the second step."""

    def __init__(self, source: AugmentedSplit, shape: tuple[int, int, int]) -> None:
        self.shape, self._source, self._augment = shape, source, source.config.augment
        self._device = source.device
        self._labels = torch.from_numpy(source.split.labels).to(source.device)

    def __len__(self) -> int:
        return len(self._labels)

    def _drawn(self, view: int, ids: Ids) -> Drawn:
        """Takes time and memory by the number of `ids`, not by that of the split's samples."""
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
        """On a GPU without waiting for what it is doing, which pageable memory would."""
        on_host = torch.from_numpy(values)
        if self._device.type == "cuda":
            on_host = on_host.pin_memory()
        return on_host.to(self._device, non_blocking=True)

    def _finished(
        self, view: int, images: Tensor, digests: Digests, drawn: Drawn, others: Tensor | None
    ) -> ViewBatch:
        """images: after the first step. others: the same of the partners, where views are mixed."""
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
