"""The teacher cache: numpy in, numpy out, no torch."""

from store.content import CacheContent
from store.errors import (
    CacheBusy,
    CacheDamaged,
    CacheError,
    CacheFull,
    CacheIncomplete,
    CacheMismatch,
    CacheMissing,
    CacheNotWritable,
    UnknownTap,
    UnknownView,
)
from store.layout import TapSpec
from store.reader import TeacherCache
from store.writer import CacheWriter

__all__ = [
    "CacheBusy",
    "CacheContent",
    "CacheDamaged",
    "CacheError",
    "CacheFull",
    "CacheIncomplete",
    "CacheMismatch",
    "CacheMissing",
    "CacheNotWritable",
    "CacheWriter",
    "TapSpec",
    "TeacherCache",
    "UnknownTap",
    "UnknownView",
]
