"""python -m benchmarks start [--images 50000] [--rounds 5] [--device cuda]

How long `make train-student` takes from its start to the first training step, where weights and
cache are there: images of CIFAR-10's size and number, packed into one file. The packages' imports,
which every one of its programs repeats, are timed apart.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from benchmarks.harness import Verdict, machine, parser_of, publish
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.views.packed.write import pack_pixels
from teach_once.views.splits import ImageSource, array_split

ROOT = Path(__file__).parent.parent.parent
_POLL_SECONDS = 0.005
_DEADLINE_SECONDS = 300.0

TEACHER = """
dataset:
  type: packed
  file: {folder}/images.h5
  normalisation: {{mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}}
views: {{augment: {{kind: pad-crop-flip, pad_px: 4}}, count: 2}}
teacher: {{arch: resnet8, weights: {folder}/teacher.pt}}
"""
STUDENT = """
teacher: {folder}/start-teacher.yaml
student: {{arch: resnet20}}
training: {{epochs: 1, batch_size: 128, learning_rate: 0.1, schedule: {{kind: onecycle}}}}
methods: {{cd+gkd: [{{loss: ce}}, {{loss: gkd}}, {{loss: cd, weight: 6}}]}}
"""


def prepare(folder: Path, num_images: int) -> list[str]:
    """Files of a study in `folder`, its cache made; returns the arguments for make."""
    rng = np.random.default_rng(0)
    train, test = (
        array_split(
            rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
            rng.integers(0, 10, count),
            "noise",
        )
        for count in (num_images, 1000)
    )
    names = tuple("0123456789")
    noise = ImageSource(
        "noise", "packed", names, train, test, lambda ids: "0" * 64, lambda: "0" * 64
    )
    pack_pixels(noise, folder / "images.h5")
    with h5py.File(folder / "images.h5") as written:
        assert written["train/images"].shape[0] == num_images
    save_atomically(build("resnet8", num_classes=10).state_dict(), folder / "teacher.pt")
    (folder / "start-teacher.yaml").write_text(TEACHER.format(folder=folder))
    (folder / "start-student.yaml").write_text(STUDENT.format(folder=folder))
    places = [f"CACHES={folder}/caches", f"RUNS={folder}/runs"]
    make = ["make", "--silent", "cache-teacher", f"TEACHER={folder}/start-teacher.yaml", *places]
    subprocess.run(make, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return [f"STUDENT={folder}/start-student.yaml", "METHOD=cd+gkd", *places]


def seconds_to_first_step(folder: Path, arguments: list[str], seed: int) -> float:
    """Until the run's metrics file is there, which is opened right before the first step."""
    started = time.perf_counter()
    process = subprocess.Popen(
        ["make", "--silent", "train-student", f"SEED={seed}", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        while time.perf_counter() - started < _DEADLINE_SECONDS and process.poll() is None:
            if list((folder / "runs").glob(f"*/*-seed{seed}-*/metrics.jsonl")):
                return time.perf_counter() - started
            time.sleep(_POLL_SECONDS)
        raise RuntimeError(f"make train-student ended ({process.returncode}) without a step")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def seconds_of_imports() -> float:
    """What the four programs that `make train-student` runs import, one after the other."""
    modules = [
        "teach_once.train.cli.commands",
        "teach_once.configs.command",
        "teach_once.train.cli.commands",
        "teach_once.precompute.command",
    ]
    last = "train.__main__, train.student"
    started = time.perf_counter()
    for names in [*modules, last]:
        subprocess.run([sys.executable, "-c", f"import {names}"], cwd=ROOT, check=True)
    return time.perf_counter() - started


def main(arguments: list[str]) -> int:
    parser = parser_of("start", __doc__)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = [*prepare(folder, options.images), f"DEVICE={options.device}"]
        starts, imports = [], []
        for seed in range(options.rounds):
            starts.append(seconds_to_first_step(folder, make, seed))
            imports.append(seconds_of_imports())
    start, imported = statistics.median(starts), statistics.median(imports)
    verdicts = [
        Verdict(
            "`make train-student` to the first step, without imports (s)",
            start - imported,
            "≤ 5",
            lambda x: x <= 5,
        ),
        Verdict("its programs' imports (s)", imported),
    ]
    text = (
        f"`python -m benchmarks start {' '.join(arguments)}` on {machine()}: {options.images:,} "
        f"images of 32x32, packed; medians of {options.rounds} rounds, start {min(starts):.1f} to "
        f"{max(starts):.1f} s."
    )
    publish(options, "The start", text, verdicts)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
