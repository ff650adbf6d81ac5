"""Forged or damaged weights files: each gives one error, without crashes or silent losses."""

from __future__ import annotations

import os
import shlex
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teach_once.nets.networks.archs import ArchError
from teach_once.nets.weights.files import load_weights, read_tensors
from teach_once.runtime.errors import UserError
from tests.support.training.forged_weights import forged_pickle, repacked


def network() -> nn.Module:
    return nn.Linear(3, 2)


def saved(path: Path, **changes: Any) -> Path:
    torch.save({**network().state_dict(), **changes}, path)
    return path


def refusal(path: Path, load: Callable[[Path], object] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        (load or (lambda file: load_weights(network(), file)))(path)
    assert path.name in str(caught.value)
    return str(caught.value)


def quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)


def test_compressed_members_are_refused_with_the_command_that_unpacks_them(tmp_path: Path) -> None:
    packed = repacked(saved(tmp_path / "w.pt"), tmp_path / "small.pt", zipfile.ZIP_DEFLATED)
    told = refusal(packed)
    assert "small.pt is compressed, expected uncompressed members" in told
    *_, code = shlex.split(told.partition("fix: ")[2].partition(": ")[2])
    exec(code, {})
    load_weights(network(), tmp_path / "small-plain.pt")


@pytest.mark.filterwarnings("ignore:.*(quantiz|TypedStorage).*")
@pytest.mark.parametrize(
    ("weight", "told"),
    [
        (lambda: torch.ones(2, 3, device="meta"), "weight is a meta tensor"),
        (lambda: torch.ones(2, 3).to_sparse(), "weight is a sparse tensor"),
        (quantized, "weight is a quantized tensor"),
        (lambda: torch.ones(2, 3, dtype=torch.complex64), "has dtype complex64, expected float32"),
        (lambda: torch.ones(2, 3, dtype=torch.int8), "has dtype int8, expected float32"),
        (lambda: torch.ones(2, 3).bool(), "has dtype bool, expected float32"),
        (lambda: torch.ones(3, 2).T.contiguous()[:, :2], r"has shape (2, 2), expected (2, 3)"),
        (lambda: torch.ones(1).expand(10**6, 10**6), "has shape (1000000, 1000000)"),
        (lambda: [1.0] * 6, "weight is a list, expected a tensor"),
        (lambda: None, "weight is a NoneType, expected a tensor"),
    ],
)
def test_a_tensor_that_is_not_plain_numbers_of_its_kind_is_refused(
    tmp_path: Path, weight: Callable[[], Any], told: str
) -> None:
    assert told in refusal(saved(tmp_path / "w.pt", weight=weight()))


def test_other_precisions_of_the_same_kind_and_other_strides_are_read(tmp_path: Path) -> None:
    numbers = torch.arange(6.0).reshape(2, 3)
    for weight in (numbers.half(), numbers.double(), numbers.T.contiguous().T):
        into = network()
        load_weights(into, saved(tmp_path / "w.pt", weight=weight))
        assert torch.equal(into.weight, numbers)


def test_keys_that_are_no_names_are_refused(tmp_path: Path) -> None:
    torch.save({**network().state_dict(), 3: torch.ones(1)}, tmp_path / "w.pt")
    assert "has the key 3, of type int; expected names" in refusal(tmp_path / "w.pt")


def test_dicts_nested_in_themselves_are_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "w.pt")
    assert "nests its state dict" in refusal(tmp_path / "w.pt")


@pytest.mark.parametrize("claimed", [7, 10**6, 2**31 - 1])
@pytest.mark.parametrize("what", ["storage", "size", "both"])
def test_lengths_beyond_the_bytes_that_are_there_are_refused(
    tmp_path: Path, claimed: int, what: str
) -> None:
    """Believed, they would have foreign memory read as weights."""
    path = tmp_path / "w.pt"
    torch.save({"weight": torch.ones(99)}, path)
    longer = b"J" + struct.pack("<i", 99 + claimed if claimed < 2**30 else claimed)

    def forge(pickle: bytes) -> bytes:
        storage, size, rest = pickle.split(b"Kc")
        in_storage = longer if what in ("storage", "both") else b"Kc"
        return storage + in_storage + size + (longer if what != "storage" else b"Kc") + rest

    forged_pickle(path, tmp_path / "forged.pt", forge)
    told = refusal(tmp_path / "forged.pt", lambda file: read_tensors(file)["weight"].sum().item())
    assert (what == "size") != ("has 396 bytes" in told)
    assert "is not a readable weights file" in told


def bomb(pickle: bytes) -> bytes:
    return b"\x80\x02]" + b"(" * 2 + b"}" * 3_000_000 + b"."


