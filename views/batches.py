"""Batches of views on the training device, and the steps that are the same wherever images lie.

Images arrive as `views.augment.cut_views` leaves them; flip, erasing, mixing and normalisation
happen here, on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from configs.schema import Normalisation, ViewsConfig
from views.augment import finish, partner_shares
from views.normalise import normalise
from views.parameters import PARTNER, view_parameters
from views.splits import Checksums, Ids, Split


@dataclass(frozen=True)
class ViewBatch:
    """View `view` of some samples, on the device.

    ids, labels: (B,) int64; host_ids: the ids again, in host memory. inputs: (B, C, H, W)
    float32, normalised, in channels-last memory. checksums: (B,) uint32 in host memory, of the
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
    checksums: Checksums | None = None


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
    """A split, how its samples are augmented and normalised, and on which device."""

    split: Split
    config: ViewsConfig
    normalisation: Normalisation
    device: torch.device


class Finisher:
    """What resident and streamed pixels share: parameters per view, and the second step."""

    def __init__(self, source: AugmentedSplit, shape: tuple[int, int, int]) -> None:
        self.shape, self._source, self._augment = shape, source, source.config.augment
        self._device = source.device
        self._labels = torch.from_numpy(source.split.labels).to(source.device)
        self._parameters: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._labels)

    def _load_parameters(self, views: Sequence[int]) -> None:
        """Hold the parameters of these views, and drop those of others."""
        kept = {view: self._parameters[view] for view in views if view in self._parameters}
        missing = [view for view in views if view not in kept]
        self._parameters = {**kept, **{view: self._drawn(view) for view in missing}}

    def _drawn(self, view: int) -> Tensor:
        table = view_parameters(self._source.config, view, len(self), self.shape)
        return torch.from_numpy(table).to(self._device)

    def _partners(self, view: int, ids: Tensor) -> Tensor | None:
        if self._augment.mix is None:
            return None
        return self._parameters[view][:, PARTNER].index_select(0, ids)

    def _finished(
        self,
        view: int,
        ids: Tensor,
        host_ids: Tensor,
        images: Tensor,
        checksums: Checksums,
        partners: Tensor | None,
        others: Tensor | None,
    ) -> ViewBatch:
        rows = self._parameters[view].index_select(0, ids)
        partner_rows = None
        if partners is not None:
            partner_rows = self._parameters[view].index_select(0, partners)
        pixels = finish(images, rows, others, partner_rows, self._augment)
        inputs = normalise(pixels, self._source.normalisation)
        labels = self._labels.index_select(0, ids)
        if partners is None:
            return ViewBatch(view, ids, host_ids, inputs, labels, checksums=checksums)
        other_labels = self._labels.index_select(0, partners)
        shares = partner_shares(rows, self.shape).float()
        is_own = shares <= 0.5
        return ViewBatch(
            view,
            ids,
            host_ids,
            inputs,
            torch.where(is_own, labels, other_labels),
            torch.where(is_own, other_labels, labels),
            torch.where(is_own, shares, 1 - shares),
            checksums,
        )
