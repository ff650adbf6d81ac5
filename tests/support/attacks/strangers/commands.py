"""Each command that reads untrusted files, and the guarantees for its answer.

A LINE PER COMMAND: to add one, add a line to COMMANDS. `{cache}` is the cache's folder, for any
name it has after the change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import teach_once.precompute.command
import teach_once.precompute.verify
import teach_once.report.command
import teach_once.store.command
import teach_once.train.cli.commands
import teach_once.views.command
from teach_once.configs import command as configs_main
from tests.support.attacks.strangers.promises import (
    Promise,
    export_is_true,
    nothing_more,
    report_is_safe,
    result_is_true,
    runs_are_true,
    sound_cache,
    sound_conversion,
    sound_export,
    sound_hdf5,
    sound_import,
    sound_views,
    student_is_true,
    weights_are_known,
)


@dataclass(frozen=True)
class Command:
    """A command. writes: paths of the world in which it may write. promise: see `promises.py`."""

    name: str
    program: Callable[[list[str]], int]
    arguments: tuple[str, ...]
    writes: tuple[str, ...] = ()
    promise: Promise = nothing_more

    def run(self, world: Path) -> int:
        """Run the command in the current process; returns its exit status."""
        found = sorted((world / "caches").glob("t-*"))
        cache = f"caches/{found[0].name}" if found else "caches/t-00000000"
        return self.program([word.format(cache=cache) for word in self.arguments])


Program = Callable[[list[str]], int]


def _command(name: str, program: Program, words: str, writes: str = "", promise=nothing_more):
    return Command(name, program, tuple(words.split()), tuple(writes.split()), promise)


_store, _train, _pass = (
    teach_once.store.command.cli,
    teach_once.train.cli.commands.cli,
    teach_once.precompute.command.cli,
)
_verify, _report, _pack = (
    teach_once.precompute.verify.cli,
    teach_once.report.command.cli,
    teach_once.views.command.cli,
)
_convert = "convert {cache} converted/t --logits top:4"
_student = "student s.yaml --device cpu --method"
_export = "export s.yaml --device cpu --method ce"
_of_teacher = "teacher.pt teacher.training"
_pass_options = "--device cpu --batch-size 16 --block-rows 32"

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        _command("store list", _store, "list"),
        _command("store list h5", _store, "list --caches ."),
        _command("store info", _store, "info {cache}"),
        _command("store info --plot", _store, "info {cache} --plot out.png", "out.png"),
        _command("store info --json", _store, "info {cache} --json"),
        _command("store info h5", _store, "info cache.h5"),
        _command("store check", _store, "check {cache}", "", sound_cache),
        _command("store check h5", _store, "check cache.h5", "", sound_hdf5),
        _command("store export", _store, "export {cache} out.h5", "out.h5", sound_export),
        _command("store import", _store, "import cache.h5 imported", "imported", sound_import),
        _command("store convert", _store, _convert, "converted", sound_conversion),
        _command("store trim", _store, "trim {cache} --views 1 --drop-taps attention", "caches"),
        _command("precompute", _pass, f"t.yaml {_pass_options}", "caches", sound_views),
        _command("precompute --plan", _pass, f"t.yaml --plan {_pass_options}"),
        _command("precompute pixels", _pass, f"pixels.yaml --caches made {_pass_options}", "made"),
        _command(
            "precompute encoded", _pass, f"encoded.yaml --caches made {_pass_options}", "made"
        ),
        _command("verify", _verify, "t.yaml --records 64 --device cpu"),
        _command("train student ce", _train, f"{_student} ce", "runs", result_is_true),
        _command("train student kd", _train, f"{_student} kd", "runs", result_is_true),
        _command("train student cd", _train, f"{_student} cd", "runs", result_is_true),
        _command("train student live", _train, f"{_student} kd --live-teacher", "runs"),
        _command("train plan", _train, "plan s.yaml --method kd --no-trial"),
        _command("train plan h5", _train, "plan s.yaml --method kd --no-trial --cache cache.h5"),
        _command("train runs", _train, "runs", "runs", runs_are_true),
        _command("train export", _train, f"{_export} out", "out", student_is_true),
        _command(
            "train export last", _train, f"{_export} out --checkpoint last", "out", student_is_true
        ),
        _command("train export again", _train, f"{_export} exported", "exported"),
        _command("train verify", _train, "verify exported", "", export_is_true),
        _command(
            "train teacher",
            _train,
            "teacher t.yaml",
            "teacher.pt teacher.training",
            weights_are_known,
        ),
        _command("report", _report, "runs/s", "runs/s", report_is_safe),
        _command("pack images", _pack, "pack images.yaml out.h5", "out.h5"),
        _command("pack images encoded", _pack, "pack images.yaml out.h5 --encoded", "out.h5"),
        _command("pack again", _pack, "pack encoded.yaml out.h5", "out.h5"),
        _command("configs teacher", configs_main.cli, "teacher t.yaml"),
        _command("configs student", configs_main.cli, "student s.yaml"),
    )
}