def huge_array(pickle: bytes) -> bytes:
    return b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (10**11).to_bytes(5, "little") + b"\x85R."


@pytest.mark.parametrize(
    ("forge", "told"),
    [
        (bomb, "holds more than 1,000,000 operations"),
        (huge_array, "contains an object of class bytearray"),
        (lambda pickle: pickle + b"x" * 9 * 2**20, "has a pickle of 9,4"),
        (lambda pickle: b"", "not a readable weights file"),
        (lambda pickle: b"\x80\x02" + b"a" * 100, "not a readable weights file"),
        (lambda pickle: b"\x80\x02K\x01.", "contains a int, expected a dict"),
    ],
)
def test_what_a_pickle_may_ask_for_is_bounded(
    tmp_path: Path, forge: Callable[[bytes], bytes], told: str
) -> None:
    forged_pickle(saved(tmp_path / "w.pt"), tmp_path / "forged.pt", forge)
    assert told in refusal(tmp_path / "forged.pt")


def test_a_length_of_a_storage_that_stands_elsewhere_is_compared(tmp_path: Path) -> None:
    def forge(pickle: bytes) -> bytes:
        start, end = pickle.index(b"(X\x07\0\0\0storage"), pickle.index(b"q\x07Q") + 2
        elsewhere = b"X\x01\0\0\0z" + pickle[start:end].replace(b"K\x06", b"K\x07") + b"s"
        return pickle[:5] + elsewhere + pickle[5:start] + b"h\x07" + pickle[end:]

    forged_pickle(saved(tmp_path / "w.pt"), tmp_path / "forged.pt", forge)
    assert "tensor 0 has 24 bytes, expected 28" in refusal(tmp_path / "forged.pt")


def test_a_second_beginning_of_a_pickle_is_refused(tmp_path: Path) -> None:
    """Readers have numbered what follows it in different ways."""
    path = saved(tmp_path / "w.pt")
    forged = tmp_path / "forged.pt"
    forged_pickle(path, forged, lambda pickle: pickle[:2] + pickle)
    assert "forged.pt is not a readable weights file" in refusal(forged)


STAND_INS = {
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "is a Git LFS pointer: the file itself has not been fetched",
        "lfs pull --include w",
    ),
    "annex": (b"/annex/objects/MD5E-s7--a.pt\n", "is a git-annex pointer", "annex get w"),
    "page": (
        b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><head>",
        "is an HTML page: a web page was saved in place of the file",
        "/resolve/ or /raw/",
    ),
    "store": (
        b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code>",
        "is an error message of an object store",
        "download the file again",
    ),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(("content", "what", "fix"), STAND_INS.values(), ids=STAND_INS)
def test_weights_that_were_never_downloaded_are_named_with_the_way_to_get_them(
    tmp_path: Path, content: bytes, what: str, fix: str, suffix: str
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    message = refusal(path)
    assert what in message
    assert fix in message.partition("fix: ")[2]


def test_a_large_file_without_content_is_refused_unread(tmp_path: Path) -> None:
    for name, start in (("zip.pt", b"PK\x03\x04"), ("legacy.pt", b"\x80\x02"), ("zeros.pt", b"")):
        with (tmp_path / name).open("wb") as file:
            file.write(start)
            file.truncate(50 * 10**9)
        assert "is not a readable weights file" in refusal(tmp_path / name)


def test_a_long_list_of_members_is_refused_unread(tmp_path: Path) -> None:
    whole = saved(tmp_path / "w.pt").read_bytes()
    with (tmp_path / "long.pt").open("wb") as file:
        file.write(whole[:-22])
        file.truncate(10**9)
        file.seek(0, os.SEEK_END)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, 9 * 10**8, 10**8, 0))
    assert "has too many members" in refusal(tmp_path / "long.pt")


@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
def test_weights_are_read_from_regular_files_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w.pt"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    assert f"is a {kind}, expected a regular file" in refusal(path)


def test_a_link_to_a_regular_file_is_followed_only_where_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "link.pt").symlink_to(saved(tmp_path / "w.pt"))
    load_weights(network(), tmp_path / "link.pt")
    told = refusal(tmp_path / "link.pt", lambda file: read_tensors(file, follow=False))
    assert "is a symbolic link" in told


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path: Path) -> None:
    whole = saved(tmp_path / "w.pt").read_bytes()
    expected = read_tensors(tmp_path / "w.pt")
    path, noticed = tmp_path / "flipped.pt", 0
    for position in range(0, len(whole), 5):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            found = read_tensors(path)
        except ArchError:
            noticed += 1
            continue
        assert found.keys() == expected.keys(), position
        assert all(torch.equal(found[key], expected[key]) for key in found), position
    assert noticed > len(whole) / 5 / 3  # the rest is padding
