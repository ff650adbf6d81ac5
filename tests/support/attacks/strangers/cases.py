"""All (document, change, command), a balanced sample of them, and the run of one case."""

from __future__ import annotations

import importlib
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import combinations
from pathlib import Path

from tests.support.attacks.strangers.changes.change import Change
from tests.support.attacks.strangers.changes.documents import DOCUMENTS, Document
from tests.support.attacks.strangers.commands import COMMANDS, Command
from tests.support.attacks.strangers.judge import (
    faults_in_folder,
    faults_of_ending,
    faults_outside,
    snapshot,
)
from tests.support.attacks.strangers.promises import Answer
from tests.support.attacks.strangers.sandbox import Outcome, run_limited
from tests.support.attacks.strangers.world import copy_world

Group = tuple[str, str, str]  # document, kind of change, command; sampled in equal parts


@dataclass(frozen=True)
class Case:
    """One change of one document, and the command that reads it."""

    document: Document
    change: Change
    command: Command

    @property
    def name(self) -> str:
        return f"{self.document.name}: {self.change.name} | {self.command.name}"


@dataclass(frozen=True)
class Verdict:
    """The result of a case. faults: violated guarantees of the command."""

    case: Case
    outcome: Outcome
    faults: tuple[str, ...]
    is_possible: bool = True  # False if the change is impossible for the document


def all_cases(template: Path, only: str = "*") -> Iterator[Case]:
    """Yield all cases whose names match the pattern `only`."""
    for document, change, names in _changes(template, only):
        yield from (Case(document, change, COMMANDS[name]) for name in names)


def _changes(template: Path, only: str) -> Iterator[tuple[Document, Change, Sequence[str]]]:
    """Yield each change of each document with the commands that read it."""
    for document in DOCUMENTS:
        for change in document.changes(document.path(template)):
            names: Sequence[str] = document.commands
            if only != "*":
                cases = {name: Case(document, change, COMMANDS[name]) for name in names}
                names = [name for name, case in cases.items() if fnmatchcase(case.name, only)]
            yield document, change, names


def sample(template: Path, count: int, seed: int, only: str = "*") -> list[Case]:
    """Return `count` cases, determined by the seed and spread evenly over their groups.

    The changes are generated twice, first to count them, because all cases would take a gigabyte.
    """
    sizes: Counter[Group] = Counter()
    for document, change, names in _changes(template, only):
        for name in names:
            sizes[document.name, change.kind, name] += 1
    chance = random.Random(seed)
    share = _shares(sizes, count, chance)
    chosen = {
        group: set(chance.sample(range(sizes[group]), number)) for group, number in share.items()
    }
    seen: Counter[Group] = Counter()
    found = []
    for document, change, names in _changes(template, only):
        for name in names:
            group = document.name, change.kind, name
            if group in chosen:
                if seen[group] in chosen[group]:
                    found.append(Case(document, change, COMMANDS[name]))
                seen[group] += 1
    chance.shuffle(found)
    return found


def _shares(sizes: Counter[Group], count: int, chance: random.Random) -> Counter[Group]:
    """Return the number of cases per group, as equal as the groups' sizes allow.

    With fewer cases than groups, those groups are preferred that together have the most documents,
    kinds of change and commands, and the most pairs of these.
    """
    share: Counter[Group] = Counter()
    waiting = list(sizes)
    while waiting and count:
        chance.shuffle(waiting)
        if count < len(waiting):
            waiting = _most_pairs(waiting, count)
        for group in waiting[:count]:
            share[group] += 1
        count -= min(count, len(waiting))
        waiting = [group for group in waiting if share[group] < sizes[group]]
    return share


def _most_pairs(groups: Sequence[Group], count: int) -> list[Group]:
    """Return `count` of the groups, each adding most to the groups before it."""
    left = {
        group: {*combinations(enumerate(group), 1), *combinations(enumerate(group), 2)}
        for group in groups
    }
    chosen = []
    for _ in range(count):
        best = max(left, key=lambda group: len(left[group]))
        chosen.append(best)
        added = left.pop(best)
        for pairs in left.values():
            pairs -= added
    return chosen


def usual_outcomes(template: Path, root: Path, commands: Sequence[str]) -> dict[str, Outcome]:
    """Return each command's outcome on the unchanged world. Raises AssertionError if one fails.

    It shows that a later error is caused by the change. Modules that the commands import are
    imported here too, so that forks need not import them again.
    """
    found = {}
    for name in commands:
        world = copy_world(template, root)
        modules = root.with_name("modules")
        outcome = run_limited(partial(_run_and_list, COMMANDS[name], world, modules), world)
        faults = list(faults_of_ending(outcome))
        assert outcome.status == 0, f"{name}: {outcome.ending}\n{outcome.output}"
        answer = Answer(world, template, outcome, outcome, False)
        faults += [problem] if (problem := COMMANDS[name].promise(answer)) else []
        assert not faults, f"{name}: {faults}\n{outcome.output}"
        found[name] = outcome
        for module in modules.read_text().split():
            with suppress(Exception):
                importlib.import_module(module)
    return found


def _run_and_list(command: Command, world: Path, modules: Path) -> int:
    status = command.run(world)
    modules.write_text("\n".join(name for name in sys.modules if "__main__" not in name))
    return status


def run_case(case: Case, template: Path, root: Path, usual: Outcome) -> Verdict:
    """Run a case in a new copy of the world inside `root`."""
    world = copy_world(template, root)
    outside = world.parent / "outside"
    path = case.document.path(world)
    try:
        case.change.apply(path)
    except Exception:
        return Verdict(case, usual, (), is_possible=False)
    is_followed = case.document.is_typed and path.is_symlink()
    before, around = snapshot(world, False), snapshot(outside, True)
    outcome = run_limited(lambda: case.command.run(world), world)
    faults = [
        *faults_of_ending(outcome),
        *faults_in_folder(world, before, snapshot(world, False), case.command.writes),
        *([] if is_followed else faults_outside(around, snapshot(outside, True))),
    ]
    beside = {path.name for path in world.parent.iterdir()} - {"world", "outside"}
    faults += [f"makes {name!r} outside of the folder" for name in sorted(beside)]
    if outcome.status == 0 and not faults:
        answer = Answer(world, template, outcome, usual, case.change.is_sealed)
        faults += _broken_promise(case, answer)
    return Verdict(case, outcome, tuple(faults))


def _broken_promise(case: Case, answer: Answer) -> list[str]:
    try:
        problem = case.command.promise(answer)
    except Exception as error:
        problem = f"ended with 0, but left nothing to look at: {type(error).__name__} {error}"
    return [problem] if problem else []
