"""Waiting of torch's OpenMP threads in every program of the project."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.project import ROOT

SET_BY_USERS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def libgomp() -> Path:
    """The library that torch loads, found without loading torch."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    found = sorted((Path(torch.origin).parent / "lib").glob("libgomp*"))
    if not found:
        pytest.skip("this torch does not carry libgomp")
    return found[0]


def spin_count(module: str, **given: str) -> str:
    """The GOMP_SPINCOUNT that libgomp reads if it is loaded after the package of a program."""
    code = f"import {module}, ctypes; ctypes.CDLL({str(libgomp())!r})"
    inherited = {name: value for name, value in os.environ.items() if name not in SET_BY_USERS}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**inherited, "OMP_DISPLAY_ENV": "VERBOSE", **given},
        capture_output=True,
        text=True,
        check=True,
    )
    return re.findall(r"GOMP_SPINCOUNT = '(\w+)'", ran.stderr)[-1]


@pytest.mark.parametrize("module", ["teach_once.train.cli.commands", "benchmarks"])
def test_a_program_limits_how_long_threads_wait_before_torch_is_loaded(module: str) -> None:
    """test_imports shows that every other program imports `runtime` first, too."""
    assert spin_count(module) == "2000"


@pytest.mark.parametrize(
    ("given", "count"),
    [({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_a_way_of_waiting_that_the_user_has_set_is_kept(given: dict[str, str], count: str) -> None:
    assert spin_count("runtime", **given) == count
