"""The pickles allowed in weights files, with the same result as torch's reader."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teach_once.nets.networks.archs import ArchError
from teach_once.nets.weights.classes import Other
from teach_once.nets.weights.files import load_weights, read_tensors
from tests.support.training.forged_weights import forged_pickle


def refusal(path: Path) -> str:
    with pytest.raises(ArchError) as caught:
        read_tensors(path)
    return str(caught.value)


def tied() -> dict[str, Tensor]:
    weight = torch.randn(4, 3)
    return {"a": weight, "b": weight, "row": weight[1], "transposed": weight.T}


def with_attribute() -> dict[str, Any]:
    weight = nn.Parameter(torch.randn(3))
    weight.tag = "mine"  # type: ignore[attr-defined]
    return {"weight": weight}


def of_many_types() -> dict[str, Tensor]:
    whole = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    parts = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
    return {str(dtype): torch.arange(-3, 4).to(dtype) for dtype in (*whole, *parts, torch.bool)}


def of_a_script() -> dict[str, Any]:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60])
    return {
        "model": {f"module.{key}": value for key, value in network.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "rng": torch.get_rng_state(),
        "best": (1, 2.5, True, None, b"\xff\x00", complex(1, 2), {3, "x"}, 2**70, torch.Size([2])),
    }


CONTENTS: dict[str, Callable[[], Any]] = {
    "state dict": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict(),
    "tied": tied,
    "parameters": lambda: dict(nn.Linear(3, 2).named_parameters()),
    "attribute": with_attribute,
    "types": of_many_types,
    "script": of_a_script,
    "shapes": lambda: {"none": torch.ones(0, 3), "scalar": torch.tensor(2.0), "cut": tied()["row"]},
    "counter": lambda: {"milestones": collections.Counter([30, 60, 60])},
}


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
        assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for own, other in zip(found, expected, strict=True):
            assert_same(own, other)
    else:
        assert (type(found), found) == (type(expected), expected)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("content_of", CONTENTS.values(), ids=CONTENTS)
def test_reading_a_file_gives_what_torch_reads(
    tmp_path: Path, content_of: Callable[[], Any], new_format: bool
) -> None:
    path = tmp_path / "w.pt"
    torch.save(content_of(), path, _use_new_zipfile_serialization=new_format)
    assert_same(read_tensors(path), torch.load(path, weights_only=True))


def test_types_of_number_without_a_storage_of_their_own_are_read(tmp_path: Path) -> None:
    content = {"weight": torch.tensor([3, 2**16 - 1], dtype=torch.uint16)}
    torch.save(content, tmp_path / "w.pt")
    assert_same(read_tensors(tmp_path / "w.pt"), content)


def test_a_tensor_that_was_read_is_saved_without_the_rest_of_its_file(tmp_path: Path) -> None:
    torch.save({"small": torch.ones(3), "large": torch.ones(10**5)}, tmp_path / "w.pt")
    torch.save(read_tensors(tmp_path / "w.pt")["small"], tmp_path / "small.pt")
    assert (tmp_path / "small.pt").stat().st_size < 5000


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_values_that_only_hold_settings_are_read_without_being_made(
    tmp_path: Path, new_format: bool
) -> None:
    args = argparse.Namespace(lr=0.1, out=Path("out"), device=torch.device("cpu"))
    content = {"model": nn.Linear(2, 1).state_dict(), "args": args, "out": Path("x")}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=new_format)
    found = read_tensors(tmp_path / "w.pt")
    assert found["args"] == Other("argparse.Namespace")
    assert found["out"] == Other("pathlib.PosixPath")


@pytest.mark.parametrize("kind", ["conj", "neg"])
def test_a_tensor_whose_numbers_are_changed_on_reading_is_refused(
    tmp_path: Path, kind: str
) -> None:
    numbers = torch.ones(2, 3, dtype=torch.complex64).conj()
    tensor = numbers if kind == "conj" else numbers.imag
    torch.save({"weight": tensor, "bias": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(ArchError, match="weight is a conjugated or negated tensor"):
        load_weights(nn.Linear(3, 2), tmp_path / "w.pt")


# The form before torch 1.6: magic, protocol, machine, content, keys; then the storages.


def legacy(path: Path, change: Callable[[list[Any]], None], data: bytes | None = None) -> Path:
    """A file with two tensors, whose list of keys was changed. data: in place of their storages."""
    buffer = io.BytesIO()
    content = {"a": torch.full((3,), 1.5), "b": torch.full((5,), 2.5)}
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    buffer.seek(0)
    for _ in range(4):
        _skip(buffer)
    start = buffer.tell()
    keys = pickle.load(buffer)  # noqa: S301 - this test saved it
    rest = buffer.read() if data is None else data
    change(keys)
    path.write_bytes(buffer.getvalue()[:start] + pickle.dumps(keys, protocol=2) + rest)
    return path


def _skip(stream: io.BytesIO) -> None:
    for _ in pickletools.genops(stream):
        pass


@pytest.mark.parametrize(
    ("change", "data"),
    [
        (lambda keys: keys.clear(), b""),
        (lambda keys: keys.clear(), None),
        (lambda keys: keys.pop(), None),
        (lambda keys: keys.append("7"), None),
        (lambda keys: keys.append(keys[0]), None),
        (lambda keys: keys.reverse(), None),
        (lambda keys: None, b""),
        (lambda keys: None, struct.pack("<q", 3) + bytes(12) + struct.pack("<q", 5) + bytes(19)),
        (lambda keys: None, struct.pack("<q", 2) + bytes(12) + struct.pack("<q", 5) + bytes(20)),
    ],
    ids=["none", "unlisted", "one", "more", "twice", "order", "no bytes", "truncated", "length"],
)
def test_a_legacy_file_that_lacks_a_storage_is_refused(
    tmp_path: Path, change: Callable[[list[Any]], None], data: bytes | None
) -> None:
    """torch gives the tensors that it does not read whatever is in memory."""
    assert "w.pt is not a readable weights file" in refusal(legacy(tmp_path / "w.pt", change, data))


def test_an_unchanged_legacy_file_is_read(tmp_path: Path) -> None:
    found = read_tensors(legacy(tmp_path / "w.pt", lambda keys: None))
    assert found["a"].tolist() == [1.5] * 3
    assert found["b"].tolist() == [2.5] * 5


def test_any_cut_of_a_legacy_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(nn.Linear(3, 2).state_dict(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for kept in range(0, len(whole), 7):
        path.write_bytes(whole[:kept])
        assert "w.pt is not a readable weights file" in refusal(path)


# Pickles that ask for much with few bytes.

LONG = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20 + b"q\x01"
NUMBERS = b"](" + b"".join(b"M" + struct.pack("<H", n) for n in range(2**15)) + b"eq\x01"


def repeated(call: bytes, times: int) -> Callable[[bytes], bytes]:
    """{0: the call's result, 1: ...}, after the constant that the calls use."""
    constant = NUMBERS if b"Counter" in call or b"set" in call or b"Size" in call else LONG
    calls = b"".join(b"M" + struct.pack("<H", n) + call for n in range(times))
    return lambda old: b"\x80\x02}(X\1\0\0\0x" + constant + calls + b"u."


@pytest.mark.parametrize(
    ("forge", "told"),
    [
        (repeated(b"c_codecs\nencode\nh\x01X\x06\0\0\0latin1\x86R", 40), "requests more memory"),
        (repeated(b"ccollections\nCounter\nh\x01\x85R", 1), "in place of a dict"),
        (repeated(b"cbuiltins\nset\nh\x01\x85R", 400), "requests more memory"),
        pytest.param(  # Python 2's name, which stands for the line above
            *(repeated(b"c__builtin__\nset\nh\x01\x85R", 400), "requests more memory"),
            marks=pytest.mark.long,
        ),
        (repeated(b"ctorch\nTensor\nM\xe8\x03K\x14\x86R", 1), "calls a value"),
        (repeated(b"ctorch\nFloatStorage\nM\xe8\x03\x85R", 1), "calls a value"),
        (repeated(b"ctorch\nTensor\nM\xe8\x03\x85\x81", 1), "an object of a class"),
        (repeated(b"cbuiltins\nbytearray\nM\xe8\x03\x85R", 1), "object of class bytearray in add"),
    ],
)
def test_a_small_file_that_asks_for_much_memory_is_refused(
    tmp_path: Path, forge: Callable[[bytes], bytes], told: str
) -> None:
    torch.save({}, tmp_path / "w.pt")
    forged_pickle(tmp_path / "w.pt", tmp_path / "forged.pt", forge)
    assert told in refusal(tmp_path / "forged.pt")


def test_a_key_that_would_be_slow_to_compare_is_refused(tmp_path: Path) -> None:
    """A tuple of 100,000 levels as a key ends the process; so do large numbers its patience."""
    torch.save({}, tmp_path / "w.pt")
    for key in (b")" + b"\x85" * 10**5, b"\x8a\x09" + b"\xff" * 8 + b"\x01", b"G" + bytes(8), b"]"):
        forged_pickle(
            tmp_path / "w.pt",
            tmp_path / "forged.pt",
            lambda _, k=key: b"\x80\x02}" + k + b"K\x01s.",
        )
        assert " as a key" in refusal(tmp_path / "forged.pt")


def test_a_state_that_would_hide_a_methods_name_is_left_out(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "w.pt")
    pickled = b"\x80\x02ccollections\nOrderedDict\n)R}X\5\0\0\0itemsK\1sb."
    forged_pickle(tmp_path / "w.pt", tmp_path / "forged.pt", lambda _: pickled)
    assert list(read_tensors(tmp_path / "forged.pt").items()) == []


@pytest.mark.parametrize("seed", range(3))
def test_no_change_of_some_bytes_of_a_pickle_does_more_than_fail(tmp_path: Path, seed: int) -> None:
    """Whatever is read has tensors of the file's own bytes."""
    torch.save(of_a_script(), tmp_path / "w.pt")
    generator = torch.Generator().manual_seed(seed)

    def forge(whole: bytes) -> bytes:
        forged = bytearray(whole)
        for at in torch.randint(len(whole), (4,), generator=generator).tolist():
            forged[at] = int(torch.randint(256, (), generator=generator))
        return bytes(forged)

    for _ in range(40):
        forged_pickle(tmp_path / "w.pt", tmp_path / "forged.pt", forge)
        with contextlib.suppress(ArchError):
            assert isinstance(read_tensors(tmp_path / "forged.pt"), dict)
