"""Imports what a config names as `package.module:name`, and says where the user's module fails.

What is hashed of a module is what was loaded: results are filed by the digest of the code that made
them. It covers the named file, not what that imports.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from teach_once.runtime.errors import UserError
from teach_once.runtime.safe.text import one_line


class CannotImport(UserError):
    """A module that a config names cannot be imported, or lacks the name."""


def import_named(module: str, name: str) -> object:
    """Return the object `name` of a module. Raises CannotImport for any error in the module."""
    try:
        found: object = getattr(load_module(module), name)
        return found
    except CannotImport:
        raise
    except ModuleNotFoundError as error:
        fix = "put the module where Python finds it, or correct its name"
        raise CannotImport(one_line(error), fix=fix) from None
    except AttributeError as error:
        raise CannotImport(one_line(error), fix="correct the name after the colon") from None
    except Exception as error:
        said, place = f"{type(error).__name__}: {one_line(error)}", _place(error)
        fix = f"correct {place}" if place else "write package.module:name"
        raise CannotImport(f"{said} in {place}" if place else said, fix=fix) from error


def _place(error: Exception) -> str:
    """The last place in a file of the user's that leads to an error; "" without one."""
    if isinstance(error, SyntaxError):
        return f"{one_line(error.filename)}, line {error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "importlib" not in frame.filename:
            is_ours = frame.filename == __file__
            return "" if is_ours else f"{one_line(frame.filename)}, line {frame.lineno}"
    return ""


# ---- what is hashed and what is loaded

_SHA256 = "__teach_once_sha256__"  # the attribute of a module: of the bytes that it was made from
# Of modules that are not loaded yet: the last sha256 asked for, by which results are filed.
_promised: dict[str, str | None] = {}


def module_sha256(module: str) -> str | None:
    """Return the sha256 of the file of `package.module`; None if there is no such file.

    For a module that this process has loaded, it is the sha256 of the loaded file, even if the file
    has changed since: Python never loads it again.
    """
    if (found := sys.modules.get(module)) is not None:
        if _SHA256 not in vars(found):
            setattr(found, _SHA256, _file_sha256(module))  # loaded by others: as it is now
        sha256: str | None = vars(found)[_SHA256]
        return sha256
    _promised[module] = _file_sha256(module)
    return _promised[module]


def load_module(module: str) -> ModuleType:
    """Import a user's module from the bytes that `module_sha256` hashes.

    Raises ImportError; raises CannotImport if the file has changed since its sha256 was asked for.
    """
    if module in sys.modules:
        module_sha256(module)
        return sys.modules[module]
    parent, _, name = module.rpartition(".")
    if parent:
        importlib.import_module(parent)
    spec = importlib.util.find_spec(module)
    if spec is None or type(spec.loader) is not SourceFileLoader:
        return importlib.import_module(module)
    spec.loader = loader = _HashingLoader(module, spec.loader.path)
    made = importlib.util.module_from_spec(spec)
    sys.modules[module] = made
    try:
        loader.exec_module(made)
    except BaseException:
        sys.modules.pop(module, None)
        raise
    setattr(made, _SHA256, loader.sha256)
    if parent:
        setattr(sys.modules[parent], name, made)
    return made


class _HashingLoader(SourceFileLoader):
    """Compiles what it has hashed: no bytecode of an earlier file with the same time and size."""

    sha256: str | None = None

    def get_code(self, fullname: str) -> CodeType:
        content = self.get_data(self.path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        if _promised.pop(fullname, self.sha256) != self.sha256:
            raise CannotImport(
                f"{self.path} has changed since this command began", fix="the same command again"
            )
        code: CodeType = self.source_to_code(content, self.path)
        return code


def _file_sha256(module: str) -> str | None:
    spec = _spec(module)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def _spec(module: str) -> ModuleSpec | None:
    """Found folder by folder: `importlib.util.find_spec` would import the packages above it."""
    spec, folders, name = None, None, ""
    for part in module.split("."):
        name = f"{name}.{part}".lstrip(".")
        spec = PathFinder.find_spec(name, folders)
        if spec is None:
            break
        folders = spec.submodule_search_locations or []
    return spec or _spec_by_any_finder(module)


def _spec_by_any_finder(module: str) -> ModuleSpec | None:
    """Packages in editable installs have finders of their own."""
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
