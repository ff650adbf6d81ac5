"""How long `make train-student` takes to its first training step, if weights and cache exist.

The images have CIFAR-10's size and number, in one packed file. The imports are timed separately.
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

from benchmarks.harness import Findings, Verdict
from benchmarks.synthetic.studies import Shape, make_cache, write_shape
from teach_once.precompute.compute.teacher_pass import PassOptions
from teach_once.runtime.machine.devices import pick_device

TITLE = "The start"
ROOT = Path(__file__).parents[2]
_POLL_SECONDS, _DEADLINE_SECONDS = 0.005, 300.0
_IMPORTS = "import teach_once.commands, teach_once.train.sessions.student"


def measure(device: str = "auto", images: int = 50_000, rounds: int = 5) -> Findings:
    with tempfile.TemporaryDirectory() as name:
        shape = Shape("cifar10-resnet20", images, num_test=1000)
        files = write_shape(shape, Path(name), ["training.batch_size=128"])
        make_cache(files.setup(), PassOptions(pick_device(device)))
        make = [*files.make_variables, "METHOD=cd+gkd", f"DEVICE={device}"]
        starts, imports = [], []
        for seed in range(rounds):
            starts.append(seconds_to_first_step(Path(name), make, seed))
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", _IMPORTS], cwd=ROOT, check=True)
            imports.append(time.perf_counter() - started)
    start, imported = statistics.median(starts), statistics.median(imports)
    text = f": {images:,} images of 32x32, packed; medians of {rounds} rounds, start "
    to_step = "`make train-student` to the first step, without imports (s)"
    verdicts = [Verdict(to_step, start - imported, at_most=5), Verdict("its imports (s)", imported)]
    return Findings(f"{text}{min(starts):.1f} to {max(starts):.1f} s.", verdicts)


def seconds_to_first_step(folder: Path, arguments: list[str], seed: int) -> float:
    """Time until the run has a metrics file, which is opened right before the first step."""
    command = ["make", "--silent", "train-student", f"SEED={seed}", *arguments]
    return run_until(command, folder, f"runs/*/*-seed{seed}-*/metrics.jsonl")[0]


def run_until(
    command: list[str], folder: Path, pattern: str, more_seconds: float = 0.0
) -> tuple[float, int]:
    """Start a command, wait until a file of `folder` matches, and kill it `more_seconds` later.

    Returns the seconds until the file exists, and the peak memory (bytes) of the process
    itself. Raises RuntimeError if the command ends before the file exists, or fails after it.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, process_group=0)
    seconds, until, ended = -1.0, started + _DEADLINE_SECONDS, 0
    try:
        while not ended and time.perf_counter() < until:
            time.sleep(_POLL_SECONDS)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if seconds < 0 and list(folder.glob(pattern)):
                seconds = time.perf_counter() - started
                until = started + seconds + more_seconds
    finally:
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
            _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    if seconds < 0 or (ended and status):
        raise RuntimeError(f"{command} ended (status {status}); {pattern}: {seconds >= 0}")
    return seconds, usage.ru_maxrss * 1024
