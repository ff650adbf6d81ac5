"""Reading and writing files from untrusted sources."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from teach_once.runtime.command.frame import new_app, new_console, run_command
from teach_once.runtime.errors import Busy
from teach_once.runtime.safe import files
from teach_once.runtime.safe.confined import (
    create_whole,
    open_to_append,
    opened_folder,
    remove_inside,
    remove_leftovers,
    write_inside,
)
from teach_once.runtime.safe.files import folder_written_aside, write_atomically, written_aside
from teach_once.runtime.safe.locks import LOCK_FILE, Job, WriterLock, releasing
from teach_once.runtime.safe.safe_read import BadFile, parse_json, read_bounded
from teach_once.runtime.safe.text import one_line, visible


def _special(path: Path, kind: str) -> Path:
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        (path.parent / "elsewhere").write_bytes(b"{}")
        path.symlink_to("elsewhere")
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as bound:
            os.chdir(path.parent)
            bound.bind(path.name)
    return path


KINDS = ["folder", "link", "dangling link", "loop", "device", "FIFO", "socket"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_regular_file_is_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadFile, match="expected a regular file"):
        read_bounded(_special(tmp_path / "it", kind), 1000)


def test_a_followed_link_still_leads_to_a_regular_file_only(tmp_path: Path) -> None:
    assert read_bounded(_special(tmp_path / "it", "link"), 1000, follow=True) == b"{}"
    with pytest.raises(BadFile, match="is a device"):
        read_bounded(Path("/dev/zero"), 1000, follow=True)
    with pytest.raises(BadFile, match="is a loop"):
        read_bounded(_special(tmp_path / "loop", "loop"), 1000, follow=True)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(10**10)
    with pytest.raises(BadFile, match=r"10\.0 GB, expected at most 1\.0 kB"):
        read_bounded(sparse, 1000)
    sparse.write_bytes(b"a" * 1000)
    assert len(read_bounded(sparse, 1000)) == 1000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\xef\xbb\xbf{}", "BOM|Expecting value"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": 1, "b": 2, "a": 3}', "duplicate key 'a'"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5,000 digits"),
        (b'{"a": 18446744073709551616}', "18446744073709551616 does not fit 64 bits"),
        (b'{"a": -9223372036854775809}', "does not fit 64 bits"),
        (b'{"a": "\\ud800"}', "surrogates"),
        (b"[" * 100 + b"]" * 100, "exceeds 32"),
        (b"[" * 100_000, "too deeply"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_readers_disagree_on_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(BadFile, match=reason):
        parse_json(text, Path("manifest.json"))


def test_a_key_that_occurs_twice_is_found_at_once_among_many() -> None:
    keys = b",".join(b'"%d":0' % number for number in range(200_000))
    with pytest.raises(BadFile, match="duplicate key '199999'"):  # compared in pairs: minutes
        parse_json(b"{" + keys + b',"199999":1}', Path("manifest.json"))


def test_every_integer_of_64_bits_is_read() -> None:
    assert parse_json(b"[-9223372036854775808, 18446744073709551615]", Path("x")) == [
        -(2**63),
        2**64 - 1,
    ]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    root.mkdir()
    (outside / "victim").write_bytes(b"mine")
    (root / "file").symlink_to(outside / "victim")
    (root / "folder").symlink_to(outside)
    for write in (write_inside, lambda *a: open_to_append(*a[:2])):
        with pytest.raises(BadFile, match="is a symbolic link"):
            write(root, "file", b"yours")
        with pytest.raises(BadFile, match="is a symbolic link, expected a folder"):
            write(root, "folder/victim", b"yours")
        for leads_out in ("../outside/victim", str(outside / "victim")):
            with pytest.raises(BadFile, match="leads out"):
                write(root, leads_out, b"yours")
    os.link(outside / "victim", root / "hard")
    with open_to_append(root, "hard") as file:
        file.write(b" and yours")
    assert (root / "hard").read_bytes() == b"mine and yours"
    assert (outside / "victim").read_bytes() == b"mine"
    write_inside(root, "hard", b"yours")  # replaces the name, not the content
    assert (outside / "victim").read_bytes() == b"mine"
    assert [path.name for path in outside.iterdir()] == ["victim"]
    assert (root / "hard").read_bytes() == b"yours"


def test_missing_folders_are_made_and_nothing_temporary_stays(tmp_path: Path) -> None:
    write_inside(tmp_path, "a/b/c", b"content")
    with open_to_append(tmp_path, "a/b/log") as log:
        log.write(b"line\n")
    assert (tmp_path / "a/b/c").read_bytes() == b"content"
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == ["c", "log"]
    with opened_folder(tmp_path, "a/b") as folder:
        assert sorted(os.listdir(folder)) == ["c", "log"]


def test_a_lock_is_not_written_through_a_link(tmp_path: Path) -> None:
    victim, cache = tmp_path / "victim", tmp_path / "cache"
    victim.write_bytes(b"mine")
    cache.mkdir()
    (cache / LOCK_FILE).symlink_to(victim)
    with pytest.raises(BadFile, match="is a symbolic link"):
        WriterLock(cache, Job())
    (cache / LOCK_FILE).unlink()
    os.mkfifo(cache / LOCK_FILE)
    with pytest.raises(BadFile, match="is a FIFO"):
        WriterLock(cache, Job())
    assert victim.read_bytes() == b"mine"


def test_a_lock_with_a_second_name_is_held_by_one_and_signed_in_its_own_file(
    tmp_path: Path,
) -> None:
    cache, snapshot = tmp_path / "cache", tmp_path / "snapshot"
    cache.mkdir()
    WriterLock(cache, Job()).release()
    os.link(cache / LOCK_FILE, snapshot)
    before = snapshot.read_bytes()
    with releasing(WriterLock(cache, Job(name="mine"))):
        os.link(cache / LOCK_FILE, tmp_path / "another")
        for _ in range(2):
            with pytest.raises(Busy, match=f"written by process {os.getpid()} "):
                WriterLock(cache, Job())
    WriterLock(cache, Job()).release()
    assert snapshot.read_bytes() == before
    assert sorted(path.name for path in cache.iterdir()) == [LOCK_FILE]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    outside = tmp_path / ".a.pt.7.tmp"
    for name in (".a.pt.12.tmp", ".b.json.3.tmp", "a.pt", ".mine.tmp", "x.12.tmp"):
        (root / name).write_bytes(b"")
    outside.write_bytes(b"")
    (root / ".c.9.tmp").symlink_to(outside)
    remove_leftovers(root, name="a.pt")
    assert not (root / ".a.pt.12.tmp").exists()
    assert (root / ".b.json.3.tmp").exists()
    remove_leftovers(root)
    assert sorted(path.name for path in root.iterdir()) == [".mine.tmp", "a.pt", "x.12.tmp"]
    (tmp_path / "link").symlink_to(root)
    with pytest.raises(BadFile, match="is a symbolic link, expected a folder"):
        remove_leftovers(tmp_path, "link")
    with pytest.raises(BadFile, match="is a symbolic link, expected a folder"):
        remove_inside(tmp_path, "link/a.pt")
    remove_inside(tmp_path, "link")
    remove_inside(root, "a.pt")
    remove_inside(root, "a.pt")
    assert outside.exists()
    assert not (root / "a.pt").exists()


@pytest.mark.parametrize("kind", ["FIFO", "folder"])
def test_special_files_are_not_written_over(tmp_path: Path, kind: str) -> None:
    _special(tmp_path / "it", kind)
    for write in (
        lambda: write_inside(tmp_path, "it", b""),
        lambda: open_to_append(tmp_path, "it"),
    ):
        with pytest.raises(BadFile, match=f"is a {kind}"):
            write()
    with pytest.raises(BadFile, match=f"is a {kind}"):
        write_atomically(tmp_path / "it", b"")


def test_control_characters_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert visible("a\x1b[31m\u202eb\nc\x9b\udcff") == "a\\x1b[31m\\u202eb\nc\\x9b\\udcff"
    assert one_line("a\nfix: rm -r /") == "a\\nfix: rm -r /"
    assert one_line("x" * 1000, 10) == "xxxxxxxxxx... (1,000 characters)"
    assert one_line("naïve 数字") == "naïve 数字"
    new_console().print("cat\x1b]0;title\x07 [red]:smile:")
    assert capsys.readouterr().out == "cat\\x1b]0;title\\x07 [red]:smile:\n"


@pytest.mark.parametrize(("number", "word"), [(28, "make room"), (30, "allow access")])
def test_a_disk_that_refuses_is_one_message(
    number: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    app = new_app()

    @app.command()
    def write() -> None:
        raise OSError(number, os.strerror(number), "runs/\x1bx")

    assert run_command(app, []) == 2
    printed = capsys.readouterr().err
    assert f"error: runs/\\x1bx: {os.strerror(number)}\n  fix: {word}" in printed


@pytest.mark.parametrize("in_the_way", ["folder", "FIFO", "link to itself", "file above"])
def test_something_else_under_a_name_is_one_message(
    in_the_way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "it"
    if in_the_way == "file above":
        path.touch()
        path /= "below"
    elif in_the_way == "link to itself":
        path.symlink_to("it")
    else:
        _special(path, in_the_way)
    app = new_app()

    @app.command()
    def write() -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    assert run_command(app, []) == 2
    printed = capsys.readouterr().err
    assert f"error: {path}: " in printed
    assert "another kind of file is expected there\n  fix: check what" in printed


# ---- a folder that appears whole


def fill(folder: Path, text: str) -> None:
    for name in ("a", "b"):
        (folder / name).write_text(text)


def test_file_of_a_killed_writer_is_removed_by_the_next_writer_of_its_name(tmp_path: Path) -> None:
    target, other = tmp_path / "out.h5", tmp_path / ".other.h5.1.tmp"
    other.write_text("of another name")
    if (child := os.fork()) == 0:
        with written_aside(target) as aside:
            aside.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.glob(".out.h5.*.tmp")
    write_atomically(target, b"whole")
    assert not left.exists()
    assert sorted(each.name for each in tmp_path.iterdir()) == [".other.h5.1.tmp", "out.h5"]


def test_file_of_a_running_writer_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out.h5"
    begun, killed = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        with written_aside(target) as aside:
            aside.write_text("half")
            os.write(begun[1], b"x")
            os.read(killed[0], 1)
            os._exit(0)
    os.read(begun[0], 1)
    (running,) = tmp_path.glob(".out.h5.*.tmp")
    write_atomically(target, b"whole")
    assert running.exists()
    os.write(killed[1], b"x")
    os.waitpid(child, 0)
    write_atomically(target, b"again")
    assert not running.exists()


def test_file_of_another_machine_is_removed_only_after_a_day_without_a_write(
    tmp_path: Path,
) -> None:
    foreign = tmp_path / f".out.h5.{123 * 10_000_000 + 7}.tmp"
    foreign.write_text("half")
    write_atomically(tmp_path / "out.h5", b"whole")
    assert foreign.exists()
    yesterday = foreign.stat().st_mtime - 25 * 3600
    os.utime(foreign, (yesterday, yesterday))
    write_atomically(tmp_path / "out.h5", b"whole")
    assert not foreign.exists()


def content_of(folder: Path) -> set[tuple[str, str]]:
    return {(path.name, path.read_text()) for path in folder.iterdir()}


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("killed_after", ["nothing", "a", "b"])
def test_a_killed_process_leaves_no_mixture_of_two_folders(
    tmp_path: Path, earlier: bool, killed_after: str
) -> None:
    target = tmp_path / "deep" / "out"
    if earlier:
        target.mkdir(parents=True)
        fill(target, "old")
    if (child := os.fork()) == 0:
        with folder_written_aside(target, ["a", "b"]) as aside:
            for name in ("a", "b")[: {"nothing": 0, "a": 1, "b": 2}[killed_after]]:
                (aside / name).write_text("new")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert target.exists() == earlier
    if earlier:
        assert content_of(target) == {("a", "old"), ("b", "old")}
    assert len(list(target.parent.glob(".*.tmp"))) == 1
    with folder_written_aside(target, ["a", "b"]) as aside:
        fill(aside, "new")
    assert content_of(target) == {("a", "new"), ("b", "new")}
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_an_error_leaves_the_earlier_folder_and_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    fill(target, "old")
    with suppress(ZeroDivisionError), folder_written_aside(target, ["a", "b"]) as aside:
        fill(aside, "new")
        raise ZeroDivisionError
    assert content_of(target) == {("a", "old"), ("b", "old")}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "FIFO", "foreign", "link inside", "folder inside"])
def test_a_folder_with_anything_else_in_it_is_not_replaced(tmp_path: Path, kind: str) -> None:
    target, victim = tmp_path / "out", tmp_path / "victim"
    victim.write_text("mine")
    if kind in ("file", "FIFO"):
        target.write_text("mine") if kind == "file" else os.mkfifo(target)
    else:
        target.mkdir()
        inside = target / ("mine.txt" if kind == "foreign" else "a")
        if kind == "folder inside":
            inside.mkdir()
        elif kind == "foreign":
            inside.write_text("mine")
        else:
            inside.symlink_to(victim)
    told = "expected a folder" if kind in ("file", "FIFO") else "which would be lost"
    with pytest.raises(BadFile, match=told), folder_written_aside(target, ["a", "b"]):
        pytest.fail("nothing may be written")
    assert victim.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "victim"]


def test_a_hard_link_in_the_earlier_folder_is_replaced_and_not_written_to(tmp_path: Path) -> None:
    target, victim = tmp_path / "out", tmp_path / "victim"
    target.mkdir()
    victim.write_text("mine")
    os.link(victim, target / "a")
    (tmp_path / "link").symlink_to(target)
    with folder_written_aside(tmp_path / "link", ["a", "b"]) as aside:
        fill(aside, "new")
    assert victim.read_text() == "mine"
    assert (tmp_path / "link").is_symlink()
    assert content_of(target) == {("a", "new"), ("b", "new")}


def test_a_folder_is_not_written_where_a_link_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere/to/be")
    with (
        pytest.raises(BadFile, match="is a broken link"),
        folder_written_aside(tmp_path / "link", ["a", "b"]),
    ):
        pass
    assert [each.name for each in tmp_path.iterdir()] == ["link"]


def test_a_command_that_a_signal_ends_claims_nothing_about_what_was_saved(
    capsys: pytest.CaptureFixture[str],
) -> None:
    app = new_app()

    @app.command()
    def wait() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    assert run_command(app, []) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped\n"


# ---- what is on the disk when


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is flushed, with its content, and what is renamed, in order."""
    taken: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def flush(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        content = ", ".join(sorted(os.listdir(path))) if path.is_dir() else path.read_text()
        taken.append(("flush", content))
        fsync(handle)

    def renamed(path: Path, target: Path) -> Path:
        taken.append(("rename", Path(target).name))
        return rename(path, target)

    def replaced(path: Path, target: Path) -> Path:
        taken.append(("rename", Path(target).name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", replaced)
    return taken


def test_a_file_is_flushed_before_it_has_its_name_and_its_folder_afterwards(
    tmp_path: Path, steps: list[tuple[str, str]]
) -> None:
    write_atomically(tmp_path / "file", b"content")
    assert steps == [("flush", "content"), ("rename", "file"), ("flush", "file")]


@pytest.mark.parametrize("write", [write_inside, create_whole])
def test_a_file_inside_a_folder_is_flushed_and_then_its_folder(
    tmp_path: Path, steps: list[tuple[str, str]], write: Callable[[Path, str, bytes], object]
) -> None:
    write(tmp_path, "file", b"content")
    assert steps == [("flush", "content"), ("flush", "file")]


@pytest.mark.parametrize("earlier", [False, True])
def test_a_folder_is_flushed_whole_before_it_has_its_name_and_its_parent_afterwards(
    tmp_path: Path, steps: list[tuple[str, str]], earlier: bool
) -> None:
    target = tmp_path / "out"
    if earlier:
        target.mkdir()
        fill(target, "old")
    with folder_written_aside(target, ["a", "b"]) as aside:
        fill(aside, "new")
    if earlier:
        assert steps.pop(3)[1].startswith(".out.old.")
    assert steps == [
        ("flush", "new"),
        ("flush", "new"),
        ("flush", "a, b"),
        ("rename", "out"),
        ("flush", "out"),
    ]


def test_the_earlier_folder_stays_where_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "out", Path.rename
    target.mkdir()
    fill(target, "old")

    def refused(path: Path, to: Path) -> Path:
        if ".new." in path.name:
            raise OSError(errno.EIO, "no")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="no"), folder_written_aside(target, ["a", "b"]) as aside:
        fill(aside, "new")
    assert content_of(target) == {("a", "old"), ("b", "old")}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def number_of(process: int) -> int:
    """The number of another process of this machine in the names of temporary files."""
    return files._own_number() - os.getpid() + process


def dead_process() -> int:
    """The number of a process that has ended."""
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return number_of(child)


@pytest.mark.parametrize("has_new", [False, True])
def test_a_kill_between_the_two_renames_loses_no_folder(tmp_path: Path, has_new: bool) -> None:
    target, killed = tmp_path / "out", dead_process()
    for kind in ("old", "new")[: 1 + has_new]:
        (aside := tmp_path / f".out.{kind}.{killed}.tmp").mkdir()
        fill(aside, kind)
    with suppress(ZeroDivisionError), folder_written_aside(target, ["a", "b"]):
        raise ZeroDivisionError  # the next process fails, too
    assert content_of(target) == {("a", "old"), ("b", "old")}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_running_process_writes_aside_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    running = [f".out.{kind}.{number_of(os.getppid())}.tmp" for kind in ("new", "old")]
    others = [f".out2.new.{(dead := dead_process())}.tmp", ".out.new.x.tmp"]
    for name in (*running, *others, f".out.new.{dead}.tmp"):
        (tmp_path / name).mkdir()
    with folder_written_aside(target, ["a", "b"]) as aside:
        fill(aside, "new")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([*running, *others, "out"])
