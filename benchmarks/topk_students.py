"""python -m benchmarks.topk_students STUDENT [--forms "8 4 2 1"] [--method kd] [key=value ...]

What students lose where the cache holds less: bytes of a record, KL divergence of the teacher's
probabilities, and the students' errors, from the full cache, which must exist, and from reduced
ones that are converted from it. A form is "4", the four largest logits; "uint8", the means; or
"4+uint8".
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.harness import machine, markdown, write_json, write_section
from configs.load import load_student, load_teacher, split_overrides
from configs.schema import StudentConfig, TeacherConfig
from report.runs import Result, results_in
from report.table import Row, difference, rows_of
from store import TeacherCache
from store.convert import convert_cache
from train.student import train_student
from train.study import Study, open_study

_HEADER = (
    "stored",
    "bytes per record",
    "KL, T = 1",
    "KL, T = 4",
    "seeds",
    "top-1 error, last (%)",
    "Δ to full",
)


@dataclass(frozen=True)
class Form:
    """How records are stored. top: of the logits; None: all, as the full cache holds them."""

    top: int | None
    means: str | None = None

    @classmethod
    def parse(cls, text: str) -> Form:
        words = text.split("+")
        tops = [int(word) for word in words if word.isdigit()]
        return cls(tops[0] if tops else None, "uint8" if "uint8" in words else None)

    @property
    def name(self) -> str:
        logits = f"{self.top} largest logits" if self.top else "all logits"
        return logits + (f", {self.means} means" if self.means else "")

    def converted(self, full: TeacherCache) -> TeacherCache:
        """The cache of this form, beside the full one; made where it is missing."""
        if self == FULL:
            return full
        words = [str(self.top or ""), self.means or ""]
        dest = full.path.with_name(f"{full.path.name}-{'+'.join(filter(None, words))}")
        logits = f"top:{self.top}" if self.top else None
        return convert_cache(full.path, dest, logits=logits, means=self.means)

    def overrides(self) -> list[str]:
        """Of the teacher's file, so that it asks for this form."""
        top = [f"taps.logits={{top: {self.top}}}"] if self.top else []
        return [*top, *([f"taps.means={self.means}"] if self.means else [])]


FULL = Form(None)


def trained(
    study: Study, form: Form, method: str, seeds: Sequence[int], device: str, console: Console
) -> list[Result]:
    """One run per seed, under the form's name; finished ones are not repeated."""
    results = []
    for seed in seeds:
        run = study.run(method, seed)
        summary = train_student(run, device=device)
        (result,) = results_in(study.folder, [run.folder.name]).results
        results.append(result)
        error = summary["last"]["top1_error"]
        console.print(f"{form.name}, seed {seed}: {error:.2f} % ({summary['seconds']:.0f} s)")
    return results


def mean_largest_probability(cache: TeacherCache) -> float:
    """Of the teacher, over view 0."""
    logits = cache.read_view(0, ["logits"])["logits"].astype(np.float64)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return float((shares.max(axis=1) / shares.sum(axis=1)).mean())


def line_of(
    form: Form, cache: TeacherCache, row: Row, full: Sequence[Result], ours: Sequence[Result]
) -> list[str]:
    kl = [cache.measured.get(f"kl_t{temperature}") for temperature in (1, 4)]
    return [
        form.name,
        f"{cache.manifest.record_bytes:,}",
        *("" if each is None or form.top is None else f"{each:.2g}" for each in kl),
        str(row.num_seeds),
        str(row.cells["last_top1"]),
        "" if form == FULL else str(difference(ours, full)),
    ]


def _opened(
    config: StudentConfig,
    teacher: TeacherConfig,
    folders: tuple[Path, Path],
    cache: Path | None = None,
) -> Study:
    caches, runs = folders
    return open_study(config, teacher, caches_dir=caches, runs_dir=runs, cache_path=cache)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--method", default="kd")
    parser.add_argument("--forms", default="8 4 2 1")
    parser.add_argument("--seeds", default="0 1 2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--docs", type=Path, default=Path("docs/results.md"))
    options = parser.parse_intermixed_args(arguments)
    forms = [FULL, *map(Form.parse, options.forms.split())]
    seeds = [int(word) for word in options.seeds.split()]
    own, teachers = split_overrides(options.overrides)
    config, console = load_student(options.student, own), Console(highlight=False, markup=False)
    folders = Path("caches"), Path("runs")
    full = _opened(config, load_teacher(config.teacher, teachers), folders).cache
    results: dict[str, list[Result]] = {}
    lines = []
    for form in forms:
        cache = form.converted(full)
        teacher = load_teacher(config.teacher, [*teachers, *form.overrides()])
        study = _opened(config, teacher, folders, cache.path)
        ours = trained(study, form, options.method, seeds, options.device, console)
        results[form.name] = ours
        (row,) = rows_of(ours)
        lines.append(line_of(form, cache, row, results[FULL.name], ours))
    first = results[FULL.name][0]
    command = shlex.join(["python", "-m", "benchmarks.topk_students", *arguments])
    body = "\n\n".join(
        [
            f"```bash\n{command}\n```",
            markdown(_HEADER, lines).strip(),
            f"{first.num_samples:,} images, {first.epochs} epochs, {full.num_views} views, method "
            f"{options.method}; the teacher's error is "
            f"{full.measured['test_top1_error']:.1f} %, its mean largest probability on the cached "
            f"views {mean_largest_probability(full):.2f}. {machine()}, torch "
            f"{first.versions['torch']}.",
        ]
    )
    print(body)
    write_section(options.docs, f"Reduced records: {options.student}, {options.method}", body)
    found = [dict(zip(_HEADER, line, strict=True)) for line in lines]
    write_json(Path("runs/benchmarks") / f"topk-{options.student}-{options.method}.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
