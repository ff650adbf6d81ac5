"""The guarantees of each command that ends with 0, in addition to those of every command.

A promise is a function of the world after the command, its ending, its ending on the unchanged
world, and whether the change was sealed (forged with recomputed checksums). It returns the
violation.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from teach_once.report.page_assets import SCRIPT
from tests.support.attacks.strangers import oracle
from tests.support.attacks.strangers.sandbox import Outcome, run_limited

_ASKED_VIEWS = 2  # requested by the world's config
_RESULT = re.compile(r"test (?:top-1 )?error +([\d.]+|nan|-?inf)", re.IGNORECASE)

_ERROR = re.compile(r"top-[15] error (\S+) %")


@dataclass(frozen=True)
class Answer:
    """A command that ended with 0. usual: its ending on the unchanged world, `original`."""

    world: Path
    original: Path
    outcome: Outcome
    usual: Outcome
    is_sealed: bool


Promise = Callable[[Answer], str]


def nothing_more(answer: Answer) -> str:
    return ""


def sound_cache(answer: Answer) -> str:
    (cache,) = (answer.world / "caches").glob("t-*")
    return _judged(lambda: oracle.problem_of_folder(cache), answer)


def sound_views(answer: Answer) -> str:
    """Check the requested views of the config's cache."""
    (true,) = (answer.original / "caches").glob("t-*")
    cache = answer.world / "caches" / true.name
    return _judged(lambda: oracle.problem_of_folder(cache, _ASKED_VIEWS), answer)


def sound_conversion(answer: Answer) -> str:
    made = answer.world / "converted" / "t"
    return sound_cache(answer) or _judged(lambda: oracle.problem_of_folder(made), answer)


def sound_hdf5(answer: Answer) -> str:
    return _judged(lambda: oracle.problem_of_file(answer.world / "cache.h5"), answer)


def sound_export(answer: Answer) -> str:
    return sound_cache(answer) or _judged(
        lambda: oracle.problem_of_file(answer.world / "out.h5"), answer
    )


def sound_import(answer: Answer) -> str:
    (cache,) = (answer.world / "imported").glob("t-*")
    return sound_hdf5(answer) or _judged(lambda: oracle.problem_of_folder(cache), answer)


def _judged(problem: Callable[[], str], answer: Answer) -> str:
    """Return the oracle's result, from its own process because accepted content may be a trap."""

    def work() -> int:
        found = problem()
        print(found)
        return 1 if found else 0

    outcome = run_limited(work, answer.world)
    if outcome.status == 0:
        return ""
    last = outcome.output.strip().splitlines()[-1:] or [outcome.ending]
    return f"accepted, but: {last[0]}"


def result_is_true(answer: Answer) -> str:
    """Check that training was resumed exactly, restarted or rejected.

    The last lines contain the errors of the last and the best epoch, and of the teacher.
    """
    ours, usual = (_RESULT.findall(each.output)[-3:] for each in (answer.outcome, answer.usual))
    if not all(0 <= float(error) <= 100 for error in ours):
        return f"a result that cannot be: {ours}"
    if answer.is_sealed or set(ours) <= set(usual):
        return ""
    return f"another result: {ours}, expected {usual}"


def weights_are_known(answer: Answer) -> str:
    """Check that a printed error belongs to the weights on which it was measured."""
    ours, theirs = (each / "teacher.pt" for each in (answer.world, answer.original))
    if not _RESULT.search(answer.outcome.output) or answer.is_sealed:
        return ""
    if ours.is_file() and ours.read_bytes() == theirs.read_bytes():
        return result_is_true(answer)
    return "states an error of other weights"


def runs_are_true(answer: Answer) -> str:
    """Check that a run is listed as finished only with its own error."""
    lines = [line for line in answer.outcome.output.splitlines() if " finished " in line]
    usual = {line for line in answer.usual.output.splitlines() if " finished " in line}
    errors = {error for line in usual for error in _ERROR.findall(line)}
    for error in (error for line in lines for error in _ERROR.findall(line)):
        if not re.fullmatch(r"\d+\.\d+", error) or not 0 <= float(error) <= 100:
            return f"a result that cannot be: {error}"
        if not answer.is_sealed and error not in errors:
            return f"another result: {error}, expected {errors}"
    return ""


def student_is_true(answer: Answer) -> str:
    if answer.is_sealed:
        return ""
    ours, usual = (_shown_errors(each.output) for each in (answer.outcome, answer.usual))
    return "" if ours == usual else f"another student was exported: {ours}, expected {usual}"


def export_is_true(answer: Answer) -> str:
    """Check that unchanged files are equal byte for byte, except for white space in the card."""
    for name in ("student.pt", "student.pt2"):
        ours, theirs = (each / "exported" / name for each in (answer.world, answer.original))
        if ours.read_bytes() != theirs.read_bytes() and not answer.is_sealed:
            return f"{name} has been changed"
    return ""


def _shown_errors(output: str) -> list[str]:
    return re.findall(r"error ([\d.]+) %|program ([\d.]+) %", output)


def report_is_safe(answer: Answer) -> str:
    folder = answer.world / "runs" / "s"
    page = _Tags()
    page.feed((folder / "report.html").read_text())
    if page.active:
        return f"report.html holds {page.active[0]}"
    table = list(csv.reader(io.StringIO((folder / "ablation.csv").read_text())))
    for cell in (cell for row in table for cell in row):
        if cell[:1] in ("=", "+", "@") or (cell[:1] == "-" and not _is_number(cell)):
            return f"a spreadsheet would run the cell {cell!r}"
    errors = [float(row[3]) for row in table[1:]]
    if not all(0 <= error <= 100 for error in errors):
        return f"results that cannot be: {errors}"
    if not answer.is_sealed and not all(f"{each:.2f}" in answer.usual.output for each in errors):
        return f"another result in the table: {errors}"
    return ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


class _Tags(HTMLParser):
    """Parser that collects active content, except for the script of every page."""

    def __init__(self) -> None:
        super().__init__()
        self.active: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._in_script = tag == "script"
        if tag in ("iframe", "object", "embed", "base", "form"):
            self.active.append(f"<{tag}>")
        for name, value in attributes:
            is_fetched = name in ("src", "href") and not (value or "").startswith(("data:", "#"))
            if name.startswith("on") or is_fetched:
                self.active.append(f"{tag} {name}={value!r}")

    def handle_data(self, data: str) -> None:
        if self._in_script and data != SCRIPT:
            self.active.append(f"<script>{data}")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False
