"""python -m benchmarks ranks [--ranks 2] [--shapes "digits cifar-56-20"] [--device cuda]

One student trained by several processes, beside one process: what a step takes, of which what is
exchanged; what each process holds in memory and reads of the cache. On GPUs each process has one.

Steps of all rows take turns in one group of processes. The rows: see `ROWS`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Timing, Verdict, machine, markdown, parser_of, publish
from benchmarks.synthetic.studies import SHAPES, study_of
from benchmarks.targets.rank_measures import METHOD, make_memory_study
from teach_once.runtime.machine.devices import pick_device

ROWS = {
    "share alone": "one process, its share of the batch, the others idle",
    "share": "every process its share of the batch, nothing exchanged",
    "local": "together, `batch_norm: local`",
    "sync": "together, `batch_norm: sync`",
}
ROOT = Path(__file__).parent.parent.parent
_DEADLINE_SECONDS = 600.0


def measured_by(world: int, device: torch.device, folder: Path, *what: str) -> list[Any]:
    """What each of `world` processes finds: `rank_measures` with these arguments."""
    threads = max(1, (os.cpu_count() or 1) // world)
    launcher = ["runtime.launch", str(world), "-m"]
    subprocess.run(
        [
            *(sys.executable, "-m", *(launcher if world > 1 else [])),
            *(
                "benchmarks.targets.rank_measures",
                what[0],
                str(folder),
                "--device",
                device.type,
                *what[1:],
            ),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"},
        check=True,
        timeout=_DEADLINE_SECONDS,
    )
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(world)]


def steps_of(
    shape: str, world: int, device: torch.device, rounds: int, num_steps: int
) -> dict[str, Timing]:
    """Seconds of a step by row."""
    with tempfile.TemporaryDirectory() as place:
        study_of(SHAPES[shape], Path(place), device)
        counts = ["--rounds", str(rounds), "--steps", str(num_steps)]
        found = measured_by(world, device, Path(place), "steps", "--shape", shape, *counts)
    return {name: Timing(tuple(seconds)) for name, seconds in found[0].items()}


def step_table(shapes: Mapping[str, Mapping[str, Timing]]) -> str:
    rows = [
        [
            label,
            *(f"{t[name].median * 1e3:,.1f} ms ± {t[name].spread:.0%}" for t in shapes.values()),
        ]
        for name, label in ROWS.items()
    ]
    return markdown(["a step", *shapes], rows)


def verdicts_of(shape: str, rows: Mapping[str, Timing]) -> list[Verdict]:
    """Without targets: a shared memory bus and its processors decide them, not this project."""
    told = (
        ("together ÷ the same without exchange", "sync", "share"),
        ("together with local batch norm ÷ the same without exchange", "local", "share"),
    )
    return [Verdict(f"{shape}: {what}", rows[a].ratio_to(rows[b])) for what, a, b in told]


def memory_of(worlds: Sequence[int], device: torch.device, slab_mb: int) -> dict[int, list[Any]]:
    """What each rank holds and reads, by the number of ranks."""
    with tempfile.TemporaryDirectory() as place:
        make_memory_study(slab_mb, Path(place))
        size = ["--slab-mb", str(slab_mb)]
        return {world: measured_by(world, device, Path(place), "memory", *size) for world in worlds}


def memory_table(found: Mapping[int, Sequence[Mapping[str, float]]]) -> str:
    rows = [
        [
            str(world),
            *(", ".join(f"{each[what] / 1e6:,.0f}" for each in ranks) for what in ("held", "read")),
            f"{sum(each['held'] for each in ranks) / ranks[0]['slab']:.2f}",
        ]
        for world, ranks in found.items()
    ]
    header = ["processes", "held by each, MB", "read by each, MB a view", "all held, views"]
    return markdown(header, rows)


def main(arguments: list[str]) -> int:
    parser = parser_of("ranks", __doc__)
    parser.add_argument("--ranks", type=int, default=2, help="processes; on GPUs one for each")
    parser.add_argument("--shapes", default="digits cifar-56-20", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="of each row in a round")
    parser.add_argument("--slab-mb", type=int, default=200, help="a view of teacher outputs")
    options = parser.parse_args(arguments)
    device, world = pick_device(options.device), options.ranks
    load = os.getloadavg()[0]
    shapes = {
        name: steps_of(name, world, device, options.rounds, options.steps)
        for name in options.shapes.split()
    }
    memory = memory_of([1, world], device, options.slab_mb)
    text = (
        f"`python -m benchmarks ranks {' '.join(arguments)}` on {machine()}, torch "
        f"{torch.__version__}, {world} processes on {device}, load average before it {load:.1f}: "
        f"{METHOD}, batches of the shapes' configs, cut into {world} shares. Medians of rounds of "
        f"{options.steps} steps that take turns, until the last process is done, ± half the "
        f"distance between the quartiles.\n\n{step_table(shapes)}\n"
        f"A view of {memory[1][0]['slab'] / 1e6:,.0f} MB of logits, of which the feed holds two; "
        f"memory that no file backs, shared pages divided among those who share them.\n\n"
        f"{memory_table(memory)}"
    )
    verdicts = [each for name, rows in shapes.items() for each in verdicts_of(name, rows)]
    publish(options, "One student on several processes", text, verdicts)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
