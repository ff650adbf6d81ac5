"""python -m benchmarks [--device cuda] [--quick] [--only "steps start"]
python -m benchmarks loading [...]          how fast photographs are read; needs a quiet machine
python -m benchmarks scale [...]            what the number of samples costs; takes minutes
python -m benchmarks share [...]            what one reading for several methods saves; likewise
python -m benchmarks objects [...]          a view through a mirror of an object store; likewise
python -m benchmarks ranks [...]            one student on several processes, or GPUs; likewise
python -m benchmarks many_blocks [...]      a pass of a million empty blocks on Ray; likewise

Runs every benchmark, one after the other, each as its own program, and ends with the table of all
targets: what was measured, what was aimed at, and a mark where it was missed. The sections of
docs/benchmarks.md are rewritten on the way. --quick: a few rounds of the smallest shapes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import machine, markdown, write_section

PROGRAMS = ("steps", "teacher_pass", "ablation", "start", "topk")
# Take minutes: not among those of `make bench`.
ALONE = (
    "loading",
    "scale",
    "share",
    "ranks",
    "objects",
    "many_blocks",
    "read",
    "rows",
    "dtypes",
    "profile",
)
QUICK = {
    "steps": ["--shapes", "digits", "--rounds", "2"],
    "teacher_pass": ["--shapes", "digits", "--rounds", "2"],
    "ablation": ["--shape", "digits", "--epochs", "2"],
    "start": ["--images", "500", "--rounds", "1"],
    "topk": ["--shapes", "digits", "--records", "64", "--rounds", "2"],
}


def run_program(command: list[str]) -> None:
    """In a process of its own, so that no program finds memory or threads of another's."""
    subprocess.run(command, check=True)


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in (*PROGRAMS, *ALONE):
        return int(
            importlib.import_module(f"benchmarks.targets.{arguments[0]}").main(arguments[1:])
        )
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default=" ".join(PROGRAMS))
    parser.add_argument("--docs", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args(arguments)
    rows = []
    for program in options.only.split():
        results = options.results / f"{program}.json"
        command = [
            sys.executable,
            "-m",
            f"benchmarks.targets.{program}",
            "--device",
            options.device,
        ]
        command += ["--docs", str(options.docs), "--json", str(results)]
        command += QUICK[program] if options.quick else []
        run_program(command)
        found = json.loads(results.read_text())
        rows += [[v["what"], f"{v['value']:,.3g}", v["target"], v["mark"]] for v in found]
    table = markdown(["what", "measured", "target", ""], rows)
    print(table)
    body = f"`make bench` on {machine()}, device {options.device}. Misses: docs/performance.md.\n\n"
    write_section(options.docs, "All targets", f"{body}{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
