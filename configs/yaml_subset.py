"""Parse the YAML of config files: mappings, lists, text, and plain numbers of YAML 1.2.

`1e-3` is a number, `no` is a string, and `0100` and `1:30` are not numbers. Rejects tags, merge
keys, dates, keys that are not text, duplicate keys, and nesting or repetition so deep that it can
only be an attack or an accident.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from teach_once.runtime.errors import UserError

_MOST_VALUES = 10_000
_MOST_LEVELS = 20
_CORE = "tag:yaml.org,2002:"


class YamlError(UserError, ValueError):
    """Text outside this subset of YAML, with its location."""


class _Loader(yaml.SafeLoader):
    """A loader for six kinds of values; the functions below reject everything else."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._num_nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Stop when there are too many values; reading on could take minutes and gigabytes."""
        self._num_nodes += 1
        self._depth += 1
        if self._num_nodes > 2 * _MOST_VALUES or self._depth > _MOST_LEVELS + 1:
            raise _too_much()
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


_SCALARS = {
    "null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    # Twenty digits suffice for every seed; a longer number remains text and is rejected.
    "int": re.compile(r"[-+]?(?:0|[1-9][0-9]{0,19})\Z"),
    "float": re.compile(
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\Z|[-+]?[0-9]+[eE][-+]?[0-9]+\Z"
    ),
}
_VALUE_OF: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": float,
    "str": str,
}


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> Any:
    kind = node.tag.removeprefix(_CORE)
    text = loader.construct_scalar(node)
    if kind in _SCALARS and not _SCALARS[kind].match(text):  # with a tag, as in !!int big
        raise YamlError(f"{_short(text)} on line {node.start_mark.line + 1} is not a {kind}")
    return _VALUE_OF[kind](text)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            line = key_node.start_mark.line + 1
            raise YamlError(f"a key on line {line} is not text: {_short(key)}")
        if key in found:
            line = key_node.start_mark.line + 1
            raise YamlError(f"line {line}: duplicate key {_short(key)} in one block")
        found[key] = loader.construct_object(value_node, deep=True)
    return found


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return [loader.construct_object(item, deep=True) for item in node.value]


_Loader.yaml_implicit_resolvers = {}
for _kind, _first in (("null", ["~", "n", "N", ""]), ("bool", list("tTfF"))):
    _Loader.add_implicit_resolver(_CORE + _kind, _SCALARS[_kind], _first)
for _kind in ("int", "float"):
    _Loader.add_implicit_resolver(_CORE + _kind, _SCALARS[_kind], list("-+.0123456789"))
_Loader.yaml_constructors = {
    **{_CORE + kind: _scalar for kind in _VALUE_OF},
    f"{_CORE}map": _mapping,
    f"{_CORE}seq": _sequence,
    None: yaml.SafeLoader.construct_undefined,  # rejects every other tag
}


def yaml_text(text: str) -> str:
    """Return text as a YAML value: unquoted if it is read back unchanged, else quoted."""
    return text if re.fullmatch(r"[A-Za-z./~][\w./:~-]*", text) else json.dumps(text)


def parse_yaml(text: str) -> Any:
    """Parse YAML to dicts, lists, strings, numbers, booleans and None. Raises YamlError."""
    try:
        value = yaml.load(text, Loader=_Loader)  # a restricted SafeLoader
    except YamlError:
        raise
    except yaml.YAMLError as error:
        lines = [
            line if len(line) <= 120 else f"{line[:117]}..." for line in str(error).splitlines()
        ]
        raise YamlError("not valid YAML: " + "\n".join(lines)) from None
    except (ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF"
        raise YamlError(f"not valid YAML: {error}") from None
    for number, (path, found) in enumerate(_walk(value, ())):
        if len(path) > _MOST_LEVELS or number >= _MOST_VALUES:
            raise _too_much()
        if isinstance(found, str) and any(unicodedata.category(c) in ("Cc", "Cs") for c in found):
            raise YamlError(f"{'.'.join(map(_short, path))}: control characters in {_short(found)}")
    return value


def _too_much() -> YamlError:
    return YamlError(f"not a config: more than {_MOST_LEVELS} levels or {_MOST_VALUES:,} values")


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every key and value with its path, following aliases; the caller must stop in time."""
    waiting = [(path, value)]
    while waiting:
        path, found = waiting.pop()
        yield path, found
        if isinstance(found, dict):
            for key, item in found.items():
                yield (*path, repr(key)), key
                waiting.append(((*path, key), item))
        elif isinstance(found, list):
            waiting += [((*path, str(number)), item) for number, item in enumerate(found)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
