"""python -m tests.support.attacks.killed_commands [--kills 15] [--seed 0] [--only WORD]

Kills commands at random moments and checks what they leave: files under their final names must be
complete, and the same command must then give its usual result. Prints a table; the exit status is 1
after a violation. A LINE PER COMMAND: to add one, add a line to KILLED.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from teach_once.runtime.errors import UserError
from teach_once.store import TeacherCache
from teach_once.views.packed import read as packed
from tests.support.attacks.strangers.commands import COMMANDS
from tests.support.attacks.strangers.oracle import problem_of_file, problem_of_folder
from tests.support.attacks.strangers.sandbox import run_limited
from tests.support.attacks.strangers.world import copy_world, make_world, study_of
from tests.support.training.training_runs import without_times

Look = Callable[[Path, Path], str | None]


@dataclass(frozen=True)
class Killed:
    """A command to kill.

    look: compares the world after a kill with an uninterrupted one, and returns the fault, "" if
    everything is there and correct, or None if nothing is there yet. prepare: called before each
    start.
    """

    command: str
    look: Look
    prepare: Callable[[Path], object] = lambda world: None


@dataclass(frozen=True)
class Tally:
    """Numbers of kills and of kills that left something, and the problems."""

    kills: int
    left_something: int
    problems: list[str]


def kill_often(killed: Killed, template: Path, root: Path, kills: int, seed: int = 0) -> Tally:
    """Start, kill, check, start again and check, each time in a new world inside `root`."""
    chance = random.Random(f"{killed.command} {seed}")
    whole, seconds = _uninterrupted(killed, template, root / "whole")
    done, left, problems = 0, 0, []
    while done < kills:
        world = copy_world(template, root / "killed")
        killed.prepare(world)
        before, moment = _names(world), chance.uniform(0, seconds)
        if not run_limited(partial(_run, killed, world), world, seconds=moment).is_timed_out:
            continue
        done += 1
        left += _names(world) != before
        found = [killed.look(world, whole)]
        again = run_limited(partial(_run, killed, world), world)
        if again.status == 0:
            found.append(killed.look(world, whole))
        elif found != [""]:  # a complete result may be rejected: "exists"
            found.append(again.output)
        problems += [f"killed after {moment:.3f} s: {problem}" for problem in found if problem]
    return Tally(done, left, problems)


def _uninterrupted(killed: Killed, template: Path, root: Path) -> tuple[Path, float]:
    """Return the world after the command, and the command's seconds."""
    world = copy_world(template, root)
    killed.prepare(world)
    outcome = run_limited(partial(_run, killed, world), world)
    assert outcome.status == 0, outcome.output
    assert killed.look(world, world) == "", killed.look(world, world)
    return world, outcome.seconds


def _run(killed: Killed, world: Path) -> int:
    return COMMANDS[killed.command].run(world)


def _names(world: Path) -> set[str]:
    return {str(path) for path in world.rglob("*")}


# ---- checks after a kill


def _exported_cache(world: Path, whole: Path) -> str | None:
    file = world / "out.h5"
    return problem_of_file(file) if file.exists() else None


def _imported(world: Path, whole: Path) -> str | None:
    found = sorted((world / "imported").glob("t-*"))
    return _opened(found[0]) if found else None


def _opened(cache: Path) -> str | None:
    """Check that the cache is valid if it opens as one."""
    try:
        return problem_of_folder(TeacherCache.open(cache).path)
    except UserError:
        return None


def _converted(world: Path, whole: Path) -> str | None:
    return _opened(world / "converted" / "t")


def _packed(world: Path, whole: Path) -> str | None:
    file = world / "out.h5"
    if not file.exists():
        return None
    same = file.read_bytes() == (whole / "out.h5").read_bytes()
    return "" if same and len(packed.packed(file).train) else "another file than without a kill"


def _one_student(world: Path, whole: Path) -> str | None:
    """Check that weights, program and card belong to one run, or that there is no export."""
    return _export_in(world / "out", world)


def _old_or_new_student(world: Path, whole: Path) -> str | None:
    return _export_in(world / "exported", world) or ""


def _export_in(folder: Path, world: Path) -> str | None:
    if not folder.exists():
        return None
    missing = {"student.pt", "student.pt2", "student.json"} - {p.name for p in folder.iterdir()}
    if missing:
        return f"an export without {', '.join(sorted(missing))}"
    card = json.loads((folder / "student.json").read_text())
    (run,) = (world / "runs" / "s").glob(f"{card['method']}-*")
    weights = torch.load(folder / "student.pt", weights_only=True)
    program = torch.export.load(folder / "student.pt2").state_dict
    for other in (program, torch.load(run / "best.pt", weights_only=True)):
        if not all(torch.equal(other[name], tensor) for name, tensor in weights.items()):
            return "weights, program and card of different students"
    return ""


def _student(world: Path, whole: Path) -> str | None:
    """Check that a finished run equals an uninterrupted one."""
    run, true = (study_of(each).run("cd", 0) for each in (world, whole))
    if run.summary is None:
        return None
    return "" if _trained(run.folder) == _trained(true.folder) else "another student"


def _trained(folder: Path) -> object:
    weights = torch.load(folder / "last.pt", weights_only=True)
    return without_times(folder), {name: tensor.tolist() for name, tensor in weights.items()}


def _without_the_run(world: Path) -> None:
    shutil.rmtree(study_of(world).run("cd", 0).folder)


KILLED = (
    Killed("store export", _exported_cache),
    Killed("store import", _imported),
    Killed("store convert", _converted),
    Killed("pack images", _packed),
    Killed("train student cd", _student, _without_the_run),
    Killed("train export", _one_student),
    Killed("train export again", _old_or_new_student),
)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="commands with this word in their names")
    parser.add_argument("--folder", help="for temporary files")
    parser.add_argument("--world", type=Path, help="an existing world")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    print("| command | kills | left something | violations |\n| --- | --- | --- | --- |")
    status = 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        template = options.world or make_world(Path(folder) / "template")
        for killed in (each for each in KILLED if options.only in each.command):
            tally = kill_often(killed, template, Path(folder), options.kills, options.seed)
            counts = f"{tally.kills} | {tally.left_something} | {len(tally.problems)}"
            print(f"| `{killed.command}` | {counts} |", flush=True)
            print("".join(f"{problem}\n" for problem in tally.problems), end="", file=sys.stderr)
            status = 1 if tally.problems else status
    return status


if __name__ == "__main__":
    sys.exit(main())
