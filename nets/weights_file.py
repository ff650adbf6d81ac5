"""Where a teacher's weights are, and what is known of them before they are there.

Downloads only where asked to, and imports torch only for weights that torchvision names.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_TORCHVISION = "torchvision:"


def weights_file(weights: str) -> Path:
    """The file that `teacher.weights` (a path, or `torchvision:NAME`) names; it need not exist.

    Raises ArchError for a name that torchvision does not know.
    """
    if not is_downloadable(weights):
        return Path(weights)
    from nets.weights import torchvision_file

    return torchvision_file(weights.removeprefix(_TORCHVISION))


def fetched_weights(weights: str) -> Path:
    """The same file, first downloaded if torchvision names it and it is missing.

    Raises ArchError if that fails.
    """
    file = weights_file(weights)
    if not file.is_file() and is_downloadable(weights):
        from nets.weights import download_torchvision

        download_torchvision(weights.removeprefix(_TORCHVISION), file)
    return file


def is_downloadable(weights: str) -> bool:
    return weights.startswith(_TORCHVISION)


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
