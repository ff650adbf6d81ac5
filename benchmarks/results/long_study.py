"""The runs behind the results page: `study.yaml` lists the caches, and groups of runs by part.

Hours on a small machine. The same command resumes; a group is kept as soon as all its runs are
finished. Every step is a command of the project, which is printed and kept with the results.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import yaml

from benchmarks.results.kept import ResultsError, keep
from teach_once.__main__ import main as teach_once

STUDY = Path(__file__).with_name("study.yaml")


@dataclass(frozen=True)
class Group:
    """Runs that are kept under one label.

    runs: a pattern that matches their folders. commands: the commands that train them. cache: the
    name of the cache whose record size is kept; None if the teacher runs in the loop. suffix: added
    to the name of the kept file.
    """

    label: str
    runs: str
    commands: Sequence[str]
    cache: str | None = None
    suffix: str = ""


class LongStudy:
    """A file of variables, caches and parts. jobs: runs trained in parallel."""

    def __init__(self, file: Path, jobs: int, device: str) -> None:
        content = yaml.safe_load(file.read_text())
        self.parts: dict[str, list[Group]] = {
            part: [Group(**group) for group in groups] for part, groups in content["parts"].items()
        }
        self._caches: dict[str, dict[str, str]] = content["caches"]
        self._jobs = jobs
        self._values: dict[str, str] = content["variables"] | {"jobs": str(jobs), "device": device}

    def train(self, part: str) -> None:
        """Train the runs of each group of a part and keep them."""
        for group in self.parts[part]:
            commands = [self._run(command) for command in group.commands]
            runs = sorted(Path().glob(self._expand(group.runs)))
            if not runs:
                raise ResultsError(
                    f"{group.label}: the commands trained no run that matches {group.runs}"
                )
            file = keep(
                self._values["student"] + group.suffix,
                runs[0].parent,
                [run.name for run in runs],
                "; ".join(commands),
                jobs=self._jobs if group.cache else 1,
                label=group.label,
                cache=Path(self._value(group.cache)) if group.cache else None,
            )
            print(f"{file}: {group.label}", flush=True)

    def _expand(self, text: str) -> str:
        """Replace each $NAME by its value, until none is left."""
        while names := Template(text).get_identifiers():
            text = Template(text).substitute({name: self._value(name) for name in names})
        return text

    def _value(self, name: str) -> str:
        """Look up a variable, or make, resume or find a cache and return its path."""
        if name not in self._values:
            if name not in self._caches:
                raise ResultsError(f"${name} is neither a variable nor a cache of the study")
            self._run(self._caches[name]["command"])
            self._values[name] = str(only_path(self._expand(self._caches[name]["path"])))
        return self._values[name]

    def _run(self, command: str) -> str:
        """Run a program of the project in this process; end with its status if it fails."""
        words = shlex.split(self._expand(command))
        text = shlex.join(["python", "-m", *words])
        print(f"$ {text}", flush=True)
        if status := teach_once(words):
            sys.exit(status)
        return text


def only_path(pattern: str) -> Path:
    found = sorted(Path().glob(pattern))
    if len(found) != 1:
        raise ResultsError(f"{pattern}: {len(found)} caches; expected one")
    return found[0]
