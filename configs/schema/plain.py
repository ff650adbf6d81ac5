"""A config as plain data."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter


def as_plain(config: Any) -> dict[str, Any]:
    """The config as nested dicts and lists, defaults included; what YAML and JSON can hold."""
    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return plain
