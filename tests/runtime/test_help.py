"""The help of a command: options in groups, each explained, without a parser's types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
import typer

from teach_once.commands import app as teach_once_app
from teach_once.runtime.command.frame import new_app, new_console, run_command
from teach_once.runtime.command.help import DATA, MACHINE
from teach_once.runtime.command.options import can_be_quiet, takes_option_groups
from teach_once.runtime.errors import UserError, did_you_mean
from teach_once.train.cli.commands import app as train_app


@dataclass(frozen=True)
class Inner:
    panel: ClassVar = DATA
    caches: Annotated[str, typer.Option(help="folder")] = "caches"


@dataclass(frozen=True)
class Request:
    name: Annotated[str, typer.Argument(help="a student")]
    storage: Inner = Inner()
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="decides the order")] = 7
    live: Annotated[bool, typer.Option(help="in the loop")] = False


def test_help_of_nested_groups_has_panels_in_order_without_types_or_ranges(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    app, taken = new_app(), list[Request]()

    @app.command()
    @takes_option_groups
    def train(
        request: Request,
        device: Annotated[str, typer.Option(help="cpu", rich_help_panel=MACHINE)] = "auto",
    ) -> None:
        """Train one."""
        taken.append(request)

    assert run_command(app, ["--help"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[2:] == [
        "Train one.",
        "",
        "Arguments:",
        "  NAME  a student",
        "",
        "Run:",
        "  --seed N  decides the order [default: 7]",
        "  --live    in the loop",
        "",
        "Data:",
        "  --caches CACHES  folder [default: caches]",
        "",
        "Machine:",
        "  --device DEVICE  cpu [default: auto]",
        "",
    ]
    assert run_command(app, ["digits", "--caches", "here", "--seed", "3", "--live"]) == 0
    assert taken == [Request("digits", Inner("here"), 3, True)]


@pytest.mark.parametrize("app", [train_app, teach_once_app], ids=["train", "teach_once"])
def test_help_of_every_command_explains_each_option_in_lines_that_fit(
    app: typer.Typer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    for command in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert run_command(app, [command, "--help"]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 100
        assert not any(noise in text for noise in ("<", "range", "18446744073709551615"))
        options = [line for line in text.splitlines() if line.startswith("  --")]
        assert all("  " in line.strip() for line in options), command


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["studnt"], "command 'studnt' not found; did you mean 'student'?"),
        (["student", "x", "--chekpoint-minutes", "1"], "did you mean '--checkpoint-minutes'?"),
        (["student", "x", "--redd"], "option '--redd' not found\n"),  # not "--seed": other letters
        (["student", "x", "--redo"], "option '--redo' not found; did you mean '--retrain'?\n"),
        (["ablation", "x", "--track", "wandb"], "did you mean '--logger'?"),
        (["export", "x", "y", "--which", "best"], "did you mean '--checkpoint'?"),
        (["student"], "missing argument 'NAME|PATH'"),
        (["student", "x", "--seed", "-1"], "invalid value for '--seed'"),
    ],
)
def test_command_line_with_a_mistake_is_refused_with_the_help_command(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(train_app, words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert problem in err
    assert err.splitlines()[1].startswith("  fix: ")
    assert err.endswith("--help\n")


def test_did_you_mean_of_options_does_not_count_their_dashes() -> None:
    assert did_you_mean("--kd", ["--cd"]) == ""  # alike in three letters of four with the dashes
    assert did_you_mean("--job", ["--jobs", "--seed"]) == "; did you mean '--jobs'?"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--every-sample", "--check-images"),
        ("--world", "--world-size"),
        ("--from", "--reuse-from"),
        ("--feed", "--placement"),
    ],
)
def test_did_you_mean_of_an_old_option_names_the_new_one(old: str, new: str) -> None:
    assert did_you_mean(old, [new, "--workers"]) == f"; did you mean '{new}'?"
    assert new not in did_you_mean(old, ["--workers"])


@pytest.mark.parametrize("has_groups", [False, True])
def test_quiet_command_prints_errors_only(
    has_groups: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(name: Annotated[str, typer.Argument()]) -> None:
        new_console().print(f"done {name}")
        raise UserError("not enough memory")

    app = new_app()
    app.command()(can_be_quiet(takes_option_groups(work) if has_groups else work))
    assert run_command(app, ["x", "--quiet"]) == 2
    assert capsys.readouterr() == ("", "error: not enough memory\n")
    assert run_command(app, ["x"]) == 2
    assert capsys.readouterr().out == "done x\n"


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (1, "; did you mean 'resnet8'?"),
        (2, "; did you mean 'resnet8' or 'resnet34'?"),
        (3, "; did you mean 'resnet8', 'resnet34' or 'resnet20'?"),
    ],
)
def test_did_you_mean_with_a_limit_names_the_nearest_words(most: int, expected: str) -> None:
    known = ["resnet8", "resnet18", "resnet20", "resnet34", "vgg11"]
    assert did_you_mean("resnet9", known, most) == expected
    assert did_you_mean("nonsense", known, most) == ""
