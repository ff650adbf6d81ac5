"""Importing this shortens what most tests pay for and do not look at, in them and in their forks.

The digits are tested on 160 images in place of 797, which cost a short run more than its training.
The trial of a rate, for an estimate of the time that is left, ends after its second batch. Nothing
waits for the disk: what is flushed in which order, tests of that note for themselves. YAML that was
parsed before is copied: the shipped configs are loaded in every other test.

Programs that a test starts as `sys.executable -m` see all images: what is compared with theirs
is trained where the environment has ALL_DIGITS.
"""

from __future__ import annotations

import copy
import functools
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teach_once.configs import load
from teach_once.configs.yaml_subset import parse_yaml
from teach_once.runtime.command import cost
from teach_once.views.images import bundled

TEST_IMAGES = 160
ALL_DIGITS = "TEST_WITH_ALL_DIGITS"  # environment variable

_read_all_digits = functools.cache(bundled._read_digits)


def _read_some_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images, labels = _read_all_digits()
    if ALL_DIGITS in os.environ:
        return images.copy(), labels.copy()
    end = bundled.DIGITS_TRAIN_SAMPLES + TEST_IMAGES
    return images[:end].copy(), labels[:end].copy()


bundled._read_digits = _read_some_digits
cost._SHORT_SECONDS = cost._LONG_SECONDS = 0.0


def _flush_nothing(handle: int) -> None:
    os.fstat(handle)  # refuses one that is not open, as fsync does


os.fsync = _flush_nothing

_parse_once = functools.lru_cache(maxsize=500)(parse_yaml)  # an error is not kept


def _copy_of_parsed(text: str) -> Any:
    return copy.deepcopy(_parse_once(text))


load.parse_yaml = _copy_of_parsed  # type: ignore[attr-defined]
