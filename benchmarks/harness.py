"""The harness of all targets: interleaved rounds, verdicts, and a section of the benchmarks page.

Each round calls every row once, so that a slow moment of a shared machine affects all rows
alike. A target is a module of `benchmarks.targets` with a TITLE and a function
`measure`, whose parameters are the options of its command and which returns `Findings`.
"""

from __future__ import annotations

import inspect
import os
import platform
import shlex
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from json import dumps
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy
import torch
import typer
from scipy.stats import trim_mean

from teach_once.runtime.command.frame import new_app

DOCS = Path("docs/development/benchmarks.md")
ROUNDS = "± half the distance between the quartiles"
CPU = torch.device("cpu")
Shown = TypeVar("Shown")


@dataclass(frozen=True)
class Timing:
    """Seconds of one row over all rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median

    @property
    def mean(self) -> float:
        """The mean without the slowest and the fastest tenth, which other programs cause."""
        return float(trim_mean(self.seconds, 0.1))

    def ratio_to(self, other: Timing) -> float:
        """Return the median over rounds of this row's seconds divided by the other row's."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(own / reference for own, reference in pairs)

    def format_ms(self, digits: int = 1, calls: int = 1) -> str:
        """Format the milliseconds of each of `calls` calls."""
        return f"{1e3 * self.median / calls:,.{digits}f} ms ± {self.spread:.0%}"

    def format_rate(self, amount: float, digits: int = 0) -> str:
        """Format `amount` per second."""
        return f"{amount / self.median:,.{digits}f} ± {self.spread:.0%}"


@dataclass(frozen=True)
class Verdict:
    """A measured value and the bound it should meet; without a bound it is only reported."""

    what: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    def as_plain(self) -> dict[str, str | float]:
        target, is_met = "", None
        if self.at_most is not None:
            target, is_met = f"≤ {self.at_most:g}", self.value <= self.at_most
        elif self.at_least is not None:
            target, is_met = f"≥ {self.at_least:g}", self.value >= self.at_least
        mark = {None: "", True: "✓", False: "✗ missed"}[is_met]
        return {"what": self.what, "value": self.value, "target": target, "mark": mark}

    @property
    def mark(self) -> str:
        return str(self.as_plain()["mark"])


@dataclass(frozen=True)
class Findings:
    """The results of a target.

    text: follows the command and the machine in the section. content: JSON content; by default the
    verdicts. title: section title; by default the module's. Findings with an empty title are only
    printed. cleanup: called after the results are written.
    """

    text: str
    verdicts: Sequence[Verdict] = ()
    content: object = None
    title: str | None = None
    cleanup: Callable[[], object] = dict


def interleaved(rows: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Call every row once to warm up, then time `rounds` rounds of all rows; name -> timing.

    A row that times itself returns its seconds as a float.
    """
    for run in rows.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, run in rows.items():
            started = time.perf_counter()
            own = run()
            elapsed = time.perf_counter() - started
            seconds[name].append(own if isinstance(own, float) else elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def timed(
    run: Callable[[], object], device: torch.device = CPU, barrier: Callable[[], object] = dict
) -> Callable[[], float]:
    """Turn `run` into a row that returns its seconds, on a GPU until the GPU is done.

    barrier: called before and after, to wait for other processes.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        barrier()

    def call() -> float:
        wait()
        started = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - started

    return call


def drain(*opens: Callable[[], Iterable[object]]) -> Callable[[], None]:
    """Build a row that exhausts the iterables of these functions, one after the other."""

    def run() -> None:
        for each in opens:
            deque(each(), maxlen=0)

    return run


def machine() -> str:
    """Return processor, cores and versions, for the line above a table."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    versions = f"Python {platform.python_version()}, numpy {numpy.__version__}"
    return f"{model}, {os.cpu_count()} cores, {versions}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def table_of(
    corner: str,
    rows: Mapping[str, str],
    columns: Mapping[str, Mapping[str, Shown]],
    show: Callable[[Shown], str],
) -> str:
    """Build a Markdown table; a missing value is blank.

    rows: key -> label. columns: title -> {key -> value}.
    """
    lines = [
        [label, *(show(column[key]) if key in column else "" for column in columns.values())]
        for key, label in rows.items()
    ]
    return markdown([corner, *columns], lines)


def verdict_table(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """Build the table of verdicts, each in the form of `Verdict.as_plain`."""
    rows = [[v["what"], f"{v['value']:,.3g}", v["target"], v["mark"]] for v in verdicts]
    return markdown(["what", "measured", "target", ""], rows)


def write_section(file: Path, title: str, body: str) -> None:
    """Replace the section `## title` of a Markdown file, or append it."""
    text = file.read_text() if file.is_file() else "# Benchmarks\n"
    head, found, rest = text.partition(f"\n## {title}\n")
    following = rest.find("\n## ")
    tail = rest[following:] if found and following >= 0 else ""
    file.write_text(f"{head.rstrip()}\n\n## {title}\n\n{body.strip()}\n{tail}")


def target_app(name: str, words: Sequence[str] = ()) -> typer.Typer:
    """Build the command line of a target from the parameters of its `measure`.

    words: arguments of the command, which its section shows.
    """
    module = import_module(f"benchmarks.targets.{'steps' if name == 'profile' else name}")
    measure = module.measure_profile if name == "profile" else module.measure
    command = shlex.join(["python", "-m", "benchmarks", name, *words])

    def run(docs: Path, json: Path, **options: Any) -> None:
        found: Findings = measure(**options)
        plain = [verdict.as_plain() for verdict in found.verdicts]
        body = f"`{command}` on {machine()}, torch {torch.__version__}{found.text}"
        body += f"\n\n{verdict_table(plain)}" if plain else ""
        print(body)
        if title := module.TITLE if found.title is None else found.title:
            write_section(docs, title, body)
            json.parent.mkdir(parents=True, exist_ok=True)
            json.write_text(dumps(plain if found.content is None else found.content, indent=1))
        found.cleanup()

    hints = get_type_hints(measure, include_extras=True) | {"docs": Path, "json": Path}
    kind = inspect.Parameter.KEYWORD_ONLY
    own = inspect.signature(measure).parameters.values()
    files = {"docs": DOCS, "json": Path(f"runs/benchmarks/{name}.json")}
    common = [inspect.Parameter(key, kind, default=file) for key, file in files.items()]
    parameters = [each.replace(annotation=hints[each.name], kind=kind) for each in (*own, *common)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = hints
    app = new_app()
    app.command(help=module.__doc__)(run)
    return app
