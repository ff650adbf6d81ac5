"""Train finished runs again next to the old results, which are replaced at the end.

Does not import torch unless runs must be trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from teach_once.runtime.safe.locks import Job, WriterLock, releasing
from teach_once.train.runs.folder import repetition_of
from teach_once.train.runs.study import Run


def begin_again(runs: Sequence[Run], device: str) -> None:
    """Start to train a study's finished runs again; their results are kept until then.

    If some repetitions were started earlier, only these are continued. Raises TrainError or
    DeviceError if the runs cannot be trained, and Busy if another process uses a folder.
    """
    from teach_once.runtime.machine.devices import check_device
    from teach_once.train.runs.check_methods import check_methods

    check_methods(runs[0].study, [run.method for run in runs])
    check_device(device)
    if any(run.repetition for run in runs):
        return
    finished = [run.folder for run in runs if run.is_finished]
    with ExitStack() as locks:
        for folder in finished:
            locks.enter_context(releasing(WriterLock(folder, Job())))
        begun: list[Path] = []
        try:
            for folder in finished:
                repetition_of(folder).mkdir()
                begun.append(folder)
        except BaseException:  # all or none
            for folder in begun:
                repetition_of(folder).rmdir()
            raise


def take_place(folder: Path) -> None:
    """Replace a run by its finished repetition."""
    replaced = folder.with_name(f"{folder.name}.replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    if folder.exists():
        folder.rename(replaced)
    repetition_of(folder).rename(folder)
    if replaced.exists():
        shutil.rmtree(replaced)
