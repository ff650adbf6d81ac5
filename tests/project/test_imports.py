"""Who may import whom and what a file may hold, each rule with a test that it can fail.

Floors from the ground up; no circles, between sub-folders neither; folders of at most 15 files; no
file that another could hold; a public class name once; no state of the process; no `Any` in a
signature. Every import counts: in a function and under `if TYPE_CHECKING` too.

The sets of known violations are exact: whoever mends one takes it out.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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
    *("precompute.command", "train.cli.commands", "views.augment.augment", "commands"),
)
# What training needs only for one kind of network, data or output: seconds of every start.
LOADED_LATE = {
    *("torch._dynamo", "torchvision", "timm", "sklearn", "scipy", "matplotlib", "tensorboard"),
    *("huggingface_hub", "ray", "obstore", "datasets", "onnx"),
}
MOST_FILES = 15  # Python files in a folder
FEWEST_LINES = 60  # of a file that only one other imports
CONTRACTS = {"train.schedule"}  # short files that other programs import: DESIGN.md, section 6
# Parts of the standard library whose objects are state, at the top of a module that of the process.
STATEFUL = {
    *("threading.Lock", "threading.RLock", "threading.Condition", "threading.Event"),
    *("threading.local", "contextvars.ContextVar", "itertools.count", "collections.deque"),
}
CHANGES = {
    *("add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem"),
    *("popleft", "remove", "setdefault", "update"),
}
PICKLES = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE = {
    *("eval", "exec", "torch.load", "torch.serialization.load"),
    "torch.hub.load_state_dict_from_url",
}
# Modules whose libraries take and return values of any type.
LIBRARY_EDGES = {
    "benchmarks.harness",  # JSON
    "configs.load",  # values of YAML
    "configs.paths",
    "configs.yaml_subset",
    "configs.schema.methods",  # pydantic's validators
    "configs.schema.scalars",
    "configs.schema.student",
    "configs.schema.training",
    "configs.schema_errors",
    "examples.lightning_module",  # Lightning's and timm's own classes
    "examples.timm_task",
    "nets.networks.sync_batch_norm",  # torch.autograd.Function
    "nets.networks.timm_models",  # timm
    "nets.weights.pickle",  # objects of a pickle, none of which is made
    "nets.weights.timm_weights",  # timm and huggingface_hub
    "teach_once.new_teacher",  # timm
    "runtime.command.frame",  # rich
    "runtime.command.help",  # typer, whose parameters are of a copy of click inside it
    "runtime.command.ray",  # Ray
    "runtime.safe.safe_read",  # values of JSON
    "store.format.metadata",
    "store.identity",
    "store.place.bucket",  # obstore
    "views.images.huggingface",  # datasets
}
# State of a process that belongs to the process itself, each with the reason.
STATE_EXCEPTIONS = {
    # A library's own objects of the process.
    "runtime.machine.torchvision_shim._declared",  # torch's schemas live as long as it
    "store.place.bucket._first_process",  # obstore's threads do not survive a fork
    # A worker of a pool: the pool passes an argument once, and tasks reach it by a module's name.
    "views.images.forked._work",
    "train.studies.processes._worker",
    "train.studies.ray_study._here",
    # The process as a whole is what the rule is about.
    "runtime.command.user_code._promised",  # like sys.modules: the code a module is loaded from
    "runtime.safe.locks._held",  # the operating system's locks, which a process has once
    "views.images.decode._one_large",  # one large image at a time fits into its memory
    # Of no consequence for a result: remembered to save work or a second line.
    "train.method.connector_ends._KNOWN",  # weakly, by cache: the same at each reading
    "configs.load._print_once",
    "train.recording.printing.print_once",
}

KNOWN_CROWDED: set[str] = set()
KNOWN_SMALL: set[str] = set()
KNOWN_REPEATED: set[str] = set()
KNOWN_STATE: set[str] = {
    "store.place.mirror_files._read_here",
    "store.place.mirror_folder._all_needs",
    "store.place.mirror_folder._announced",
    "store.place.mirror_folder._held",
    "store.place.mirror_folder._lock",
    "store.place.mirror_folder._used",
    "store.read.mirror._attached",
    "store.read.mirror._attached_needs",
}
KNOWN_UNTYPED: set[str] = {
    "store.format.salvage._most_common",
    "store.format.salvage._parsed",
    "store.read.hdf5.selection",
}
Sources = Mapping[str, str]  # {module: its text}
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Import(NamedTuple):
    """`name` is None in `import module`."""

    importer: str
    module: str
    name: str | None

    def __str__(self) -> str:
        return f"{self.importer} imports {self.module}" + (f".{self.name}" if self.name else "")


@cache
def project_files() -> tuple[Path, ...]:
    """Relative to the root; those that teach_once's links lead to are in their own folders."""
    files = (file for package in FLOOR_OF for file in (ROOT / package).rglob("*.py"))
    return tuple(file.relative_to(ROOT) for file in files)


