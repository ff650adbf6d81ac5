"""Interpret the pickle in a weights file, without torch and without calling what it names.

This is the only interpreter, and its result is used directly, so no second reader can interpret the
same bytes differently. It supports the operations and classes of state dicts, optimizer states and
the checkpoints of timm's and torchvision's scripts, and rejects all others by name.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

from teach_once.nets.weights.classes import (
    DTYPES,
    ELEMENT_BYTES,
    INERT,
    TENSOR_CLASSES,
    VALUES,
    Other,
    Storage,
)

_T = TypeVar("_T")
_Items = TypeVar("_Items", list[Any], tuple[Any, ...], str)

MOST_PICKLE_BYTES = 8 * 2**20
MOST_OPERATIONS = 10**6  # a tensor takes about 25
_MOST_COPIED = MOST_PICKLE_BYTES  # entries and bytes that the calls of one pickle may copy
_MOST_DIMENSIONS = 64
_MOST_KEY_PARTS = 8
_SMALL = range(-(2**31), 2**31)  # integer keys; thousands of larger integers can share one hash


class BadPickle(ValueError):
    """A pickle that is damaged or requests more than a weights file needs."""


class UnknownClass(BadPickle):
    """A pickle that names an unknown class or function, `name`."""

    def __init__(self, name: str) -> None:
        super().__init__(f"contains an object of class {name} in addition to weights")
        self.name = name


class UnsupportedForm(BadPickle):
    """A valid pickle in a format that torch can read and this module cannot."""


class MakeTensor(Protocol):
    """A function that builds a tensor; `dtype` names its dtype if it differs from the storage's."""

    def __call__(
        self,
        storage: Storage,
        dtype: str | None,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> object: ...


@dataclass(frozen=True)
class _Named:
    """A class, function or dtype that a pickle names."""

    name: str


class Pickled(NamedTuple):
    """The value of a pickle, and its storages by key."""

    content: object
    storages: dict[Hashable, Storage]


def read_pickle(stream: BinaryIO, make_tensor: MakeTensor) -> Pickled:
    """Interpret the pickle at the current position of `stream` and advance past its end.

    Objects of known classes that contain no weights become `Other`. Raises BadPickle; damaged bytes
    may raise any other exception.
    """
    machine = _Machine(make_tensor)
    return Pickled(machine.run(stream), machine.storages)


def _qualified(argument: object) -> str:
    """Return the Python 3 name of a GLOBAL's argument."""
    module, _, name = str(argument).partition(" ")
    return f"{'builtins' if module == '__builtin__' else module}.{name}"


class _Machine:
    """The stack machine that runs a pickle's operations."""

    def __init__(self, make_tensor: MakeTensor) -> None:
        self._make_tensor = make_tensor
        self.storages: dict[Hashable, Storage] = {}
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[object, Any] = {}
        self._copied = 0
        self._operations: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(_PUSHED, self._push),
            **{name: self._pusher(make) for name, make in _FRESH.items()},
            **{name: self._tuple_maker(count) for name, count in _TUPLES.items()},
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._put),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda at: self._push(self._memo[at])),
            "MARK": self._mark,
            "TUPLE": lambda _: self._push(tuple(self._above_mark())),
            "APPEND": lambda _: self._append([self._stack.pop()]),
            "APPENDS": lambda _: self._append(self._above_mark()),
            "SETITEM": lambda _: self._set_items([self._stack.pop(-2), self._stack.pop()]),
            "SETITEMS": lambda _: self._set_items(self._above_mark()),
            "GLOBAL": self._name,
            "REDUCE": self._call,
            "NEWOBJ": self._new_object,
            "BUILD": self._build,
            "BINPERSID": lambda _: self._push(self._storage(self._stack.pop())),
        }
        self._calls: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": lambda pairs=(): self._dict(OrderedDict(), pairs),
            "collections.Counter": lambda counts: self._dict({}, _of_type(dict, counts).items()),
            "builtins.set": lambda items: set(map(_key, self._spend(_of_type(list, items)))),
            "builtins.complex": lambda real, imaginary: complex(float(real), float(imaginary)),
            "torch.Size": lambda sizes: self._spend(_of_type(tuple, sizes)),
            "_codecs.encode": self._encode,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor_v2,
            "torch._utils._rebuild_tensor_v3": self._tensor_v3,
            "torch._utils._rebuild_parameter": lambda data, grad, hooks: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, grad, hooks, state: data,
            "torch._tensor._rebuild_from_type_v2": self._with_attributes,
            **{name: self._inert(name) for name in INERT},
        }

    def run(self, stream: BinaryIO) -> object:
        for number, (operation, argument, _) in enumerate(pickletools.genops(stream)):
            if number >= MOST_OPERATIONS:
                raise BadPickle(f"holds more than {MOST_OPERATIONS:,} operations")
            if operation.name == "PROTO":
                if number or argument != 2:
                    raise BadPickle("is not a pickle of protocol 2, in which torch saves")
            elif operation.name == "STOP":
                (content,) = self._stack
                return content
            elif (work := self._operations.get(operation.name)) is None:
                raise BadPickle(f"has the operation {operation.name}, which no weights need")
            else:
                work(argument)
        raise BadPickle("is truncated")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pusher(self, make: Callable[[], Any]) -> Callable[[Any], None]:
        return lambda _: self._push(make())

    def _tuple_maker(self, count: int) -> Callable[[Any], None]:
        def make(_: Any) -> None:
            if len(self._stack) < count:
                raise BadPickle("takes more values than its stack has")
            self._stack[-count:] = [tuple(self._stack[-count:])]

        return make

    def _put(self, at: object) -> None:
        self._memo[at] = self._stack[-1]

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _above_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _append(self, items: list[Any]) -> None:
        _of_type(list, self._stack[-1]).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise BadPickle(f"sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _name(self, argument: object) -> None:
        name = _qualified(argument)
        if name not in self._calls and name not in VALUES:
            raise UnknownClass(name.removeprefix("builtins."))
        self._push(_Named(name))

    def _call(self, _: Any) -> None:
        arguments, function = _of_type(tuple, self._stack.pop()), self._stack.pop()
        if not isinstance(function, _Named) or function.name not in self._calls:
            raise BadPickle("calls a value that is not a function")
        self._push(self._calls[function.name](*arguments))

    def _new_object(self, _: Any) -> None:
        self._stack.pop()
        found = self._stack.pop()
        if not isinstance(found, _Named) or found.name not in INERT:
            raise BadPickle("creates an object of a class that does not support it")
        self._push(Other(found.name))

    def _build(self, _: Any) -> None:
        """Set the state of the object on the stack; for an OrderedDict, only its metadata."""
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, OrderedDict):
            if isinstance(state, dict) and isinstance(state.get("_metadata"), dict):
                target._metadata = state["_metadata"]  # type: ignore[attr-defined]
        elif not isinstance(target, Other):
            raise BadPickle(f"sets the state of a {type(target).__name__}")

    def _spend(self, items: _Items) -> _Items:
        """Count items against the limit and return them.

        A short pickle could otherwise request many copies of a long value. Raises BadPickle beyond
        the limit.
        """
        self._copied += len(items)
        if self._copied > _MOST_COPIED:
            raise BadPickle("requests more memory than weights need")
        return items

    def _dict(self, target: dict[Any, Any], pairs: Any) -> dict[Any, Any]:
        for key, value in self._spend(list(pairs)):
            target[_key(key)] = value
        return target

    def _encode(self, text: Any, encoding: Any) -> bytes:
        if encoding != "latin1":
            raise BadPickle("uses a text encoding that pickle does not use")
        return self._spend(_of_type(str, text)).encode("latin-1")

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> object:
        return self._view(storage, None, offset, size, stride)

    def _tensor_v2(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        grad: Any,
        hooks: Any,
        metadata: Any = None,
    ) -> object:
        if metadata:  # the tensor's values differ from the numbers in the file
            return Other("conjugated or negated tensor")
        return self._view(storage, None, offset, size, stride)

    def _tensor_v3(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        grad: Any,
        hooks: Any,
        dtype: Any,
        metadata: Any = None,
    ) -> object:
        if metadata:
            return Other("conjugated or negated tensor")
        return self._view(storage, _of_type(_Named, dtype).name, offset, size, stride)

    def _view(self, storage: Any, dtype: str | None, offset: Any, size: Any, stride: Any) -> object:
        if dtype is not None and dtype.removeprefix("torch.") not in DTYPES:
            raise BadPickle(f"has a tensor of type {dtype}")
        if _of_type(Storage, storage).kind.startswith("Q"):
            return Other("quantized tensor")
        for numbers in ((offset,), size, stride):
            _check_sizes(numbers)
        return self._make_tensor(storage, dtype, offset, size, stride)

    def _with_attributes(self, function: Any, kind: Any, arguments: Any, state: Any) -> object:
        """Build a tensor without its attributes, which are ignored."""
        if _of_type(_Named, kind).name not in TENSOR_CLASSES:
            raise UnknownClass(kind.name)
        self._stack += [function, arguments]
        self._call(None)
        return self._stack.pop()

    def _storage(self, persistent_id: Any) -> Storage:
        """Build a storage from its id: "storage", class, key, device, length, optional view."""
        tag, kind, key, _, length, *view = _of_type(tuple, persistent_id)
        name = _of_type(_Named, kind).name.rpartition(".")[2]
        if tag != "storage" or name not in ELEMENT_BYTES:
            raise BadPickle("refers to an object that is not a storage")
        if view not in ([], [None]):
            raise UnsupportedForm("has views of storages, as written by torch before 0.4")
        _check_sizes((length,))
        storage = Storage(name, _key(key), length)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise BadPickle("gives one storage two descriptions")
        return storage

    def _inert(self, name: str) -> Callable[..., Other]:
        return lambda *_: Other(INERT[name] or name)


_PUSHED = (*("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),)
_FRESH: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _of_type(kind: type[_T], value: Any) -> _T:
    if not isinstance(value, kind):
        raise BadPickle(f"has a {type(value).__name__} in place of a {kind.__name__}")
    return value


def _key(value: Any) -> Hashable:
    """Return `value` if hashing it has a bounded cost; otherwise raises BadPickle."""
    parts = value if isinstance(value, tuple) and len(value) <= _MOST_KEY_PARTS else (value,)
    for part in parts:
        if isinstance(part, int) and part in _SMALL:
            continue
        if part is not None and not isinstance(part, str | bytes):
            raise BadPickle(f"has a {type(part).__name__} as a key")
    found: Hashable = value
    return found


def _check_sizes(numbers: Any) -> None:
    """Raise BadPickle unless these numbers are a valid shape."""
    if not isinstance(numbers, tuple) or len(numbers) > _MOST_DIMENSIONS:
        raise BadPickle("has a tensor of too many dimensions")
    if any(not isinstance(each, int) or not 0 <= each < 2**63 for each in numbers):
        raise BadPickle("has a tensor of an impossible shape")
