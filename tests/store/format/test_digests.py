"""Changes that make a dataset or a cache another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from teach_once.store import TeacherCache
from teach_once.store.format.content import holds
from teach_once.views.images.folders import digest_of_files
from tests.support.caches.random_cache import fill, open_writer

LABELS = np.array([0, 1])


def test_a_file_of_the_same_name_and_another_size_makes_another_dataset() -> None:
    names, hashed = ["a/1.png", "b/1.png"], [b"content"]
    digests = {digest_of_files(names, sizes, LABELS, hashed) for sizes in ([1, 2], [1, 3], [2, 1])}
    assert len(digests) == 3


@pytest.mark.parametrize("name", ["labels/c.0", "preview/c.0.0.0.0"])
def test_a_file_that_only_begins_like_the_right_one_is_written_again(
    tmp_path: Path, name: str
) -> None:
    path = fill(tmp_path / "c")
    file = path / "teacher.zarr" / name
    right = file.read_bytes()
    assert holds(path, f"teacher.zarr/{name}", np.frombuffer(right, np.uint8))
    file.write_bytes(right + b"more")
    with open_writer(path):
        pass
    assert file.read_bytes() == right
    assert TeacherCache.open(path).faults() == []
