"""The contract of `train.studies.executor.Executor`, called by a test of each executor."""

from __future__ import annotations

from teach_once.train.runs.study import Study
from teach_once.train.studies.executor import Executor

FAILING_METHOD = "methods.bad=[{loss: ce, weight: 1e38}]"  # its loss is not finite after a step


def check_each_run_ends_once_and_a_failed_one_stops_no_other(
    executor: Executor, study: Study
) -> None:
    """Check an executor; study: its config has FAILING_METHOD, and no run is finished."""
    bad, good = study.run("bad", 0), study.run("ce", 0)
    ended = list(executor.execute([[bad], [good]]))
    assert sorted(run.method for run, _ in ended) == ["bad", "ce"]
    failures = {run.method: failure for run, failure in ended}
    assert failures["ce"] == ""
    assert failures["bad"].startswith("Diverged: the loss became")
    assert "Traceback" not in failures["bad"]
    assert good.is_finished
    assert good.summary is not None
    assert not bad.is_finished
    assert (bad.study, good.study) == (study, study)  # its own runs, not those of another process
