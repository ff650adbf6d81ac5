"""teach-once env          versions, processor, GPUs, memory and limits of this machine

Prints what a bug report needs, as lines of `name: value`. A value that cannot be found is reported
as unknown, because a faulty machine is often the cause. Fast lines come first; only the last ones
import torch. Names of files and variables are printed unchanged, credentials are not printed.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from teach_once import __version__
from teach_once.runtime.command.frame import new_app, run_command
from teach_once.runtime.command.program import PROJECT
from teach_once.runtime.machine.resources import free_memory, total_memory, usable_cores
from teach_once.runtime.safe.text import visible

_PACKAGES = ("torch", "torchvision", "timm", "zarr", "numpy", "h5py", "obstore", "pillow")
_OPTIONAL = ("ray", "datasets", "wandb", "mlflow-skinny", "onnx")
# CPU features by which torch selects kernels, as named in /proc/cpuinfo; Arm's are last.
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "asimd", "sve")
_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "PYTORCH_CUDA_ALLOC_CONF"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_JOB_ID", "RAY_ADDRESS"),
)
_GIB = 2**30


app = new_app()


@app.command()
def env() -> None:
    """Print versions, processor, GPUs, memory and limits, for a bug report."""
    for name, value in environment():
        print(visible(f"{name + ':':<12} {value}"), flush=True)


def cli(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status."""
    return run_command(app, arguments)


def environment() -> Iterator[tuple[str, str]]:
    """Yield (name, value) pairs; the slow ones last."""
    rows: dict[str, Callable[[], str]] = {
        "teach-once": _project,
        "python": lambda: f"{platform.python_version()} ({sys.executable})",
        "packages": lambda: _versions(_PACKAGES),
        "optional": lambda: _versions(_OPTIONAL),
        "system": _system,
        "processor": _processor,
        "memory": lambda: f"{_gib(free_memory())} free of {_gib(total_memory())}",
        "/dev/shm": lambda: _free_space("/dev/shm"),
        "folder": lambda: f"{_free_space('.')} in {Path.cwd()}",
        "limits": _limits,
        "variables": _variables,
        "torch": _torch,
        "gpus": _gpus,
    }
    for name, row in rows.items():
        try:
            yield name, row()
        except Exception as error:  # any fault belongs in the report
            yield name, f"unknown: {type(error).__name__}: {error}"


def _project() -> str:
    """Return the version and, in a clone of the repository, the commit."""
    if not (PROJECT / ".git").exists():
        return f"{__version__} in {PROJECT}"
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return f"{__version__} in {PROJECT}, commit unknown"
    return f"{__version__} in {PROJECT}, commit {found.stdout.strip()}"


def _versions(names: Sequence[str]) -> str:
    return ", ".join(f"{name} {_version(name)}" for name in names)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def _system() -> str:
    try:
        distribution = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        distribution = "unknown distribution"
    return f"{platform.platform()}, {distribution}"


def _processor() -> str:
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)", text, re.M)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)", text, re.M)
    present = set(flags[1].split()) if flags else set()
    features = " ".join(each for each in _CPU_FEATURES if each in present) or "none known"
    name = model[1] if model else platform.machine()
    return f"{name}, {usable_cores()} of {os.cpu_count()} cores usable, features: {features}"


def _gib(number: int) -> str:
    return f"{number / _GIB:.1f} GiB"


def _free_space(folder: str) -> str:
    usage = shutil.disk_usage(folder)
    return f"{_gib(usage.free)} free of {_gib(usage.total)}"


def _limits() -> str:
    """Return the soft limits of this process, as set by `ulimit`."""
    kinds = {
        "open files": resource.RLIMIT_NOFILE,
        "processes": resource.RLIMIT_NPROC,
        "address space": resource.RLIMIT_AS,
        "file size": resource.RLIMIT_FSIZE,
        "locked memory": resource.RLIMIT_MEMLOCK,
    }
    limits = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    return ", ".join(
        f"{name} {'unlimited' if limit == resource.RLIM_INFINITY else limit}"
        for name, limit in limits.items()
    )


def _variables() -> str:
    found = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    return ", ".join(found) or "none set"


def _torch() -> str:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"{torch.__version__}, {build}, {kernels} kernels, {torch.get_num_threads()} threads"


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    bfloat16 = "with" if torch.cuda.is_bf16_supported() else "without"
    models = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        models.append(f"{gpu.name} ({_gib(gpu.total_memory)}, sm_{gpu.major}{gpu.minor})")
    return f"{', '.join(models)}, {bfloat16} bfloat16"
