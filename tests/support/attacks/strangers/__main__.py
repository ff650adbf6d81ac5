"""python -m tests.support.attacks.strangers [--cases 20000] [--seed 0]
    [--only PATTERN] [--part 1/8]

Creates a world, gives changed files to the commands, and prints each violation with the name of its
case, which `--only` repeats. The exit status is 1 after a violation. `--part` runs a part of the
sample.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.support.attacks.strangers.cases import (
    Case,
    Verdict,
    run_case,
    sample,
    usual_outcomes,
)
from tests.support.attacks.strangers.sandbox import Outcome
from tests.support.attacks.strangers.world import make_world


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="*", help="cases whose names match this pattern")
    parser.add_argument("--part", default="1/1", help="2/8: the second eighth of the cases")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--folder", help="for temporary files; best on a disk in memory")
    parser.add_argument("--world", type=Path, help="an existing world")
    parser.add_argument("--show", action="store_true", help="print the output of each command")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        template = options.world or make_world(Path(folder) / "template")
        number, of = map(int, options.part.split("/"))
        chosen = sample(template, options.cases, options.seed, options.only)
        chosen = chosen[number - 1 :: of]
        names = sorted({case.command.name for case in chosen})
        usual = usual_outcomes(template, Path(folder) / "usual", names)
        return 1 if run_all(chosen, template, Path(folder), usual, options) else 0


def run_all(
    chosen: Sequence[Case],
    template: Path,
    folder: Path,
    usual: dict[str, Outcome],
    options: argparse.Namespace,
) -> int:
    """Run the cases in `jobs` processes; returns the number of cases with faults."""
    started = time.perf_counter()
    gc.freeze()  # forks then copy fewer pages
    files = [folder / f"faults-{job}" for job in range(options.jobs)]
    children = []
    for job, file in enumerate(files):
        if (child := os.fork()) == 0:
            own = chosen[job :: options.jobs]
            _run_some(own, template, folder / f"job-{job}", usual, file, options.show)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    lines = [line for file in files for line in file.read_text().splitlines()]
    counts: Counter[str] = Counter()
    for line in lines:
        counts[line.partition(" ")[0]] += 1
    seconds = time.perf_counter() - started
    assert not any(statuses), f"a worker ended early: {statuses}"
    print(
        f"{len(chosen):,} cases, {counts['refused']:,} refused, {counts['accepted']:,} accepted, "
        f"{counts['impossible']:,} impossible,  {counts['FAULT']:,} faults; {seconds:.0f} s"
    )
    return counts["FAULT"]


def _run_some(
    cases: Sequence[Case],
    template: Path,
    root: Path,
    usual: dict[str, Outcome],
    file: Path,
    is_shown: bool,
) -> None:
    """Never returns."""
    status = 1
    try:
        with file.open("w") as log:
            for number, case in enumerate(cases, start=1):
                verdict = run_case(case, template, root, usual[case.command.name])
                log.write(f"{_word(verdict)} {case.name!a}\n")
                _tell(verdict, is_shown)
                if number % 500 == 0:
                    print(f"... {number:,} of {len(cases):,}", flush=True)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _word(verdict: Verdict) -> str:
    if not verdict.is_possible:
        return "impossible"
    if verdict.faults:
        return "FAULT"
    return "accepted" if verdict.outcome.status == 0 else "refused"


def _tell(verdict: Verdict, is_shown: bool) -> None:
    if verdict.faults:
        print(f"FAULT {verdict.case.name!a}: {'; '.join(verdict.faults)!a}", flush=True)
    if is_shown:
        outcome = verdict.outcome
        print(f"{verdict.case.name}: {outcome.ending}\n{outcome.output}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
