"""Adds figures to the certificate in a finished cache's manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from runtime.program import program_text
from store.certificate import RANGES
from store.change import changing
from store.errors import CacheError
from store.manifest import write_manifest


def record_figures(path: Path, figures: Mapping[str, float]) -> None:
    """Write figures, named as in `store.certificate.RANGES`, into the manifest of a cache folder.

    Others of the certificate stay. Raises CacheError, also where another process writes the cache.
    """
    if unknown := figures.keys() - RANGES.keys():
        raise ValueError(f"{min(unknown)} is no figure of a certificate")
    if path.is_file():
        raise CacheError(
            f"{path} is a file: figures are only recorded in a cache folder",
            fix=f"{program_text('store')} import {path}, and export it again afterwards",
        )
    with changing(path) as manifest:
        measured = {**manifest.measured_with_views, **figures}
        write_manifest(path, dataclasses.replace(manifest, measured=measured))
