"""Where a teacher's weights are, and what is known of them before they are there.

Downloads only where asked to, and imports torch only for weights that torchvision or timm names.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from nets.archs import TIMM_PREFIX, timm_model

_TORCHVISION = "torchvision:"


def weights_file(weights: str) -> Path:
    """The file that `teacher.weights` names; it need not exist.

    weights: a path, `torchvision:NAME` or `timm:MODEL`. Raises ArchError for an unknown name.
    """
    if model := timm_model(weights):
        from nets.timm_weights import pretrained_file

        return pretrained_file(model)
    if not is_downloadable(weights):
        return Path(weights)
    from nets.weights import torchvision_file

    return torchvision_file(weights.removeprefix(_TORCHVISION))


def fetched_weights(weights: str) -> Path:
    """The same file, first downloaded if a library names it and it is missing.

    Raises ArchError if that fails.
    """
    file = weights_file(weights)
    if file.is_file() or not is_downloadable(weights):
        return file
    if model := timm_model(weights):
        from nets.timm_weights import download_pretrained

        return download_pretrained(model)
    from nets.weights import download_torchvision

    download_torchvision(weights.removeprefix(_TORCHVISION), file)
    return file


def is_downloadable(weights: str) -> bool:
    return weights.startswith((_TORCHVISION, TIMM_PREFIX))


def known_sha256(weights: str) -> str | None:
    """What is known of the file's sha256: the whole, its first digits, or nothing (None).

    torchvision's files have the first eight digits in their names, as in `resnet34-b627a593.pth`.
    """
    file = weights_file(weights)
    if file.is_file():
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    named = re.search(r"-([0-9a-f]{8,})\.", file.name) if is_downloadable(weights) else None
    return named[1] if named else None
