"""Batches of views on the training device, and the steps that are the same wherever images lie.

Whoever makes them hands over what `views.augment.cut_views` gives; flip, erasing, mixing and
normalisation happen here, on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from configs.schema import Normalisation, ViewsConfig
from views.augment import PARTNER, finish, normalise, partner_shares, view_parameters
from views.splits import Checksums, Ids, Split


@dataclass(frozen=True)
class ViewBatch:
    """One view of some samples, on the device.

    view: its number. ids, labels: (B,) int64; host_ids: the ids again, in host memory.
    inputs: (B, C, H, W) float32, normalised, in channels-last memory. checksums: (B,) uint32 in
    host memory, of the bytes that the samples were read from.
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
    where: str  # images come from, in words

    def __len__(self) -> int: ...

    def batches(self, numbers: Sequence[int], ids: Ids, batch_size: int) -> Iterator[ViewBatch]:
        """Views `numbers` of the samples `ids`, in their order.

        All views of a batch of samples come one after the other, so an image is read once.
        """
        ...


@dataclass(frozen=True)
class ShownSplit:
    """A split and how its samples are to be shown on a device."""

    split: Split
    views: ViewsConfig
    normalisation: Normalisation
    device: torch.device


class Finisher:
    """What resident and streamed pixels share: parameters per view, and the last step."""

    def __init__(self, shown: ShownSplit, shape: tuple[int, int, int]) -> None:
        self.shape, self._shown, self._augment = shape, shown, shown.views.augment
        self._device = shown.device
        self._labels = torch.from_numpy(shown.split.labels).to(shown.device)
        self._parameters: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._labels)

    def _keep_parameters(self, numbers: Sequence[int]) -> None:
        """Have the parameters of these views at hand, and forget those of others."""
        kept = {view: self._parameters[view] for view in numbers if view in self._parameters}
        missing = [view for view in numbers if view not in kept]
        self._parameters = {**kept, **{view: self._drawn(view) for view in missing}}

    def _drawn(self, view: int) -> Tensor:
        table = view_parameters(self._shown.views, view, len(self), self.shape)
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
        inputs, labels = (
            normalise(pixels, self._shown.normalisation),
            self._labels.index_select(0, ids),
        )
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
