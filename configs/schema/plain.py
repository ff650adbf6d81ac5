"""A config as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from pydantic import TypeAdapter


def as_plain(config: Any) -> dict[str, Any]:
    """The config as nested dicts and lists, defaults included; what YAML and JSON can hold."""
    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return plain


def as_identity(config: Any, later_keys: Collection[str]) -> dict[str, Any]:
    """As `as_plain`, without those of `later_keys` that have their default.

    later_keys: were added to the schema after runs were identified. Left out where they change
    nothing, they leave the identity of every earlier run as it was.
    """
    unset = {
        each.name
        for each in dataclasses.fields(config)
        if each.name in later_keys and getattr(config, each.name) == _default(each)
    }
    return {key: value for key, value in as_plain(config).items() if key not in unset}


def _default(key: dataclasses.Field[Any]) -> Any:
    if key.default_factory is dataclasses.MISSING:
        return key.default
    return key.default_factory()
