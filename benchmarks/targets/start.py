"""python -m benchmarks start [--images 50000] [--rounds 5] [--device cuda]

How long `make train-student` takes from its start to the first training step, if weights and cache
exist: images of CIFAR-10's size and number, packed into one file. The packages' imports, which
every one of its programs repeats, are timed apart.
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

import numpy as np

from benchmarks.harness import Findings, Verdict
from benchmarks.synthetic.studies import random_split, save_random_weights
from teach_once.views.packed.write import pack_pixels
from teach_once.views.splits import ImageSource

TITLE = "The start"
ROOT = Path(__file__).parents[2]
_POLL_SECONDS = 0.005
_DEADLINE_SECONDS = 300.0
_MODULES = ("train.cli.commands", "configs.command", "train.cli.commands", "precompute.command")
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


def measure(device: str = "auto", images: int = 50_000, rounds: int = 5) -> Findings:
    with tempfile.TemporaryDirectory() as name:
        make = [*prepare(Path(name), images), f"DEVICE={device}"]
        starts, imports = [], []
        for seed in range(rounds):
            starts.append(seconds_to_first_step(Path(name), make, seed))
            imports.append(seconds_of_imports())
    start, imported = statistics.median(starts), statistics.median(imports)
    text = f": {images:,} images of 32x32, packed; medians of {rounds} rounds, start "
    to_step = "`make train-student` to the first step, without imports (s)"
    verdicts = [Verdict(to_step, start - imported, at_most=5)]
    verdicts += [Verdict("its programs' imports (s)", imported)]
    return Findings(f"{text}{min(starts):.1f} to {max(starts):.1f} s.", verdicts)


def prepare(folder: Path, num_images: int) -> list[str]:
    """Write a study into `folder` and make its cache; return the arguments for make."""
    rng = np.random.default_rng(0)
    train, test = (random_split(rng, count, 32, 3, 10) for count in (num_images, 1000))
    names = tuple("0123456789")
    digest = "0" * 64
    noise = ImageSource("noise", "packed", names, train, test, lambda ids: digest, lambda: digest)
    pack_pixels(noise, folder / "images.h5")
    save_random_weights(folder / "teacher.pt", "resnet8", 10)
    (folder / "start-teacher.yaml").write_text(TEACHER.format(folder=folder))
    (folder / "start-student.yaml").write_text(STUDENT.format(folder=folder))
    places = [f"CACHES={folder}/caches", f"RUNS={folder}/runs"]
    make = ["make", "--silent", "cache-teacher", f"TEACHER={folder}/start-teacher.yaml", *places]
    subprocess.run(make, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return [f"STUDENT={folder}/start-student.yaml", "METHOD=cd+gkd", *places]


def seconds_to_first_step(folder: Path, arguments: list[str], seed: int) -> float:
    """Seconds until the run has a metrics file, which is opened right before the first step."""
    started = time.perf_counter()
    command = ["make", "--silent", "train-student", f"SEED={seed}", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, process_group=0)
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
    """Seconds that the programs of `make train-student` import for, one after the other."""
    started = time.perf_counter()
    for name in (*_MODULES, "train.sessions.student"):
        command = [sys.executable, "-c", f"import teach_once.{name}"]
        subprocess.run(command, cwd=ROOT, check=True)
    return time.perf_counter() - started
