"""The benchmarks' object server responds like an object store, as far as this project needs."""

from __future__ import annotations

import subprocess
import sys

_USE = """
from benchmarks.synthetic.object_server import object_server
from teach_once.runtime.machine.urls import path_or_url
from teach_once.store.errors import CacheBusy, CacheMissing
from teach_once.store.place.bucket import Bucket

with object_server() as url:
    objects = Bucket(path_or_url(f"{url}/prefix"))
    objects.refuse_unconditional()
    assert objects.create("a/b c", b"first")
    assert not objects.create("a/b c", b"second")
    assert objects.get("a/b c") == b"first"
    tag = next(objects.list_files("a")).tag
    objects.replace("a/b c", b"third", tag)
    try:
        objects.replace("a/b c", b"fourth", tag)
    except CacheBusy:
        pass
    else:
        raise AssertionError("a condition was ignored")
    assert objects.get("a/b c") == b"third"
    for number in range(1500):
        objects.create(f"many/{number}/x", bytes(number))
    assert {(each.key, each.size) for each in objects.list_files("many")} == {
        (f"many/{number}/x", number) for number in range(1500)
    }
    folders, files = objects.names("many")
    assert (len(set(folders)), len(folders), files) == (1500, 1500, [])
    assert objects.names()[0] == ["a", "many"]
    large = bytes(range(256)) * 2**16
    assert objects.create("large", large)
    assert objects.get("large") == large
    try:
        objects.get("absent")
    except CacheMissing:
        print("as a store")
"""


def test_it_puts_if_absent_replaces_lists_in_pages_and_gets() -> None:
    done = subprocess.run([sys.executable, "-c", _USE], capture_output=True, text=True)
    assert done.stdout == "as a store\n", done.stderr
