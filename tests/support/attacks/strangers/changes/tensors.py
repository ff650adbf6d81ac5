"""Changes of every entry of a file of tensors, and of the file as a container."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.support.attacks.strangers.changes.change import Change, byte_rewrites, rewriting
from tests.support.attacks.strangers.changes.places import place_changes
from tests.support.attacks.strangers.changes.seals import Seal

Place = tuple[Any, ...]
_ODD: dict[str, Any] = {
    "None": None,
    "True": True,
    "-1": -1,
    "0": 0,
    "huge": 10**18,
    "beyond 64 bits": 10**40,
    "0.5": 0.5,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "text": "x",
    "escapes": "\x1b[31mred\n",
    "a path": "../../evil",
    "empty list": [],
    "empty dict": {},
    "nested": [[[[[[[[[[1]]]]]]]]]],
    "a tensor": torch.zeros(3),
    "an empty tensor": torch.zeros(0),
}


def tensor_changes(file: Path, seal: Seal | None = None) -> Iterator[Change]:
    content = torch.load(file, weights_only=True)
    for place, value in _fields(content):
        name = ".".join(map(str, place))
        for label, odd in _ODD.items():
            yield _edit("field", f"{name} = {label}", _setting(place, odd), seal)
        yield _edit("absent", f"{name} removed", _removing(place), seal)
        for label, change in _odd_tensors(value):
            yield _edit("tensor", f"{name} {label}", _changing(place, change), seal)
        if isinstance(value, dict):
            yield _edit("extra", f"{name}: a key more", _setting((*place, "evil"), 1), seal)
            yield _edit("extra", f"{name}: a number as key", _setting((*place, 7), 1), seal)
            yield _edit("nested", f"{name} holds itself", _self_nested(place), seal)
    for label, edit in _WHOLE.items():
        yield _edit("document", label, edit, seal)
    yield from (Change("container", name, put) for name, put in _CONTAINERS.items())
    size = file.stat().st_size
    yield from (Change(k, n, rewriting(r)) for k, n, r in byte_rewrites(b"x" * size, 200))
    yield from place_changes(is_folder=False)


def _fields(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield every entry of dicts and short lists; of many tensors the first, middle and last."""
    if place:
        yield place, value
    if isinstance(value, dict):
        keys = list(value)
        for key in keys if len(keys) < 12 else (keys[0], keys[len(keys) // 2], keys[-1]):
            yield from _fields(value[key], (*place, key))
    elif isinstance(value, (list, tuple)) and len(value) < 12:
        for number, item in enumerate(value):
            yield from _fields(item, (*place, number))


def _odd_tensors(value: Any) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    if isinstance(value, torch.Tensor):
        yield from _ODD_TENSORS.items()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield "one more", lambda n: n + 1
        yield "negative", lambda n: -n - 1
        yield "a million times", lambda n: n * 10**6 + 10**6


def _nan_at_start(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone().float()
    changed.view(-1)[:1] = float("nan")
    return changed


def _quantized(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


_ODD_TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "has another shape": lambda t: torch.zeros(*t.shape, 2),
    "is flat": lambda t: t.reshape(-1),
    "is a scalar": lambda t: torch.zeros(()),
    "has one row": lambda t: t[:1] if t.ndim else t[None],
    "has no rows": lambda t: torch.zeros(0, *t.shape[1:]),
    "is float64": lambda t: t.double(),
    "is float16": lambda t: t.half(),
    "is int64": lambda t: t.long(),
    "is bool": lambda t: t.bool(),
    "is complex": lambda t: t.to(torch.complex64),
    "is meta": lambda t: t.to("meta"),
    "is sparse": lambda t: t.to_sparse() if t.ndim else torch.zeros(3).to_sparse(),
    "is quantized": _quantized,
    "is one value, expanded": lambda t: torch.zeros(1).expand(t.shape) if t.ndim else t,
    "is one value, expanded to 4 GB": lambda t: torch.zeros(1).expand(10**9),
    "is transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim else t,
    "overlaps itself": lambda t: torch.zeros(8).as_strided((4, 4), (1, 1)),
    "is a parameter": lambda t: torch.nn.Parameter(t.float()),
    "begins with NaN": _nan_at_start,
    "is infinite": lambda t: torch.full_like(t.float(), float("inf")),
    "is conjugated": lambda t: torch.zeros(3, dtype=torch.complex64).conj(),
    "is negated in a view": lambda t: torch._neg_view(t.float()),
}


def _edit(kind: str, name: str, edit: Callable[[Any], Any], seal: Seal | None) -> Change:
    def apply(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        torch.save(edit(content), path)
        if seal is not None:
            seal(path)

    return Change(kind, name, apply, seal is not None)


def _holder(content: Any, place: Place) -> Any:
    for key in place[:-1]:
        content = content[key]
    return content


def _setting(place: Place, value: Any) -> Callable[[Any], Any]:
    return _changing(place, lambda old: value)


def _changing(place: Place, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def edit(content: Any) -> Any:
        holder = _holder(content, place)
        old = holder[place[-1]] if isinstance(holder, list) else holder.get(place[-1])
        holder[place[-1]] = change(old)
        return content

    return edit


def _removing(place: Place) -> Callable[[Any], Any]:
    def edit(content: Any) -> Any:
        del _holder(content, place)[place[-1]]
        return content

    return edit


def _self_nested(place: Place) -> Callable[[Any], Any]:
    def edit(content: Any) -> Any:
        holder = _holder(content, (*place, ""))
        holder["itself"] = holder
        return content

    return edit


_WHOLE: dict[str, Callable[[Any], Any]] = {
    "is a list": lambda c: [c],
    "is a tensor": lambda c: torch.zeros(3),
    "is None": lambda c: None,
    "is empty": lambda c: {},
    "is under state_dict": lambda c: {"state_dict": c},
    "is under model, nested in itself": lambda c: c | {"model": c},
    "has 100,000 keys more": lambda c: {**c, **{f"k{n}": n for n in range(100_000)}},
    "has a gigabyte of zeros": lambda c: {**c, "zeros": torch.zeros(1).expand(2**28)},
}


class _Program:
    """An object whose unpickling would run a program."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch PWNED",)


def _members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _with_program(path: Path) -> None:
    members = _members(path)
    (name,) = (n for n in members if n.endswith("data.pkl"))
    _zipped(path, {**members, name: pickle.dumps(_Program())})


def _deflated_bomb(path: Path) -> None:
    """Write a file of a few megabytes whose only tensor takes more than a gigabyte."""
    buffer = io.BytesIO()
    content = torch.load(path, weights_only=True)
    torch.save({**content, "big": torch.zeros(2**10)}, buffer)
    path.write_bytes(buffer.getvalue())
    members = _members(path)
    largest = max((n for n in members if "/data/" in n), key=lambda n: len(members[n]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in members.items():
            with archive.open(name, "w", force_zip64=True) as member:
                if name != largest:
                    member.write(data)
                    continue
                for _ in range(1200):
                    member.write(bytes(2**20))


_CONTAINERS: dict[str, Callable[[Path], Any]] = {
    "is a plain pickle": lambda p: p.write_bytes(pickle.dumps({"network": {}})),
    "is a pickle that runs a program": lambda p: p.write_bytes(pickle.dumps(_Program())),
    "holds a pickle that runs a program": _with_program,
    "is deflated": lambda p: _zipped(p, _members(p), zipfile.ZIP_DEFLATED),
    "is a deflated bomb": _deflated_bomb,
    "is an empty archive": lambda p: _zipped(p, {}),
    "is an archive of another kind": lambda p: _zipped(p, {"../../evil": b"x"}),
    "lacks a tensor": lambda p: _zipped(p, dict(list(_members(p).items())[:-3])),
    "has a member twice": lambda p: _append(p, "evil", b"x"),
    "is in the older format": lambda p: torch.save(
        torch.load(p, weights_only=True), p, _use_new_zipfile_serialization=False
    ),
}


def _append(path: Path, name: str, content: bytes) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, content)
