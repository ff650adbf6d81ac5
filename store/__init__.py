"""The cache of teacher outputs, in numpy and without torch."""

from teach_once.store.errors import (
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
from teach_once.store.format.content import CacheContent
from teach_once.store.format.spec import TapSpec
from teach_once.store.read.reader import TeacherCache
from teach_once.store.write.writer import CacheWriter

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
