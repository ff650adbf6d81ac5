"""The help of a command: its purpose, then its options in groups, without parser types.

Typer's own help prints a column of types and ranges (`<int range> [0<=x<=18446744073709551615]`)
and wraps explanations into the remaining width. Error messages give the ranges instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

from teach_once.runtime.command.program import program
from teach_once.runtime.errors import UserError, did_you_mean
from teach_once.runtime.safe.text import one_line

# Groups of options in the order of printing; RUN is the default group.
RUN, DATA, MACHINE = "Run", "Data", "Machine"
_PANELS = (RUN, DATA, MACHINE)
_MOST_COLUMNS = 110
# Placeholders by typer's names of types; "": the name of the option.
_PLACEHOLDERS = {
    **{"int": "N", "float": "X", "path": "PATH", "str": "", "list[str]": ""},
    **{"integer": "N", "text": ""},
}


class App(typer.Typer):
    """A typer application that prints this help."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=_Group, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        return super().command(name, **{"cls": _Command, **settings})


# The error of a command line that click cannot parse; typer exports only this class below it.
WrongUsage = cast(type[Exception], typer.BadParameter.__mro__[1])


def usage_error(error: Any) -> UserError:
    """Build the message for a command line that cannot be parsed. error: a `WrongUsage`."""
    option = getattr(error, "option_name", None) if hasattr(error, "possibilities") else None
    if option is not None:
        known = [name for param in error.ctx.command.params for name in param.opts]
        problem = f"option {one_line(option)!r} not found{did_you_mean(option, known)}"
    else:
        text = error.format_message().rstrip(".")
        problem = text[:1].lower() + text[1:]
    return UserError(problem, fix=_help_command(error.ctx) if error.ctx else None)


def _help_command(ctx: Any) -> str:
    """Return the command that prints the help, as the user's shell can run it."""
    words = str(ctx.command_path).split()
    if words[:2] == ["python", "-m"]:
        words = [*program(words[2]), *words[3:]]
    return " ".join([*words, "--help"])


class _Command(TyperCommand):
    def format_help(self, ctx: Any, formatter: Any) -> None:
        console = _console()
        _print_text(console, self.get_usage(ctx), self.help)
        panels: dict[str, list[Any]] = {panel: [] for panel in _PANELS}
        for param in self.get_params(ctx):
            if param.param_type_name == "argument":
                panels.setdefault("Arguments", []).append(param)
            elif not getattr(param, "hidden", False) and param.name != "help":
                panels[getattr(param, "rich_help_panel", None) or RUN].append(param)
        for panel in ("Arguments", *_PANELS):
            rows = [
                (_format_names(each, ctx), _format_help(each, ctx))
                for each in panels.get(panel, ())
            ]
            _print_rows(console, panel, rows)


class _Group(TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the first word names. Raises UserError if it is not one."""
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            near = did_you_mean(args[0], self.list_commands(ctx), most=3)
            raise UserError(
                f"command {one_line(args[0])!r} not found{near}", fix=_help_command(ctx)
            )
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        console = _console()
        _print_text(console, self.get_usage(ctx), self.help)
        commands = [self.get_command(ctx, name) for name in self.list_commands(ctx)]
        shown = [each for each in commands if each and not each.hidden]
        _print_rows(
            console, "Commands", [(str(each.name), each.get_short_help_str(200)) for each in shown]
        )
        console.print(f"\n{ctx.command_path} COMMAND --help explains a command.")


def _console() -> Console:
    console = Console(highlight=False, markup=False, emoji=False)
    return Console(
        width=min(console.width, _MOST_COLUMNS), highlight=False, markup=False, emoji=False
    )


def _print_text(console: Console, usage: str, text: str | None) -> None:
    console.print(" ".join(usage.split()))
    for paragraph in inspect.cleandoc(text or "").split("\n\n"):
        if paragraph:
            console.print("\n" + " ".join(paragraph.split()))


def _print_rows(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    if not rows:
        return
    console.print(f"\n{title}:", style="bold")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for names, text in rows:
        table.add_row(f"  {names}", text)
    console.print(table)


def _format_names(param: Any, ctx: Any) -> str:
    """Return the names of an option and the placeholder of its value."""
    if param.param_type_name == "argument":
        return str(param.metavar or param.name.upper())
    names = ", ".join(param.opts)
    if param.is_flag:
        is_off = param.default is False or not param.secondary_opts
        return names if is_off else "/".join([names, *param.secondary_opts])
    return f"{names} {_placeholder(param, ctx)}"


def _placeholder(param: Any, ctx: Any) -> str:
    format_type = getattr(param, "display_type", None) or param.make_metavar  # typer 0.29, before
    shown = str(param.metavar or format_type(ctx).strip("<>"))
    return _PLACEHOLDERS.get(shown.lower().split()[0], shown) or str(param.name).upper()


def _format_help(param: Any, ctx: Any) -> str:
    """Return the explanation, and the default unless it is off or empty."""
    text, default = param.help or "", param.get_default(ctx, call=False)
    if param.required or not param.show_default or default in (None, "", ()) or default is False:
        return text
    if param.is_flag:
        default = param.opts[0].lstrip("-")
    return f"{text} [default: {default}]"
