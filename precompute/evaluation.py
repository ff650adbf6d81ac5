"""Fill the evaluation cache of a cache: the teacher's outputs of the test images, one view each.

A student's evaluation reads them to measure how close its outputs are to the teacher's, without
running a teacher. The evaluation cache is a cache of its own inside the other one, so the same code
writes, resumes, checks and copies it. Its name contains the digest of the test images: other test
images get another one. It stores logits in float32, and channel means in float16 unless the
views store them in float32, because it is small and read for metrics only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from rich.console import Console

from teach_once.nets.metrics import count_errors
from teach_once.precompute.compute.blocks import run_blocks
from teach_once.precompute.compute.setup import evaluation_setup, open_evaluated
from teach_once.precompute.compute.teacher_pass import TeacherPass
from teach_once.runtime.command.signals import StopRequest
from teach_once.runtime.safe.locks import Job
from teach_once.store import TeacherCache
from teach_once.store.write.destination import open_destination


def fill_evaluation(
    teacher_pass: TeacherPass, stop: StopRequest, console: Console
) -> Mapping[str, float]:
    """Complete the evaluation cache of a pass and return the teacher's test metrics by name.

    A complete one is only read. Without logits or labels there are no metrics. Raises CacheError,
    DatasetError or Stopped.
    """
    cache = open_evaluated(teacher_pass.setup, every_byte=True)
    return _metrics(cache or _fill(teacher_pass, stop, console))


def _fill(teacher_pass: TeacherPass, stop: StopRequest, console: Console) -> TeacherCache:
    setup = evaluation_setup(teacher_pass.setup)
    options = dataclasses.replace(teacher_pass.options, job=Job(), carried_from=None)
    evaluation = TeacherPass(setup, options, teacher=teacher_pass.teacher)
    evaluation.batch_size = teacher_pass.batch_size
    with open_destination(
        setup.path,
        evaluation.content(),
        spool_folder=evaluation.folder,
        check_every_byte=True,
    ) as writer:
        run_blocks(evaluation, writer, writer.work, stop, console)
        writer.finish({})
    return TeacherCache.open(setup.path, num_views=1, taps=setup.tap_names)


def _metrics(cache: TeacherCache) -> Mapping[str, float]:
    if "logits" not in cache.taps or cache.labels is None:
        return {}
    logits = torch.from_numpy(cache.read_view(0, ["logits"])["logits"])
    return count_errors([(logits, torch.from_numpy(cache.labels))])
