"""The simulated pass of very many blocks commits all of them and reports the time of each part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main

pytest.importorskip("ray")


@pytest.mark.long  # starts a cluster; a pass on one is tested beside it
def test_a_pass_of_empty_blocks_is_measured_from_its_begin_to_being_opened(tmp_path: Path) -> None:
    docs, found = tmp_path / "benchmarks.md", tmp_path / "found.json"
    options = ["--blocks", "60", "--views", "3", "--docs", str(docs), "--json", str(found)]
    assert main(["many_blocks", *options]) == 0
    rows = json.loads(found.read_text())
    assert [row[0] for row in rows] == [
        "open the writer, list all blocks",
        "queue alone",
        "queue and commit",
        "read every line, put the whole journal",
        "open the finished cache",
    ]
    assert float(rows[2][1]) > 0
    assert "60 blocks of one byte in tasks of 3" in docs.read_text()
