"""A teacher ensemble: combine the outputs of several teachers, cached or live.

Logits are the logarithm of the weighted mean of the teachers' probabilities, so that every loss on
logits applies; `correct` is computed from that mean. Stages of the second teacher are numbered
after those of the first, and so on. Means are scaled by the square root of the teacher's weight,
for teacher and student, so that a sum of squared differences gives each teacher its weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from teach_once.configs.schema import Normalization
from teach_once.nets.teacher.taps import in_order
from teach_once.train.method.ensemble_taps import number_stages
from teach_once.train.outputs.teacher_outputs import Ids, TeacherOutputs
from teach_once.views.pixels.batches import ViewBatch


class TeacherEnsemble(TeacherOutputs):
    """The combined outputs of several teachers."""

    def __init__(
        self,
        sources: Sequence[TeacherOutputs],
        weights: Sequence[float],
        num_stages: Sequence[int],
        normalizations: Sequence[Normalization] = (),
    ) -> None:
        """Combine sources with one weight and number of stages each.

        normalizations: of each teacher, if networks run on the student's inputs, which use the
        first teacher's normalization; empty if outputs are read from caches.
        """
        self._sources, self._weights = sources, weights
        self._stages = number_stages(num_stages)
        self._normalizations = normalizations
        self._rescalings: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}
        self.where = "; ".join(dict.fromkeys(source.where for source in sources))

    def start_epoch(self, view: int, ids: Ids) -> None:
        for source in self._sources:
            source.start_epoch(view, ids)

    def prefetch(self, view: int, ids: Ids) -> None:
        for source in self._sources:
            source.prefetch(view, ids)

    def end_epoch(self) -> None:
        for source in self._sources:
            source.end_epoch()

    def close(self) -> None:
        for source in self._sources:
            source.close()

    def rows(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Return float32 logits, uint8 `correct`, and the stages of all teachers."""
        of_each = [
            source.rows(self._normalize(batch, number))
            for number, source in enumerate(self._sources)
        ]
        found: dict[str, Tensor] = {}
        if "logits" in of_each[0]:
            found["logits"] = mean_log_probabilities([o["logits"] for o in of_each], self._weights)
            found["correct"] = (found["logits"].argmax(dim=1) == batch.labels).to(torch.uint8)
        for outputs, names, weight in zip(of_each, self._stages, self._weights, strict=True):
            for stage in in_order(outputs, "stage"):
                found[names[stage]] = outputs[stage].float() * math.sqrt(weight)
        return found

    def _normalize(self, batch: ViewBatch, number: int) -> ViewBatch:
        """Return the batch in the normalization of teacher `number`."""
        if not self._normalizations or self._normalizations[number] == self._normalizations[0]:
            return batch
        mean, std, their_mean, their_std = self._rescaling(number, batch.inputs.device)
        return replace(batch, inputs=(batch.inputs * std + mean - their_mean) / their_std)

    def _rescaling(self, number: int, device: torch.device) -> tuple[Tensor, ...]:
        """Return mean and std of the first teacher and of teacher `number`, each (1, C, 1, 1).

        They are copied to the device once, because a copy in each step would block.
        """
        if (number, device) not in self._rescalings:
            ours, theirs = self._normalizations[0], self._normalizations[number]
            self._rescalings[number, device] = tuple(
                torch.tensor(values, device=device).reshape(1, -1, 1, 1)
                for values in (ours.mean, ours.std, theirs.mean, theirs.std)
            )
        return self._rescalings[number, device]


def mean_log_probabilities(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the log of the weighted mean of softmax(logits): each (B, K) -> (B, K) float32."""
    total = sum(weights)
    weighted = [
        F.log_softmax(each.float(), dim=1) + math.log(weight / total)
        for each, weight in zip(logits, weights, strict=True)
    ]
    return torch.logsumexp(torch.stack(weighted), dim=0)
