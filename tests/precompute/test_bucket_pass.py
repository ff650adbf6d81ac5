"""The teacher pass directly to an object store, from the plan to a student trained from it."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from teach_once.configs.schema import TeacherConfig
from teach_once.nets.networks.zoo import build
from teach_once.nets.weights.files import save_atomically
from teach_once.precompute.command import cli
from teach_once.precompute.compute.teacher_pass import PassOptions, TeacherPass
from teach_once.precompute.run_pass import fill_cache
from teach_once.precompute.verify import cli as verify
from teach_once.runtime.machine.urls import path_or_url
from teach_once.store import TeacherCache
from teach_once.store.command import cli as store
from teach_once.store.format.index import INDEX
from teach_once.store.identity import EVALUATION
from teach_once.store.place.open import place_at
from teach_once.store.place.place import read_document
from teach_once.train.cli.commands import cli as train
from tests.support.caches.object_store import SECRETS, Server, emptied
from tests.support.caches.teacher_cache import CPU, make_cache, setup_of
from tests.support.datasets.photograph_study import PLAIN, configs_of
from tests.support.programs.pass_commands import arguments_of
from tests.support.programs.processes import start
from tests.support.project import QUICK_RUN

CACHES = "s3://bucket/caches"


@pytest.fixture
def server(
    running_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """An empty bucket; in a folder that holds nothing."""
    monkeypatch.chdir(tmp_path)
    with emptied(running_server):
        yield running_server


@pytest.fixture
def words(server: Server, small_teacher: Callable[..., TeacherConfig]) -> list[str]:
    """The pass of a small teacher into the folder `there`: 3 views of 60 digits, 12 blocks."""
    words = arguments_of(small_teacher(), Path("there"))
    words[words.index("--block-rows") + 1] = "16"
    return words


def to_bucket(words: list[str], *more: str) -> list[str]:
    return [CACHES if word == "there" else word for word in words] + [*more]


def name_of(server: Server) -> str:
    """Of the only cache in the bucket."""
    (name,) = {key.split("/")[1] for key in server.all_keys()} - {"conditional-writes"}
    return name


def chunks_of(server: Server, cache: str) -> dict[str, bytes]:
    start = f"caches/{cache}/teacher.zarr/"
    keys = [key for key in server.all_keys() if key.startswith(start)]
    return {key.removeprefix(start): server.ask("GET", key) for key in keys}


def test_from_the_plan_to_a_student(
    server: Server, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words += ["taps.logits={top_k: 3}", "taps.channel_means=uint8"]  # with a certificate
    assert cli(to_bucket(words, "--plan")) == 0
    assert server.all_keys() == []
    assert f"{CACHES}/digits-resnet20-" in capsys.readouterr().out
    assert cli(to_bucket(words)) == 0
    name = name_of(server)
    assert f"{CACHES}/{name} is complete. Teacher: test error" in capsys.readouterr().out

    assert cli(words) == 0  # into a folder
    folder = Path("there") / name
    (inside,) = (folder / "evaluation").iterdir()
    for cache in (name, f"{name}/evaluation/{inside.name}"):
        chunks = chunks_of(server, cache)
        assert chunks
        for file, content in chunks.items():
            assert (folder.parent / cache / "teacher.zarr" / file).read_bytes() == content, file
    ours = json.loads(server.ask("GET", f"caches/{name}/manifest.json"))
    theirs = json.loads((folder / "manifest.json").read_text())
    for rate in (ours["measured"], theirs["measured"]):
        del rate["images_per_second"]
    assert ours["measured"]["certified_records"] == 180
    assert {**ours, "manifest_crc32c": ""} == {**theirs, "manifest_crc32c": ""}

    capsys.readouterr()
    server.requests.clear()
    assert cli(to_bucket(words, "--plan")) == 0
    assert "to do    0 of" in capsys.readouterr().out
    assert cli(to_bucket(words)) == 0
    assert "is complete: nothing to do" in capsys.readouterr().out
    assert not any(method == "PUT" for method, _ in server.requests)
    assert store(["check", f"{CACHES}/{name}"]) == 0
    assert store(["copy", f"{CACHES}/{name}", "back"]) == 0
    assert store(["check", f"back/{name}"]) == 0
    assert store(["copy", f"there/{name}", CACHES]) == 0  # nothing to do
    assert "0 chunks copied" in capsys.readouterr().out
    overrides = [word for word in words if "=" in word]
    assert verify(["digits-resnet20", "--caches", CACHES, "--device", "cpu", *overrides]) == 0
    assert "valid: 180 records were computed again and agree" in capsys.readouterr().out
    student = ["student", "digits-resnet8", "--method", "kd", *QUICK_RUN, "--caches", CACHES]
    assert train([*student, *(f"teacher.{word}" for word in overrides)]) == 0
    assert not Path("s3:").exists()


@pytest.mark.parametrize("caches", [CACHES, "there"])
def test_a_pass_that_finds_all_done_writes_the_indexes_that_a_killed_one_left_out(
    caches: str, server: Server, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    call = to_bucket(words) if caches == CACHES else words
    assert cli(call) == 0
    cache = path_or_url(caches) / _only_name(server, caches)
    names = [
        INDEX,
        *(f"{EVALUATION}/{n}/{INDEX}" for n in place_at(cache).list_folders(EVALUATION)),
    ]
    assert len(names) == 2
    before = {name: read_document(place_at(cache), name, 10**6) for name in names}
    assert all(before.values())
    for number in range(len(names)):  # without the cache's own; then without both
        for name in names[: number + 1]:
            place_at(cache).delete(name)
        assert cli([*call, "--plan"]) == 0
        assert not place_at(cache).has(INDEX)  # a plan writes nothing
        capsys.readouterr()
        assert cli(call) == 0
        assert "is complete: nothing to do" in capsys.readouterr().out
        assert {name: read_document(place_at(cache), name, 10**6) for name in names} == before


def _only_name(server: Server, caches: str) -> str:
    if caches == CACHES:
        return name_of(server)
    (folder,) = (path for path in Path(caches).iterdir() if not path.name.startswith("."))
    return folder.name


def test_a_pass_resumes_grows_and_mends(
    server: Server, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(to_bucket(words, "views.count=2")) == 0
    assert cli(to_bucket(words)) == 0
    assert "to do    60 of" in capsys.readouterr().out
    name = name_of(server)
    before = chunks_of(server, name)
    key = f"caches/{name}/teacher.zarr/stage1/c.2.3.0"
    content = bytearray(server.ask("GET", key))
    content[5] ^= 1
    server.ask("PUT", key, bytes(content))
    assert store(["check", f"{CACHES}/{name}"]) == 1
    told = capsys.readouterr().out
    assert f"tap stage1, view 2, block 3, wrong checksum: s3://bucket/{key}" in told
    assert f"precompute digits-resnet20 --caches={CACHES} --full-check\n" in told
    assert cli(to_bucket(words, "--full-check")) == 0
    assert "damaged, will be computed again:\n  tap stage1, view 2, block 3" in (
        capsys.readouterr().out
    )
    assert chunks_of(server, name) == before
    assert store(["check", f"{CACHES}/{name}"]) == 0


def test_the_command_that_an_error_names_mends_the_cache(
    server: Server, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(to_bucket(words)) == 0
    name = name_of(server)
    key = f"caches/{name}/teacher.zarr/labels/c.0"
    content = server.ask("GET", key)
    server.ask("PUT", key, content[:-1] + bytes([content[-1] ^ 1]))
    overrides = [word for word in words if "=" in word]
    again = ["digits-resnet20", "--caches", CACHES, "--device", "cpu", *overrides]
    capsys.readouterr()
    assert verify(again) == 2
    told = capsys.readouterr().err
    assert f"wrong checksum: s3://bucket/{key}" in told
    fix = re.search("fix: (.* --full-check)\n", told)
    assert fix is not None
    program, command, *arguments = shlex.split(fix[1])
    assert (program, command) == ("teach-once", "precompute")
    assert cli([*arguments, "--device", "cpu"]) == 0
    assert server.ask("GET", key) == content
    assert verify(again) == 0


def test_ranks_of_a_job_and_another_pass_make_one_cache_at_once(
    server: Server, words: list[str]
) -> None:
    command = ["precompute", *to_bucket(words)]
    job = ["--job", "j", "--world-size", "2", "--rank"]
    passes = [start(*command, *more) for more in ([*job, "0"], [*job, "1"], [])]
    for each in passes:
        printed, errors = each.communicate(timeout=300)
        assert each.returncode == 0, errors
        assert "is complete" in printed
    name = name_of(server)
    assert store(["check", f"{CACHES}/{name}"]) == 0
    lines = [key for key in server.all_keys() if f"caches/{name}/journal/" in key]
    assert len(lines) == 3 * 4 + 1  # views x blocks, and the whole journal


def test_no_secret_is_printed_or_stored(
    server: Server, words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    server.spoil = lambda method, path, before: 503 if "logits/c.1.2" in path else None
    assert cli(to_bucket(words)) == 2
    told = capsys.readouterr()
    assert "teacher.zarr/logits/c.1.2.0: the store could not be reached" in told.err
    assert "--caches s3://bucket/caches" in told.err or "run the same command again" in told.err
    server.spoil = lambda method, path, before: 403 if method == "PUT" else None
    assert cli(to_bucket(words)) == 2
    refused = capsys.readouterr()
    assert f"the store does not permit access to {CACHES}" in refused.err
    server.spoil = lambda method, path, before: None
    assert cli(to_bucket(words)) == 0
    printed = told.out + told.err + refused.out + refused.err + capsys.readouterr().out
    stored = b"".join(server.ask("GET", key) for key in server.all_keys())
    here = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert len(stored) > 10_000
    for secret in SECRETS:
        assert secret not in printed
        assert secret.encode() not in stored + here


def test_records_are_carried_over_from_and_to_a_bucket(
    server: Server,
    words: list[str],
    small_teacher: Callable[..., TeacherConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli(to_bucket(words)) == 0
    old = name_of(server)
    capsys.readouterr()
    assert cli([*words, "--reuse-from", f"{CACHES}/{old}"]) == 0
    assert f"copied 12 of 12 blocks from {CACHES}/{old}" in capsys.readouterr().out
    assert (
        cli(
            [CACHES + "/other" if w == "there" else w for w in words]
            + ["--reuse-from", f"there/{old}"]
        )
        == 0
    )
    assert f"copied 12 of 12 blocks from there/{old}" in capsys.readouterr().out
    assert store(["check", f"{CACHES}/other/{old}"]) == 0


class Killed(BaseException):
    """What a kill looks like from inside."""


def test_decoded_images_are_spooled_here_and_resumed(
    server: Server, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_atomically(build("resnet8", num_classes=2, seed=1).state_dict(), tmp_path / "teacher.pt")
    _, teacher = configs_of(photographs, tmp_path / "teacher.pt", PLAIN)
    options = PassOptions(CPU, batch_size=4, block_rows=16, num_workers=0, spool=tmp_path / "spool")
    quiet = Console(file=io.StringIO())
    whole = make_cache(teacher, tmp_path / "whole", batch_size=4)
    readings, shown = TeacherPass.readings, []

    def dying(self, views, ids, taps):
        for number, reading in enumerate(readings(self, views, ids, taps)):
            if number == 2 and len(shown) == 8:
                raise Killed
            shown.extend(ids[4 * number : 4 * number + 4].tolist())
            yield reading

    monkeypatch.setattr(TeacherPass, "readings", dying)
    setup = setup_of(teacher, path_or_url(CACHES))
    with pytest.raises(Killed):
        fill_cache(setup, options, quiet)
    spool = tmp_path / "spool/bucket/caches" / setup.path.name / "0000/journal/0000.spool"
    assert spool.is_file()
    resumed = fill_cache(setup, options, quiet)
    assert shown[:8] == list(range(8))
    assert sorted(shown) == list(range(20))
    assert not spool.exists()
    assert isinstance(resumed, TeacherCache)
    for view in range(3):
        ours, theirs = resumed.read_view(view), whole.read_view(view)
        assert all(np.array_equal(ours[tap], theirs[tap]) for tap in ours)
    assert resumed.faults() == []
