"""python -m benchmarks [--device cuda] [--quick] [--only "steps start"]
python -m benchmarks NAME [...]             one of the benchmarks below; --help lists its options

Without a name it runs the benchmarks of all speed targets, each in its own process, rewrites their
sections of the benchmarks page, and prints a table of all targets: the measured value, the target,
and a mark if it was missed. --quick: a few rounds of the smallest shapes.

"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import DOCS, machine, target_app, verdict_table, write_section
from teach_once.runtime.command.frame import run_command
from teach_once.runtime.command.make_args import with_words

# The speed targets that `make bench` measures, and the options of its smallest run.
SUITE = {
    "steps": ["--shapes", "digits", "--rounds", "2"],
    "teacher_pass": ["--shapes", "digits", "--rounds", "2"],
    "ablation": ["--shape", "digits", "--epochs", "2"],
    "start": ["--images", "500", "--rounds", "1"],
}
NAMES = {
    "steps": "a training step: cached, in memory, live, as the original trainer",
    "teacher_pass": "the teacher's pass, against a bare loop of its forward passes",
    "ablation": "five methods from a cache and with the teacher in the loop",
    "start": "from `make train-student` to its first step",
    "loading": "photographs, against torchvision's loader; needs a quiet machine",
    "scale": "the cost of ImageNet's number of samples; minutes",
    "shared_loading": "five methods trained jointly, against one after the other; minutes",
    "objects": "a view through a mirror of an object store; minutes",
    "ranks": "one student on several processes, or GPUs; minutes",
    "many_blocks": "a pass of a million nearly empty blocks on Ray; minutes",
    "read": "a view's slab, single rows and a check of a cache",
    "dtypes": "bytes and errors of each tap dtype, on a teacher's records",
    "profile": "the operators in which a training step spends its time",
}


def run_program(command: list[str]) -> None:
    """Run a target in its own process, unaffected by the memory and threads of another."""
    subprocess.run(command, check=True)


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in NAMES:
        name, *words = with_words(arguments)
        return run_command(target_app(name, words), words)
    listed = "\n".join(f"  {name:<16}{purpose}" for name, purpose in NAMES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default=" ".join(SUITE))
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args(arguments)
    verdicts = []
    for name in options.only.split():
        results = options.results / f"{name}.json"
        command = [sys.executable, "-m", "benchmarks", name, "--device", options.device]
        command += ["--docs", str(options.docs), "--json", str(results)]
        run_program([*command, *(SUITE[name] if options.quick else [])])
        verdicts += json.loads(results.read_text())
    table = verdict_table(verdicts)
    print(table)
    body = f"`make bench` on {machine()}, device {options.device}. Misses: performance.md."
    write_section(options.docs, "All targets", f"{body}\n\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
