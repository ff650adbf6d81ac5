"""Find the probe of a run: its images and its stored result. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from teach_once.train.runs.files import read_probe
from teach_once.train.runs.study import Run
from teach_once.views.datasets import Dataset
from teach_once.views.probe import load_probe


@dataclass(frozen=True)
class RunProbe:
    """The labeled images of a run's probe. train, test: each as `train` of a dataset."""

    run: Run
    train: Dataset
    test: Dataset

    @property
    def images(self) -> dict[str, str]:
        """The digests of both parts."""
        return {"train_digest": self.train.digest, "test_digest": self.test.digest}

    @property
    def result(self) -> Mapping[str, Any] | None:
        """The stored result; None if there is none of these images. Raises BadFile."""
        found = read_probe(self.run.folder, self.run.sha256)
        is_of_these = found is not None and self.images.items() <= found.items()
        return found if is_of_these else None


def probe_of(run: Run) -> RunProbe | None:
    """Return the run's probe; None if the teacher's file has none. Raises DatasetError."""
    study = run.study
    parts = load_probe(study.teacher, study.dataset, study.cache.path.parent)
    return None if parts is None else RunProbe(run, *parts)
