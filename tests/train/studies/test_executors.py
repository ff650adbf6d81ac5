"""The executors of this machine; the Ray tasks are tested in test_cluster_study."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from teach_once.runtime.command.options import Compute
from teach_once.train.recording.options import Recording
from teach_once.train.runs.study import Study
from teach_once.train.studies.executor import Executor, InTurn
from teach_once.train.studies.processes import Processes
from tests.support.training.executor_contract import (
    FAILING_METHOD,
    check_each_run_ends_once_and_a_failed_one_stops_no_other,
)

COMPUTE = Compute("cpu")


@pytest.mark.parametrize(
    "executor",
    [InTurn(COMPUTE, Recording()), Processes(COMPUTE, Recording(), jobs=2)],
    ids=["in turn", "processes"],
)
def test_executor_with_a_run_that_fails_ends_each_run_once_and_trains_the_others(
    executor: Executor, make_study: Callable[..., Study], forks: None
) -> None:
    study = make_study(student=[FAILING_METHOD])
    check_each_run_ends_once_and_a_failed_one_stops_no_other(executor, study)
