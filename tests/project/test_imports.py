"""Who may import whom: floors from the ground up, no circles, and that these tests can fail.

Every import counts, wherever it stands: in a function and under `if TYPE_CHECKING` too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.project import ROOT

FLOORS = (
    ("runtime",),
    ("configs", "store"),
    ("views", "nets"),
    ("precompute", "train"),
    ("report",),
    ("teach_once",),
    ("benchmarks", "examples"),
)
FLOOR_OF = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
PARTS = set(FLOOR_OF) - {"teach_once", "benchmarks", "examples"}  # reached through teach_once
FAST_STARTS = (
    *("store.command", "configs.command", "views.command", "report.command"),
    *("precompute.command", "train.cli.commands", "views.augment.augment"),
)
Sources = dict[str, str]  # {module: its text}


class Import(NamedTuple):
    """`name` is None in `import module`."""

    importer: str
    module: str
    name: str | None

    def __str__(self) -> str:
        return f"{self.importer} imports {self.module}" + (f".{self.name}" if self.name else "")


@cache
def project() -> Sources:
    files = [file for package in FLOOR_OF for file in (ROOT / package).rglob("*.py")]
    return {module_name(file.relative_to(ROOT)): file.read_text() for file in files}


def module_name(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


@cache
def parsed(source: str) -> tuple[ast.AST, ...]:
    """All nodes of a module, which most tests here look at: parsed once."""
    return tuple(ast.walk(ast.parse(source)))


def short(module: str) -> str:
    """`teach_once.train.step` -> `train.step`; a part that is named without `teach_once` -> ""."""
    first, _, rest = module.partition(".")
    if first == "teach_once" and rest.partition(".")[0] in PARTS:
        return rest
    return "" if first in PARTS else module


def imports_of(importer: str, sources: Sources) -> Iterator[Import]:
    """All of them; of `from package import module` the module."""
    for node in parsed(sources[importer]):
        if isinstance(node, ast.Import):
            yield from (Import(importer, short(alias.name), None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}: imports are absolute"
            for alias in node.names:
                inner = short(f"{node.module}.{alias.name}")
                if inner in sources:
                    yield Import(importer, inner, None)
                else:
                    yield Import(importer, short(str(node.module)), alias.name)


def is_allowed(found: Import) -> bool:
    ours, theirs = found.importer.partition(".")[0], found.module.partition(".")[0]
    if not theirs:  # a part by its short name: a second copy of it, beside that of teach_once
        return False
    if theirs in ("torch", "torchvision"):
        return ours != "store"
    return theirs not in FLOOR_OF or theirs == ours or FLOOR_OF[theirs] < FLOOR_OF[ours]


def violations(sources: Sources) -> list[str]:
    found = (each for importer in sources for each in imports_of(importer, sources))
    return [str(each) for each in found if not is_allowed(each)]


def circle(sources: Sources) -> list[str]:
    """Modules that import one another in turn; [] where there are none."""
    graph = {
        importer: {each.module for each in imports_of(importer, sources)} - {importer}
        for importer in sources
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_package_stands_on_a_floor() -> None:
    packages = {file.parent.name for file in ROOT.glob("*/*.py")} - {"tests"}
    assert packages <= set(FLOOR_OF)
    assert packages >= set(FLOOR_OF) - {"examples"}


def test_imports_go_down_a_floor_never_up_or_sideways() -> None:
    assert violations(project()) == []


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert circle(project()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("runtime.new", "from teach_once.store.format.journal import read_journal"),  # up
        ("configs.new", "from teach_once.train.schedule import weight_at"),
        ("store.new", "from teach_once.views import seeds"),
        ("train.new", "def f():\n    import teach_once.report.table"),
        ("report.new", "from benchmarks.harness import machine"),
        ("views.new", "from teach_once.nets.networks.zoo import build"),  # sideways
        ("configs.new", "import teach_once.store"),
        ("train.new", "import teach_once.precompute.run_pass"),
        ("precompute.new", "def f():\n    from teach_once.train import losses"),
        ("benchmarks.new", "if TYPE_CHECKING:\n    import examples"),
        ("store.new", "import torch"),
        ("train.new", "from train import losses"),  # a second copy
        ("report.new", "import store.errors"),
    ],
)
def test_an_import_that_breaks_a_rule_is_found(module: str, source: str) -> None:
    (found,) = violations({**project(), module: source})
    assert found.startswith(f"{module} imports ")


@pytest.mark.parametrize(
    "sources",
    [
        {
            "train.a": "from teach_once.train.b import f",
            "train.b": "def g():\n    from teach_once.train.a import h",
        },
        {
            "train.a": "import teach_once.train.b",
            "train.b": "if TYPE_CHECKING:\n    from teach_once.train import a",
        },
        {
            "nets.a": "import teach_once.nets.b",
            "nets.b": "import teach_once.nets.c",
            "nets.c": "from teach_once.nets import a",
        },
    ],
)
def test_a_circle_of_imports_is_found(sources: Sources) -> None:
    found = circle({**project(), **sources})
    assert set(found) == set(sources)


def test_model_code_does_not_import_tap_code() -> None:
    assert not any("taps" in each.module for each in imports_of("nets.networks.zoo", project()))


def test_the_programs_load_no_torch_before_their_work_and_set_how_its_threads_wait() -> None:
    """In one process: the first that loads it is named."""
    code = f"""
import importlib, sys
for name in {FAST_STARTS}:
    importlib.import_module(f"teach_once.{{name}}")
    assert "torch" not in sys.modules, name
    assert "teach_once.runtime" in sys.modules, name
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_only_the_report_and_what_draws_pictures_load_the_plotting_library() -> None:
    sources = project()
    drawing = {
        each.importer
        for name in sources
        for each in imports_of(name, sources)
        if each.module.partition(".")[0] in ("matplotlib", "scipy")
    }
    assert {name for name in drawing if name.partition(".")[0] not in ("report", "benchmarks")} == {
        "store.inspect.picture"
    }


def test_nothing_unpickles_or_evaluates() -> None:
    sources = project()
    for name, source in sources.items():
        assert "pickle" not in {each.module for each in imports_of(name, sources)}, name
        for call in (node for node in parsed(source) if isinstance(node, ast.Call)):
            called = ast.unparse(call.func)
            assert called not in ("eval", "exec"), name
            assert called not in ("torch.load", "torch.hub.load_state_dict_from_url"), name
