"""Additions of `mkdocs build` to pages of docs/: generated commands, included files, source links.

- `<!-- commands -->` becomes a section per command, from the help that the programs print.
- `<!-- include: PATH -->` becomes that file of the repository, without its heading.
- A mean and its deviation, or an interval, stay on one line in a table's cell.
- A link to a file outside docs/ leads to the repository, or becomes plain text if the site's
  configuration names none.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import typer.main

DOCS = Path(__file__).resolve().parent.parent
ROOT = DOCS.parent
_INCLUDE = re.compile(r"<!-- include: (\S+) -->")
_SPREAD = re.compile(r"(?<=\d) (±|to) (?=[-+]?\d)")
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Return a page's text as the site shows it; mkdocs calls this for every page."""
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", "\n".join(commands()))
    markdown = _INCLUDE.sub(lambda match: included(match[1]), markdown)
    markdown = re.sub(r"^\|.*", with_whole_spreads, markdown, flags=re.MULTILINE)
    return with_source_links(markdown, Path(page.file.src_uri), config["repo_url"])


def included(path: str) -> str:
    """Return the text of a file of the repository, without its heading."""
    heading, _, text = (ROOT / path).read_text().partition("\n")
    assert heading.startswith("# "), path
    return text.strip()


def with_whole_spreads(row: re.Match[str]) -> str:
    """Join `1.20 ± 0.28` and `-0.10 to +2.77` in a table's row by no-break spaces."""
    return _SPREAD.sub("\u00a0\\1\u00a0", row[0])


def with_source_links(markdown: str, page: Path, repo_url: str | None) -> str:
    """Lead a page's links to files outside docs/ to the repository, or make them plain text."""

    def linked(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = Path(os.path.normpath(DOCS / page.parent / target))
        if ":" in target or path.is_relative_to(DOCS) or not path.exists():
            return match[0]
        inside = path.relative_to(ROOT)
        return f"[{text}]({repo_url}/blob/main/{inside}{anchor})" if repo_url else f"`{inside}`"

    return _LINK.sub(linked, markdown)


def commands() -> Iterator[str]:
    """The Markdown of all commands: a heading, a description and a table of options for each."""
    sys.path.insert(0, str(ROOT))
    from teach_once.__main__ import COMMANDS, PROGRAMS

    for name, purpose in (COMMANDS | PROGRAMS).items():
        yield from (f"## teach-once {name}", "", purpose, "")
        command = _click_command(name)
        if command is None:  # a program that reads its few words itself
            module = importlib.import_module(f"teach_once.{name}")
            yield from ("```", str(module.__doc__).strip(), "```", "")
        else:
            yield from _sections(f"teach-once {name}", command, is_first=True)


def _click_command(name: str) -> click.Command | None:
    """The click command behind a word of teach-once; None for a program that has no options."""
    modules = {"new-teacher": "new_teacher", "new-student": "new_student", "env": "environment"}
    for module in (modules.get(name, name), f"{name}.command", f"{name}.cli.commands", "commands"):
        try:
            app = getattr(importlib.import_module(f"teach_once.{module}"), "app", None)
        except ModuleNotFoundError:
            continue
        if app is not None:
            whole = typer.main.get_command(app)
            inner: dict[str, click.Command] = getattr(whole, "commands", {})
            return inner.get(name) if module == "commands" else whole
    return None


def _sections(path: str, command: click.Command, is_first: bool = False) -> Iterator[str]:
    inner: dict[str, click.Command] = getattr(command, "commands", {})
    if not is_first:
        yield from (f"### {path}", "")
    if not inner:
        yield from _command(path, command, is_first)
    for name, each in inner.items():
        yield from _sections(f"{path} {name}", each)


def _command(path: str, command: click.Command, is_first: bool) -> Iterator[str]:
    context = click.Context(command, info_name=path)
    if command.help and not is_first:
        yield from (_text(command.help), "")
    usage = " ".join(command.collect_usage_pieces(context))
    yield from ("```", f"{path} {usage}".rstrip(), "```", "")
    options = [row for row in map(_option, command.get_params(context)) if row]
    if options:
        yield from ("| option | meaning | default |", "| --- | --- | --- |", *options, "")


def _option(parameter: click.Parameter) -> str:
    help_text = getattr(parameter, "help", None)
    if getattr(parameter, "hidden", False) or "--help" in parameter.opts:
        return ""
    if isinstance(parameter, click.Argument):
        name = f"`{parameter.metavar or parameter.name}`"
    else:
        name = ", ".join(f"`{opt}`" for opt in (*parameter.opts, *parameter.secondary_opts))
    default = parameter.default
    shown = "" if default in (None, False, True, (), []) or callable(default) else f"`{default}`"
    cells = (name, _text(help_text or "").replace("\n", " "), shown)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _text(help_text: str) -> str:
    """Return a help text as Markdown, with the commands in it as an installation names them."""
    text = re.sub(r"\S*python\S* -m (?=[a-z])", "teach-once ", help_text.replace("\f", ""))
    return text.replace("<", "&lt;").replace("*", "\\*").strip()
