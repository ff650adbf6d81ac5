"""Import user code named in a config as `package.module:name`, and locate its errors.

The loaded bytes of a module are also the hashed bytes, because results are identified by a digest
of the code that made them. The digest covers the named file, but not the modules it imports.
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
    """A module named in a config that cannot be imported or lacks the given name."""


def import_named(module: str, name: str) -> object:
    """Return the object `name` of a module. Raises CannotImport for any error in the module."""
    try:
        found: object = getattr(load_module(module), name)
        return found
    except CannotImport:
        raise
    except ModuleNotFoundError as error:
        fix = "put the module on Python's path, or correct its name"
        raise CannotImport(one_line(error), fix=fix) from None
    except AttributeError as error:
        raise CannotImport(one_line(error), fix="correct the name after the colon") from None
    except Exception as error:
        said, place = f"{type(error).__name__}: {one_line(error)}", _place(error)
        fix = f"correct {place}" if place else "write package.module:name"
        raise CannotImport(f"{said} in {place}" if place else said, fix=fix) from error


def _place(error: Exception) -> str:
    """Return the last line of user code in an error's traceback; "" if there is none."""
    if isinstance(error, SyntaxError):
        return f"{one_line(error.filename)}, line {error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "importlib" not in frame.filename:
            is_ours = frame.filename == __file__
            return "" if is_ours else f"{one_line(frame.filename)}, line {frame.lineno}"
    return ""


# ---- hashing and loading

_SHA256 = "__teach_once_sha256__"  # attribute of a module: sha256 of its source
# The last returned sha256 of modules not loaded yet; results are identified by it.
_promised: dict[str, str | None] = {}


def module_sha256(module: str) -> str | None:
    """Return the sha256 of the file of `package.module`; None if there is no such file.

    For a module that this process has already loaded, it is the sha256 of the loaded file, even if
    the file has changed since, because Python does not load it again.
    """
    if (found := sys.modules.get(module)) is not None:
        if _SHA256 not in vars(found):
            setattr(found, _SHA256, _file_sha256(module))  # loaded by other code
        sha256: str | None = vars(found)[_SHA256]
        return sha256
    _promised[module] = _file_sha256(module)
    return _promised[module]


def load_module(module: str) -> ModuleType:
    """Import a user's module from the bytes that `module_sha256` hashes.

    Raises ImportError if it fails, and CannotImport if the file has changed since it was hashed.
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
    """A loader that compiles the hashed bytes and ignores cached bytecode."""

    sha256: str | None = None

    def get_code(self, fullname: str) -> CodeType:
        content = self.get_data(self.path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        if _promised.pop(fullname, self.sha256) != self.sha256:
            raise CannotImport(
                f"{self.path} has changed since this command began", fix="run the command again"
            )
        code: CodeType = self.source_to_code(content, self.path)
        return code


def _file_sha256(module: str) -> str | None:
    spec = _spec(module)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def _spec(module: str) -> ModuleSpec | None:
    """Find a module folder by folder; `importlib.util.find_spec` would import its packages."""
    spec, folders, name = None, None, ""
    for part in module.split("."):
        name = f"{name}.{part}".lstrip(".")
        spec = PathFinder.find_spec(name, folders)
        if spec is None:
            break
        folders = spec.submodule_search_locations or []
    return spec or _spec_by_any_finder(module)


def _spec_by_any_finder(module: str) -> ModuleSpec | None:
    """Find a module with any finder, because editable installs have their own."""
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
