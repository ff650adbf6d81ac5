"""Executors of a study's runs: in sequence, in parallel processes, or on a Ray cluster.

Every executor trains the same runs to the same results. They differ in where runs are trained and
in what is lost if a process dies. Does not import torch.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from teach_once.configs.schema import StudentConfig, TeacherConfig
from teach_once.runtime.command.options import Compute
from teach_once.runtime.errors import Stopped, UserError
from teach_once.store.place.mirror_folder import MirrorFolder, use_mirror, used_mirror
from teach_once.store.read.mirror import Mirror, attach_again, attached
from teach_once.train.outputs.shuffle_buffer import PlacementChoice
from teach_once.train.recording.options import Recording
from teach_once.train.runs.study import Run, Study, open_study

if TYPE_CHECKING:
    from teach_once.train.engine.epoch_result import EpochResult

Ended = tuple[Run, str]  # a run, and its failure or ""


class Executor(Protocol):
    """A way to train the runs of a study."""

    @property
    def reports_epochs(self) -> bool:
        """True if epochs are reported as they end, False if groups are reported when they end."""
        ...

    def execute(self, groups: Sequence[Sequence[Run]]) -> Iterator[Ended]:
        """Train the runs, each group together; yields each run as it ends.

        A failed run does not stop the others. After a signal, runs in training save a checkpoint;
        then Stopped is raised.
        """
        ...


@dataclass(frozen=True)
class InTurn:
    """Executor that trains one group after the other in this process."""

    compute: Compute
    recording: Recording
    on_epoch: Callable[[Run, EpochResult], None] | None = None
    reports_epochs = True

    def execute(self, groups: Sequence[Sequence[Run]]) -> Iterator[Ended]:
        for group in groups:
            yield from train_group(group, self.compute, self.recording, self.on_epoch)


def train_group(
    runs: Sequence[Run],
    compute: Compute,
    recording: Recording,
    on_epoch: Callable[[Run, EpochResult], None] | None = None,
) -> Iterator[Ended]:
    """Train the runs of a group together; yields each as it ends. Raises Stopped.

    on_epoch: replaces the recording's.
    """
    from teach_once.train.sessions.joint import train_together
    from teach_once.train.sessions.student import train_run  # these load torch

    left = list(runs)
    try:
        if len(runs) == 1:
            alone = functools.partial(on_epoch, runs[0]) if on_epoch else None
            train_run(runs[0], compute, replace(recording, on_epoch=alone))
        else:
            for run, error in train_together(runs, compute, recording, on_epoch):
                left.remove(run)
                yield run, "" if error is None else _format_error(error)
        failure = ""
    except Stopped:
        raise
    except Exception as error:  # unexpected, but the other runs continue
        failure = _format_error(error)
    yield from ((run, failure) for run in left)


def _format_error(error: Exception) -> str:
    name = f"{type(error).__name__}: {error}"
    if isinstance(error, UserError):
        return name
    return f"{name}\n{''.join(traceback.format_exception(error))}"


@dataclass(frozen=True)
class StudyRecipe:
    """Settings with which another process opens a study, with as many views as this process."""

    config: StudentConfig
    teacher: TeacherConfig
    cache_path: Path
    runs_dir: Path
    placement: PlacementChoice
    mirrors: dict[Path, Mirror]
    mirror: MirrorFolder

    @classmethod
    def of(cls, study: Study) -> StudyRecipe:
        config = replace(study.config, num_views=study.num_views)
        path, mirrors = study.cache.path, attached()
        return cls(
            config, study.teacher, path, study.runs_dir, study.placement, mirrors, used_mirror()
        )

    def open(self) -> Study:
        attach_again(self.mirrors)
        use_mirror(self.mirror)
        return open_study(
            self.config,
            self.teacher,
            caches_dir=self.cache_path.parent,
            runs_dir=self.runs_dir,
            cache_path=self.cache_path,
            placement=self.placement,
        )
