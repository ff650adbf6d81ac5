"""Changes of every attribute and dataset of an HDF5 file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.support.attacks.strangers.changes.change import (
    Change,
    Rewrites,
    byte_rewrites,
    outside_of,
    rewriting,
)
from tests.support.attacks.strangers.changes.places import place_changes
from tests.support.attacks.strangers.changes.seals import Seal

_ODD_ATTRIBUTES: dict[str, Any] = {
    "a number": 7,
    "negative": -1,
    "a fraction": 0.5,
    "NaN": float("nan"),
    "huge number": 2**62,
    "empty": h5py.Empty("i4"),
    "empty text": "",
    "text": "../../evil",
    "escapes": "\x1b[31mred",
    "long text": "x" * 60_000,
    "JSON list": "[]",
    "JSON null": "null",
    "JSON with odd digests": '{"all": 5, "test": ["x"]}',
    "deep JSON": "[" * 30_000,
    "no text": np.bytes_(b"\xff\xfe"),
    "array": np.arange(5),
    "array of text": np.array([b"a", b"b"]),
    "64-bit checksums": np.full((2, 2), 2**40),
    "float checksums": np.full((2, 2), 0.5),
    "no checksums": np.zeros((0, 0), dtype="u4"),
}
_HUGE_ROWS = 10**12


def hdf5_changes(file: Path, seal: Seal | None = None, nested: Rewrites | None = None):
    """Yield all changes; seal: recomputes checksums; nested: rewrites of the JSON in `manifest`."""
    for kind, name, rewrite in byte_rewrites(file.read_bytes(), flips=200):
        yield Change(kind, name, rewriting(rewrite))
    with h5py.File(file) as content:
        places = _places(content)
    for place, is_dataset, attributes in places:
        for name in attributes:
            yield from _attribute_changes(place, name)
        yield _edit("extra", f"{place} gets an attribute more", place, _set_attribute("evil", 1))
        if place != "/":
            for kind, name, edit in _link_edits(is_dataset):
                yield _edit(kind, f"{place} {name}", place, edit, seal)
        if is_dataset:
            for kind, name, edit in _data_edits():
                yield _edit(kind, f"{place} {name}", place, edit, seal)
                yield _edit(kind, f"{place} {name} (not sealed)", place, edit)
    yield _edit("extra", "a dataset more", "/", lambda c, p: c.create_dataset("evil", data=1), seal)
    for kind, name, rewrite in nested or ():
        edit = _rewrites_manifest(rewrite)
        yield _edit(kind, f"manifest: {name}", "/", edit, seal)
    yield from place_changes(is_folder=False)


def _places(content: h5py.File) -> list[tuple[str, bool, list[str]]]:
    """Return (path, True for a dataset, names of its attributes) of all objects."""
    found = [("/", False, list(content.attrs))]
    content.visititems(
        lambda name, item: found.append((name, isinstance(item, h5py.Dataset), list(item.attrs)))
    )
    return found


Edit = Callable[[h5py.File, str], Any]


def _edit(kind: str, name: str, place: str, edit: Edit, seal: Seal | None = None) -> Change:
    def apply(path: Path) -> None:
        with h5py.File(path, "r+") as content:
            edit(content, place)
        if seal is not None:
            seal(path)

    return Change(kind, name, apply, seal is not None)


def _attribute_changes(place: str, name: str) -> Iterator[Change]:
    for label, value in _ODD_ATTRIBUTES.items():
        edit = _set_attribute(name, value)
        yield _edit("attribute", f"{place}@{name} is {label}", place, edit)
    yield _edit("absent", f"{place}@{name} removed", place, lambda c, p: c[p].attrs.pop(name))


def _set_attribute(name: str, value: Any) -> Edit:
    def edit(content: h5py.File, place: str) -> None:
        content[place].attrs.pop(name, None)
        content[place].attrs[name] = value

    return edit


def _rewrites_manifest(rewrite: Callable[[bytes], bytes]) -> Edit:
    def edit(content: h5py.File, place: str) -> None:
        text = rewrite(bytes(content["manifest"][()]))
        outside = str(outside_of(Path(content.filename))).encode()
        del content["manifest"]
        text = text.replace(b"@OUTSIDE@", outside)
        content.create_dataset("manifest", data=np.array(text, dtype=f"S{max(len(text), 1)}"))

    return edit


def _link_edits(is_dataset: bool) -> Iterator[tuple[str, str, Edit]]:
    """Yield replacements of an object: nothing, a group, links of every kind."""

    def replaced(put: Edit) -> Edit:
        def edit(content: h5py.File, place: str) -> None:
            del content[place]
            put(content, place)

        return edit

    yield "absent", "removed", replaced(lambda c, p: None)
    yield "link", "is a group", replaced(lambda c, p: c.create_group(p))
    for target in ("/manifest", "/nowhere", "/", "."):
        yield "link", f"is a soft link to {target}", replaced(_put(h5py.SoftLink(target)))
    yield "link", "is a soft link to itself", replaced(lambda c, p: _put(h5py.SoftLink(p))(c, p))
    yield "link", "is in another file", _moved_outside
    no_hdf5 = h5py.ExternalLink("../outside/victim", "/x")
    yield "link", "is in a file that is no HDF5", replaced(_put(no_hdf5))
    if is_dataset:
        yield "link", "has its bytes in another file", _with_foreign_bytes
        yield "link", "is virtual", _virtual
        yield "link", "is a named type", replaced(lambda c, p: c.__setitem__(p, np.dtype("i4")))


def _put(link: Any) -> Edit:
    def edit(content: h5py.File, place: str) -> None:
        content[place] = link

    return edit


def _moved_outside(content: h5py.File, place: str) -> None:
    """Move the object behind an external link."""
    target = Path(content.filename).with_name("moved.h5")
    with h5py.File(target, "w") as other:
        content.copy(content[place], other, "x")
    del content[place]
    content[place] = h5py.ExternalLink("moved.h5", "/x")


def _replaced(content: h5py.File, place: str, **options: Any) -> None:
    """Recreate the dataset with other options and the same attributes."""
    attributes = dict(content[place].attrs)
    del content[place]
    data = content.create_dataset(place, **options)
    for name, value in attributes.items():
        data.attrs[name] = value


def _with_foreign_bytes(content: h5py.File, place: str) -> None:
    old = content[place]
    victim = outside_of(Path(content.filename)) / "victim"
    size = max(1, old.size * old.dtype.itemsize)
    options = {"shape": old.shape, "dtype": old.dtype, "external": [(str(victim), 0, size)]}
    _replaced(content, place, **options)


def _virtual(content: h5py.File, place: str) -> None:
    old = content[place]
    if not old.shape:
        raise _NotPossible
    target = Path(content.filename).with_name("moved.h5")
    with h5py.File(target, "w") as other:
        content.copy(old, other, "x")
    layout = h5py.VirtualLayout(old.shape, old.dtype)
    layout[:] = h5py.VirtualSource("moved.h5", "x", old.shape)
    attributes = dict(old.attrs)
    del content[place]
    data = content.create_virtual_dataset(place, layout)
    for name, value in attributes.items():
        data.attrs[name] = value


class _NotPossible(Exception):
    """The change is impossible for this dataset."""


def _data_edits() -> Iterator[tuple[str, str, Edit]]:
    """Yield changes of the values, their number, shape, type and storage."""

    def values(change: Callable[[np.ndarray], np.ndarray], **options: Any) -> Edit:
        def edit(content: h5py.File, place: str) -> None:
            old = np.asarray(content[place][()])
            if not old.ndim or not old.size:
                raise _NotPossible
            try:
                new = change(old)
            except (TypeError, ValueError):
                raise _NotPossible from None
            _replaced(content, place, data=new, **options)

        return edit

    for name, number in (("NaN", np.nan), ("infinite", np.inf), ("-1", -1), ("7", 7), ("1e9", 1e9)):
        yield "values", f"begins with {name}", values(lambda a, n=number: _first_set(a, n))
        yield "values", f"is all {name}", values(lambda a, n=number: np.full_like(a, n))
    yield "values", "reversed", values(lambda a: a[::-1])
    yield "shape", "a row less", values(lambda a: a[:-1])
    yield "shape", "a row more", values(lambda a: np.concatenate([a, a[-1:]]))
    yield "shape", "no rows", values(lambda a: a[:0])
    yield "shape", "flat", values(lambda a: a.reshape(-1))
    yield "shape", "a dimension more", values(lambda a: a[None])
    yield "shape", "a scalar", lambda c, p: _replaced(c, p, data=5)
    for dtype in ("float64", "int16", "int64", ">f4", ">i8", "uint8", "bool", "complex64", "S4"):
        yield "type", f"as {dtype}", values(lambda a, d=dtype: a.astype(d))
    yield "type", "as text", lambda c, p: _replaced(c, p, data=["a", "b"])
    yield "type", "as names with escapes", lambda c, p: _replaced(c, p, data=[b"\x1b[31m", b"$x^$"])
    yield (
        "type",
        "as bytes that are no text",
        lambda c, p: _replaced(c, p, data=[b"\xff\xfe", b"x"]),
    )
    yield "type", "as long names", lambda c, p: _replaced(c, p, data=["y" * 10**6, "x" * 10**6])
    yield "type", "as references", lambda c, p: _replaced(c, p, data=c.ref, dtype=h5py.ref_dtype)
    yield "storage", "compressed", values(lambda a: a, compression="gzip", chunks=True)
    yield "storage", "in chunks, with checksums", values(lambda a: a, fletcher32=True, chunks=True)
    yield "size", "claims to be huge", _claiming(lambda shape: (_HUGE_ROWS, *shape[1:]))
    yield "size", "claims many views", _claiming(lambda shape: (10**9, *shape[1:]))
    yield "size", "claims wide rows", _claiming(lambda shape: (*shape[:-1], 10**10))
    yield "size", "is 2 GB compressed to nothing", _deflated


def _first_set(values: np.ndarray, number: float) -> np.ndarray:
    with np.errstate(all="raise"):
        try:
            values.flat[0] = number
        except (OverflowError, FloatingPointError, ValueError):
            raise _NotPossible from None
    return values


def _claiming(shape_of: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Edit:
    """Return an edit to a chunked dataset without chunks, which claims a large size."""

    def edit(content: h5py.File, place: str) -> None:
        old = content[place]
        if not old.shape:
            raise _NotPossible
        shape, dtype = shape_of(old.shape), old.dtype
        chunks = tuple(min(n, 64) or 1 for n in shape)
        _replaced(content, place, shape=shape, dtype=dtype, chunks=chunks)

    return edit


def _deflated(content: h5py.File, place: str) -> None:
    old = content[place]
    if not old.shape:
        raise _NotPossible
    row_bytes = max(1, math.prod(old.shape[1:]) * old.dtype.itemsize)
    shape = (2**31 // row_bytes, *old.shape[1:])
    options = {"shape": shape, "dtype": old.dtype, "chunks": True, "compression": "gzip"}
    _replaced(content, place, **options)
    content[place][:1000] = np.zeros((1000, *shape[1:]), old.dtype)
