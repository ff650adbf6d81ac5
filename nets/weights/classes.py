"""Classes, functions and dtypes that a weights file may name, as data.

Constructors that torch's reader would call with arguments from the file are excluded:
`torch.Tensor(10**9)` takes 4 GB.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

ELEMENT_BYTES = {  # by the class of a storage
    **dict.fromkeys(("BoolStorage", "ByteStorage", "CharStorage", "UntypedStorage"), 1),
    **dict.fromkeys(("QInt8Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}
DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("qint8", "quint8", "qint32", "quint4x2", "quint2x4"),
)
# Classes whose objects only store their arguments. Such objects are read as empty ones.
INERT = {
    **dict.fromkeys(("argparse.Namespace", "pathlib.PosixPath", "pathlib._local.PosixPath"), ""),
    **dict.fromkeys(("torch.device", "torch.serialization._get_layout"), ""),
    "torch._utils._rebuild_sparse_tensor": "sparse tensor",
    "torch._utils._rebuild_qtensor": "quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta tensor",
}
VALUES = (  # named, never called
    *(f"torch.{name}" for name in DTYPES),
    *(f"torch.{name}" for name in ELEMENT_BYTES),
    *("torch.storage.UntypedStorage", "torch.Tensor", "torch.nn.parameter.Parameter"),
    *(f"torch.per_{kind}_affine" for kind in ("tensor", "channel")),
    "torch.per_channel_affine_float_qparams",
)
TENSOR_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")


class Storage(NamedTuple):
    """A contiguous array of numbers: its class, such as `FloatStorage`, and its length."""

    kind: str
    key: Hashable
    length: int

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.kind]

    @property
    def num_bytes(self) -> int:
        return self.length * self.element_bytes


@dataclass(frozen=True)
class Other:
    """A value that is neither a tensor nor a plain value. `kind`: its description or class."""

    kind: str
