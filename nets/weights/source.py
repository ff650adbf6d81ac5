"""Find a teacher's weights file, and its sha256 as far as it is known before a download.

Only `fetched_weights` downloads. torch is imported only for weights from torchvision or timm.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from pathlib import Path

from teach_once.nets.networks.archs import TIMM_PREFIX, ArchError, timm_model

_TORCHVISION = "torchvision:"
_SIMILAR = 0.8  # ratio of difflib: one letter in five may differ


def weights_file(weights: str) -> Path:
    """Return the path that `teacher.weights` refers to; the file need not exist.

    weights: a path, `torchvision:NAME` or `timm:MODEL`. Raises ArchError for an unknown name.
    """
    if model := timm_model(weights):
        from teach_once.nets.weights.timm_weights import pretrained_file

        return pretrained_file(model)
    if not is_downloadable(weights):
        return Path(weights)
    from teach_once.nets.weights.files import torchvision_file

    return torchvision_file(weights.removeprefix(_TORCHVISION))


def fetched_weights(weights: str) -> Path:
    """Return the path of a weights file, downloading a library's weights if they are missing.

    Raises ArchError if the download fails.
    """
    file = weights_file(weights)
    if file.is_file() or not is_downloadable(weights):
        return file
    if model := timm_model(weights):
        from teach_once.nets.weights.timm_weights import download_pretrained

        return download_pretrained(model)
    from teach_once.nets.weights.files import download_torchvision

    download_torchvision(weights.removeprefix(_TORCHVISION), file)
    return file


def is_downloadable(weights: str) -> bool:
    return weights.startswith((_TORCHVISION, TIMM_PREFIX))


def known_sha256(weights: str) -> str | None:
    """Return the file's sha256, its first digits if it is not downloaded yet, or None if unknown.

    torchvision's file names contain the first eight digits, as in `resnet34-b627a593.pth`.
    """
    file = weights_file(weights)
    if file.is_file():
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    named = re.search(r"-([0-9a-f]{8,})\.", file.name) if is_downloadable(weights) else None
    return named[1] if named else None


def check_spelling(weights: str, cached_sha256: str) -> None:
    """Raise ArchError if a missing weights path looks like a misspelling of an existing file.

    A cache may replace its teacher's weights, but not other weights that the user intended.
    cached_sha256: sha256 of the weights that the cache was made from.
    """
    file = weights_file(weights)
    if file.is_file() or is_downloadable(weights):
        return
    near = [path for path in _of_similar_name(file) if path.is_file()]
    if near and cached_sha256 not in map(known_sha256, map(str, near)):
        raise ArchError(
            f"teacher.weights: file {file} not found; {near[0]} exists, but the cache of this "
            f"configuration was made from other weights",
            fix=f"set teacher.weights={near[0]}; or, to train from the cache, use --cache PATH "
            f"(with make: CACHE=PATH)",
        )


def _of_similar_name(file: Path) -> list[Path]:
    """Return existing paths that differ from `file` by a misspelled file or folder name."""
    if file.parent.is_dir():
        return _similar_in(file.parent, file.name)
    if file.parent.parent.is_dir():
        return [folder / file.name for folder in _similar_in(file.parent.parent, file.parent.name)]
    return []


def _similar_in(folder: Path, name: str) -> list[Path]:
    names = [entry.name for entry in folder.iterdir()]
    return [folder / near for near in difflib.get_close_matches(name, names, cutoff=_SIMILAR)]
