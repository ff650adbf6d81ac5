"""The teacher cache: numpy in, numpy out, no torch."""

from store.errors import (
    CacheDamaged,
    CacheError,
    CacheIncomplete,
    CacheMismatch,
    CacheMissing,
    UnknownTap,
    UnknownView,
)
from store.layout import TapSpec
from store.reader import TeacherCache
from store.writer import CacheWriter

__all__ = [
    "CacheDamaged",
    "CacheError",
    "CacheIncomplete",
    "CacheMismatch",
    "CacheMissing",
    "CacheWriter",
    "TapSpec",
    "TeacherCache",
    "UnknownTap",
    "UnknownView",
]
