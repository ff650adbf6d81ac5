"""Compares a packed file's HDF5 structure with its header, so that every program reads the same.

`views.packed_file` reads by the header alone. A forged file could show other shapes or classes to
programs that use the HDF5 library. Only the structure is read here, never an array through HDF5.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import h5py
import numpy as np

from runtime.text import one_line
from views.packed_header import ArrayPlace, Header

_ERRORS = (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError)  # of h5py
_LONGEST_NAME = 2**10


def structure_fault(handle: int, header: Header) -> str | None:
    """Return how HDF5 would show the open file otherwise than the header; None: the same."""
    try:
        with os.fdopen(os.dup(handle), "rb") as raw, h5py.File(raw, "r") as file:
            _check(file, handle, header)
    except _ERRORS as error:
        return f"its HDF5 structure does not match its header: {one_line(error)}"
    return None


def _check(file: h5py.File, handle: int, header: Header) -> None:
    """Raises ValueError, or whatever h5py does."""
    _check_members(file, "", ["class_names", *header.splits])
    _check_class_names(file, handle, header.class_names)
    for split, arrays in header.splits.items():
        _require_plain(file, split)
        _check_members(file[split], f"{split}/", list(arrays))
        _check_arrays(file, split, arrays)


def _check_members(group: h5py.Group, where: str, expected: list[str]) -> None:
    if group.id.get_num_objs() != len(expected):
        raise ValueError(f"{where or 'the file'} has other members than {', '.join(expected)}")


def _check_arrays(file: h5py.File, split: str, arrays: Mapping[str, ArrayPlace]) -> None:
    for name, place in arrays.items():
        dataset = _dataset(file, f"{split}/{name}")
        kind = h5py.h5t.py_create(np.dtype(place.dtype))
        if dataset.shape != tuple(place.shape) or not dataset.get_type().equal(kind):
            raise ValueError(
                f"{split}/{name} is {dataset.dtype} of shape {dataset.shape}, expected "
                f"{np.dtype(place.dtype)} of {tuple(place.shape)}"
            )
        if place.num_bytes and dataset.get_offset() != place.offset:
            raise ValueError(f"{split}/{name} lies elsewhere")


def _check_class_names(file: h5py.File, handle: int, names: list[str]) -> None:
    dataset = _dataset(file, "class_names")
    kind = dataset.get_type()
    is_text = isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
    if not is_text or dataset.shape != (len(names),) or kind.get_size() > _LONGEST_NAME:
        raise ValueError(f"class_names are not {len(names)} names")
    size = kind.get_size()
    content = os.pread(handle, size * len(names), int(dataset.get_offset()))
    found = [content[start : start + size].rstrip(b"\0") for start in range(0, len(content), size)]
    if found != [name.encode() for name in names]:
        raise ValueError("class_names are others, or in another order")


def _require_plain(file: h5py.File, name: str) -> None:
    if file.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise ValueError(f"{name} is a link to something else")


def _dataset(file: h5py.File, name: str) -> h5py.h5d.DatasetID:
    """The dataset of that name, whose bytes lie in this file as they are."""
    _require_plain(file, name)
    found = h5py.h5o.open(file.id, name.encode())
    if not isinstance(found, h5py.h5d.DatasetID):
        raise ValueError(f"{name} is not a dataset")
    properties = found.get_create_plist()
    is_plain = properties.get_layout() == h5py.h5d.CONTIGUOUS
    if not is_plain or properties.get_external_count() or properties.get_nfilters():
        raise ValueError(f"{name} is not a contiguous dataset of this file")
    return found