@cache
def project() -> Sources:
    return {module_name(file): (ROOT / file).read_text() for file in project_files()}


def module_name(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


@cache
def parsed(source: str) -> tuple[ast.AST, ...]:
    """All nodes of a module, first the module; parsed once, as most tests here look at them."""
    return tuple(ast.walk(ast.parse(source)))


def top_level(source: str) -> list[ast.stmt]:
    module = parsed(source)[0]
    assert isinstance(module, ast.Module)
    return module.body


@cache
def import_nodes(source: str) -> tuple[ast.Import | ast.ImportFrom, ...]:
    return tuple(each for each in parsed(source) if isinstance(each, ast.Import | ast.ImportFrom))


@cache
def functions_in(source: str) -> tuple[Function, ...]:
    return tuple(each for each in parsed(source) if isinstance(each, Function))


def short(module: str) -> str:
    """`teach_once.train.step` -> `train.step`; a part that is named without `teach_once` -> ""."""
    first, _, rest = module.partition(".")
    if first == "teach_once" and rest.partition(".")[0] in PARTS:
        return rest
    return "" if first in PARTS else module


def imports_of(importer: str, sources: Sources) -> Iterator[Import]:
    """All of them; of `from package import module` the module."""
    for node in import_nodes(sources[importer]):
        if isinstance(node, ast.Import):
            yield from (Import(importer, short(alias.name), None) for alias in node.names)
        else:
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
    """Modules that import one another in turn; [] if there are none."""
    return first_circle(
        {
            importer: {each.module for each in imports_of(importer, sources)} - {importer}
            for importer in sources
        }
    )


def first_circle(graph: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def folder_of(module: str) -> str:
    """The sub-folder of a module, `train.engine`; of a file at the top of a package the file."""
    part, _, rest = module.partition(".")
    return f"{part}.{rest.partition('.')[0]}" if rest else part


def circle_of_folders(sources: Sources) -> list[str]:
    """Sub-folders of one package that import one another; [] if every arrow points down.

    A file at the top of a package counts as a folder of its own: commands stand above the
    sub-folders, errors and contracts below them.
    """
    graph: dict[str, set[str]] = {}
    for importer in sources:
        folder = folder_of(importer)
        for each in imports_of(importer, sources):
            if each.module.partition(".")[0] == importer.partition(".")[0]:
                graph.setdefault(folder, set()).add(folder_of(each.module))
    return first_circle({name: theirs - {name} for name, theirs in graph.items()})


def crowded_folders(files: Iterable[Path]) -> set[str]:
    """Folders with more Python files than a reader keeps in mind."""
    sizes = Counter(str(file.parent) for file in files)
    return {folder for folder, size in sizes.items() if size > MOST_FILES}


def small_files(sources: Sources) -> set[str]:
    """Files that one other file could hold: short, used once, neither a program nor a contract."""
    importers: dict[str, set[str]] = {name: set() for name in sources}
    for name in sources:
        for each in imports_of(name, sources):
            importers.get(each.module, set()).add(name)
    packages = {name.rpartition(".")[0] for name in sources}
    return {
        name
        for name, source in sources.items()
        if source.count("\n") < FEWEST_LINES
        and len(importers[name] - {name}) < 2
        and name not in packages | CONTRACTS
        and "__main__" not in source + name
    }


def repeated_classes(sources: Sources) -> set[str]:
    """Names of public classes that two modules define."""
    public = Counter(
        node.name
        for source in sources.values()
        for node in top_level(source)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    return {name for name, count in public.items() if count > 1}


def shared_state(sources: Sources) -> set[str]:
    """`module.NAME` of all that lives as long as the process and that a function changes."""
    return {
        f"{module}.{name}"
        for module, source in sources.items()
        for name in _state_in(module, source, sources)
    }


def _state_in(module: str, source: str, sources: Sources) -> Iterator[str]:
    top = top_level(source)
    ours = set(_names_at_top(top))
    imported = (each for each in imports_of(module, sources) if each.module in sources)
    ours |= {each.name for each in imported if each.name}
    for node in top:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Call) and ast.unparse(value.func) in STATEFUL:
            yield from _names_at_top([node])
    for function in functions_in(source):
        yield from _changed_in(function, ours)
        cached = any("cache" in ast.unparse(each) for each in function.decorator_list)
        if cached and function.returns and ast.unparse(function.returns) == "None":
            yield function.name  # remembers that it was called


def _names_at_top(body: Iterable[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (each.id for each in targets if isinstance(each, ast.Name))


def _changed_in(function: Function, ours: set[str]) -> Iterator[str]:
    """Names of the module, not shadowed here, that are bound anew or changed in place."""
    nodes = list(ast.walk(function))
    local = {node.arg for node in nodes if isinstance(node, ast.arg)}
    local |= {each.id for each in nodes if isinstance(each, ast.Name) and _is_written(each)}
    for node in nodes:
        if isinstance(node, ast.Global):
            yield from node.names
        changed = _changed_by(node)
        if isinstance(changed, ast.Name) and changed.id in ours - local:
            yield changed.id


def _changed_by(node: ast.AST) -> ast.expr | None:
    """`x` of `x[0] = …`, `del x[0]`, `x.y = …` and `x.append(…)`."""
    if isinstance(node, ast.Subscript | ast.Attribute) and _is_written(node):
        return node.value
    call = node.func if isinstance(node, ast.Call) else None
    return call.value if isinstance(call, ast.Attribute) and call.attr in CHANGES else None


def _is_written(node: ast.Name | ast.Subscript | ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store | ast.Del)


def untyped_functions(sources: Sources) -> set[str]:
    """Functions that take or return `Any` itself.

    `dict[str, Any]` is the type of a document and `NDArray[Any]` an array of any dtype.
    """
    return {
        f"{module}.{node.name}"
        for module, source in sources.items()
        if module not in LIBRARY_EDGES
        for node in functions_in(source)
        if any(map(_is_any, _annotations(node)))
    }


def _annotations(function: Function) -> Iterator[ast.expr | None]:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    every += [each for each in (arguments.vararg, arguments.kwarg) if each]
    yield from (each.annotation for each in every)
    yield function.returns


def _is_any(annotation: ast.expr | None) -> bool:
    return annotation is not None and "Any" in ast.unparse(annotation).split(" | ")


def code_from_files(sources: Sources) -> set[str]:
    """Find what may run code from a file or a text: readers of pickles, eval and exec.

    `torch.load` counts with any option, under its own name or one that is imported.
    """
    found = set()
    for module, source in sources.items():
        for each in imports_of(module, sources):
            if each.module.partition(".")[0] in PICKLES or f"{each.module}.{each.name}" in UNSAFE:
                found.add(f"{module}: {each}")
        for call in (node for node in parsed(source) if isinstance(node, ast.Call)):
            called, options = ast.unparse(call.func), {option.arg for option in call.keywords}
            if called in UNSAFE or "allow_pickle" in options:
                found.add(f"{module}: {called}")
    return found


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


def test_training_to_its_first_update_loads_no_compiler_and_no_library_that_few_need() -> None:
    code = f"""
import sys, torch
import teach_once.train.sessions.student
from teach_once.configs.load import load_student
from teach_once.train.method.optimizer import make_optimizer
for kind in ("sgd", "adamw"):
    config = load_student("digits-resnet8", [f"training.optimizer={{{{type: {{kind}}}}}}"])
    network = torch.nn.Linear(1, 1)
    optimizer = make_optimizer([network], config.training)
    network(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
print(*(set({sorted(LOADED_LATE)}) & sys.modules.keys()))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout.split()) == (0, []), ran.stderr


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


def test_code_from_files_project_runs_none() -> None:
    assert code_from_files(project()) == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle as p",
        "def f():\n    from cloudpickle import loads",
        "from torch import load as read",
        "from torch.serialization import load",
        "import torch\ndef f(path):\n    return torch.load(path, weights_only=True)",
        "from torch.hub import load_state_dict_from_url",
        "import numpy as np\ndef f(path):\n    return np.load(path, allow_pickle=True)",
        "def f(text):\n    exec(text)",
        "def f(text):\n    return eval(text)",
    ],
)
def test_code_from_files_unsafe_reader_is_found(source: str) -> None:
    assert {each.partition(":")[0] for each in code_from_files({"nets.new": source})} == {
        "nets.new"
    }


def test_circle_of_folders_project_has_none() -> None:
    assert circle_of_folders(project()) == []


def test_circle_of_folders_arrow_upward_is_found() -> None:
    engine = "from teach_once.train.engine.step import f"
    method = "import teach_once.train.method.optimizer"
    found = circle_of_folders({"train.method.new": engine, "train.engine.new": method})
    assert set(found) == {"train.method", "train.engine"}


def test_crowded_folders_project_has_only_known_ones() -> None:
    tests = [file.relative_to(ROOT) for file in (ROOT / "tests").rglob("*.py")]
    assert crowded_folders([*project_files(), *tests]) == KNOWN_CROWDED


def test_crowded_folders_sixteenth_file_is_found() -> None:
    files = [Path(f"nets/new/file{number}.py") for number in range(MOST_FILES)]
    assert crowded_folders(files) == set()
    assert crowded_folders([*files, Path("nets/new/more.py")]) == {"nets/new"}


def test_small_files_project_has_only_known_ones() -> None:
    assert small_files(project()) == KNOWN_SMALL


def test_small_files_one_importer_is_found_and_two_are_not() -> None:
    once = {"train.new": "x = 1\n", "train.user": "import teach_once.train.new\n" + "\n" * 60}
    twice = {**once, "train.other": once["train.user"]}
    users = {"train.user", "train.other"}
    assert small_files(once) - users == {"train.new"}
    assert small_files(twice) - users == set()
    assert small_files({**once, "train.new": "x = 1\n" * 60}) - users == set()


def test_repeated_classes_project_has_only_known_ones() -> None:
    assert repeated_classes(project()) == KNOWN_REPEATED


def test_repeated_classes_second_class_is_found() -> None:
    first = {"train.a": "class Recipe: ...\nclass _Own: ..."}
    assert repeated_classes(first) == set()
    assert repeated_classes({**first, "store.b": first["train.a"]}) == {"Recipe"}


def test_shared_state_project_has_only_known_state() -> None:
    assert shared_state(project()) == KNOWN_STATE | STATE_EXCEPTIONS


@pytest.mark.parametrize(
    "source",
    [
        "x = None\ndef f():\n    global x\n    x = 1",
        "x = {}\ndef f():\n    x[1] = 2",
        "x = {}\ndef f():\n    del x[1]",
        "x: list[int] = []\ndef f():\n    def g():\n        x.append(1)",
        "class x: ...\ndef f():\n    x.count = 1",
        "import threading\nx = threading.Lock()",
        "from teach_once.store.errors import x\ndef f():\n    x.update({})",
        "@functools.cache\ndef x(line: str) -> None:\n    print(line)",
    ],
)
def test_shared_state_change_of_a_module_is_found(source: str) -> None:
    changed = {"train.new": source, "store.errors": "x = {}\n"}
    assert shared_state(changed) == {"train.new.x"}


@pytest.mark.parametrize(
    "source",
    [
        "x = (1, 2)\ndef f():\n    return x[0]",
        "x = {}\ndef f():\n    x = {}\n    x[1] = 2",
        "x = {}\ndef f(x):\n    x.append(1)",
        "@functools.cache\ndef x(line: str) -> int:\n    return 1",
    ],
)
def test_shared_state_constants_and_locals_are_not_state(source: str) -> None:
    assert shared_state({"train.new": source}) == set()


def test_untyped_functions_project_has_only_known_ones() -> None:
    assert untyped_functions(project()) == KNOWN_UNTYPED


@pytest.mark.parametrize(
    ("signature", "is_found"),
    [
        ("x: Any", True),
        ("x: Any | None = None", True),
        ("*, x: Any", True),
        ("**options: Any", True),
        (") -> Any | None:\n    def g(", True),
        ("x: dict[str, Any]", False),
        ("x: NDArray[Any]", False),
        ("x: int", False),
    ],
)
def test_untyped_functions_any_in_a_signature_is_found(signature: str, is_found: bool) -> None:
    found = untyped_functions({"train.new": f"def f({signature}): ..."})
    assert found == ({"train.new.f"} if is_found else set())


def test_exceptions_are_still_needed() -> None:
    used = {name for name in project() if "Any" in project()[name]}
    assert used >= LIBRARY_EDGES
    assert set(project()) >= CONTRACTS
