"""The objects below a URL as a `Place`, via obstore: put if absent, fetched and listed whole.

Credentials, region and endpoint come from obstore's environment variables (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, ...). Without credentials, requests are not signed. obstore's own messages are
never shown, because they quote the store's answers, which may contain keys. Retries and timeouts
are obstore's, too. A put that the store answers with a conflict (409) is repeated here. If the
answer to a put was lost, the next one finds the object, and its bytes are compared.
"""

from __future__ import annotations

import asyncio
import io
import math
import os
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teach_once.runtime.machine.urls import ObjectUrl
from teach_once.runtime.safe.safe_read import BadFile
from teach_once.runtime.safe.text import one_line
from teach_once.store.errors import (
    CacheBusy,
    CacheDamaged,
    CacheError,
    CacheMissing,
    CacheNotWritable,
)
from teach_once.store.place.chunks import wrong_size
from teach_once.store.place.parallel import in_order
from teach_once.store.place.place import (
    MAX_KEYS,
    Check,
    Chunk,
    FileContent,
    Item,
    Listed,
    ListWithoutEnd,
    Result,
)

PAGE_KEYS = 1000
LIST_SECONDS = 200.0  # for the first page, including obstore's retries, which end after 180
_SECONDS_PER_PAGE = 5.0  # for each further page
_PIECE_BYTES = 2**18


def received(found: Any, num_bytes: int, where: object) -> NDArray[np.uint8]:
    """Return the body of an answer, (bytes,) uint8: `num_bytes`, or fewer if it ends early.

    found: a GetResult of obstore. where: the object, for the message. Raises CacheDamaged if the
    body is longer.
    """
    content, done = np.empty(num_bytes, np.uint8), 0
    for piece in found.stream(min_chunk_size=_PIECE_BYTES):
        end = done + len(piece)
        if end > num_bytes:
            raise CacheDamaged(f"the store sends more of {where} than {num_bytes:,} bytes")
        content[done:end] = np.frombuffer(piece, np.uint8)
        done = end
    return content[:done]


def pages(stream: Any, max_keys: int, where: object) -> Iterator[Sequence[Any]]:
    """Yield the pages of a list. stream: a ListStream of obstore. Raises ListWithoutEnd."""
    started, num_keys, num_pages = time.monotonic(), 0, 0
    while True:
        allowed = LIST_SECONDS + _SECONDS_PER_PAGE * num_pages
        page = within(started + allowed - time.monotonic(), lambda: _next(stream), where)
        if page is None:
            return
        num_keys, num_pages = num_keys + len(page), num_pages + 1
        if num_keys > max_keys:
            raise ListWithoutEnd(f"{where} lists more than {max_keys:,} objects", fix=_FIX)
        yield page


def within(seconds: float, start: Callable[[], Awaitable[Result]], where: object) -> Result:
    """Return the result of a request. Raises ListWithoutEnd if it takes longer than `seconds`."""

    async def wait() -> Result:
        return await asyncio.wait_for(start(), max(0.0, seconds))

    try:
        return _run(wait)
    except TimeoutError:
        raise ListWithoutEnd(
            f"{where}: the store has not ended a list in {LIST_SECONDS:.0f} seconds", fix=_FIX
        ) from None


_FIX = "check AWS_ENDPOINT_URL, and list the objects with the store's own tools"


def _run(wait: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as pool:  # called from a notebook or another running loop
        return pool.submit(lambda: asyncio.run(wait())).result()


async def _next(stream: Any) -> Sequence[Any] | None:
    async for page in stream:
        found: Sequence[Any] = page
        return found
    return None


MOST_BYTES = 2 * 2**30  # per object; no chunk has more than half
MOST_NAMES = 10**6  # directly below a prefix
THREADS = 16  # concurrent requests
RETRY: dict[str, Any] = {}  # obstore's default: 10 retries, three minutes
_PUTS = 6  # attempts per object if answers are lost or the store reports a conflict (409)
_PUT_SECONDS = 180  # no further attempt after this time
_PAUSE_SECONDS = 0.1  # before the second attempt; doubled each time
_PROBE = "conditional-writes"
_CLOCK_ERRORS = ("RequestTimeTooSkewed", "RequestExpired")  # codes in the body of a 403
_STATUS = re.compile(r"status code: (\d{3})")
_ODD_KEY = re.compile(r'Path "(.*?)"(?: contained|:)', re.DOTALL)
# Each of them defines a source of keys. Without any, no request is signed, and no keys are
# requested: obstore would ask a cloud's metadata service at an address that any network may serve.
_KEYS = {
    *("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE"),
    *("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
    "AWS_METADATA_ENDPOINT",
}
_first_process: list[int] = []  # the process that runs obstore, whose threads do not survive a fork


class ObjectsUnreachable(CacheError, ConnectionError):
    """The store did not answer, or answered with errors, after all retries."""


class OddKey(CacheError):
    """An object's key is not a path, which breaks every list that contains it."""


class NoBucket(CacheMissing):
    """The store has no bucket of that name."""


@dataclass(frozen=True)
class Bucket:
    """The objects below a URL; keys are relative to it. Safe to share between threads.

    A process forked from one that has used a store cannot use any.
    """

    url: ObjectUrl

    @property
    def path(self) -> Path:
        return self.url

    @property
    def is_local(self) -> bool:
        return False

    def read(self, key: str, max_bytes: int) -> FileContent | None:
        """Fetch an object; None if it is missing. Raises NoBucket if the bucket is missing too."""
        try:
            return self.get_tagged(key, max_bytes)
        except NoBucket:
            raise
        except CacheMissing:
            return None

    def get(self, key: str, most_bytes: int = MOST_BYTES) -> bytes:
        """Fetch an object of at most `most_bytes`; a larger one is not read.

        Raises CacheMissing, CacheDamaged (too large), ObjectsUnreachable, CacheNotWritable (not
        permitted).
        """

        found = self.get_tagged(key, most_bytes)
        if found.content is None:
            raise CacheDamaged(
                f"{self.url / key} has {found.size:,} bytes, expected at most {most_bytes:,}"
            )
        return found.content

    def get_tagged(self, key: str, most_bytes: int = MOST_BYTES) -> FileContent:
        """Fetch an object like `get`, with the tag that `replace` uses to detect changes."""

        def read(client: Any) -> FileContent:
            found = client.get(key)
            size, tag = found.meta["size"], found.meta["e_tag"] or ""
            is_wanted = size <= most_bytes
            content = received(found, size, self.url / key).tobytes() if is_wanted else None
            return FileContent(content, size, tag)

        return self._asked(key, read)

    def get_array(self, key: str, most_bytes: int) -> NDArray[np.uint8]:
        """Fetch an object like `get`, without another copy in memory: (bytes,) uint8."""

        def read(client: Any) -> NDArray[np.uint8]:
            found = client.get(key)
            if (size := found.meta["size"]) > most_bytes:
                raise CacheDamaged(
                    f"{self.url / key} has {size:,} bytes, expected at most {most_bytes:,}"
                )
            return received(found, size, self.url / key)

        return self._asked(key, read)

    def size(self, key: str) -> int:
        """Return an object's size in bytes. Raises as `get`."""
        return int(self._asked(key, lambda client: client.head(key)["size"]))

    def part(self, key: str, start: int, num_bytes: int) -> bytes:
        """Fetch bytes from `start` on, fewer if the object ends early. Raises as `get`."""

        def read(client: Any) -> bytes:
            found = client.get(key, options={"range": (start, start + num_bytes)})
            first, end = found.range
            if first != start or end > start + num_bytes:
                raise CacheDamaged(f"the store sends another part of {self.url / key}")
            return received(found, end - first, self.url / key).tobytes()

        return self._asked(key, read)

    def has(self, key: str) -> bool:
        """Return True if the object exists. Raises as `get`, except CacheMissing."""
        try:
            self._asked(key, lambda client: client.head(key))
        except NoBucket:
            raise
        except CacheMissing:
            return False
        return True

    def create(self, key: str, data: bytes) -> bool:
        """Put an object if it is absent. Return False if one exists, possibly this very one."""
        return self._put(key, data, "create", "AlreadyExistsError")

    def replace(self, key: str, data: bytes, tag: str | None = None) -> None:
        """Put an object over another one. Raises CacheBusy if that has another tag than `tag`."""
        mode: Any = "overwrite" if tag is None else {"e_tag": tag}
        if self._put(key, data, mode, "PreconditionError"):
            return
        if self.get_tagged(key, len(data)).content != data:  # otherwise the answer was lost
            raise CacheBusy(
                f"{self.url / key} was changed by another process",
                fix="run the same command again",
            )

    def delete(self, key: str) -> None:
        with suppress(CacheMissing):
            self._asked(key, lambda client: client.delete(key))

    def _put(self, key: str, data: bytes, mode: Any, refusal: str) -> bool:
        """Put, with retries after lost answers and conflicts (409); False after a `refusal`."""
        started = time.monotonic()
        for attempt in range(_PUTS):
            try:
                self._client.put(key, data, mode=mode, use_multipart=False)
                return True
            except Exception as error:
                if type(error).__name__ == refusal and _status_of(error) != "409":
                    return False
                late = time.monotonic() - started > _PUT_SECONDS
                if late or attempt == _PUTS - 1 or not _may_succeed(error):
                    raise self._refusal(key, error) from None
            time.sleep(_PAUSE_SECONDS * 2**attempt)
        raise AssertionError("the last put returned or raised")

    def list_files(self, prefix: str = "", max_keys: int = MAX_KEYS) -> Iterator[Listed]:
        """List every object below a prefix, at any depth; one request per thousand objects.

        Raises as `get`; ListWithoutEnd if there are more than `max_keys`.
        """
        where = self.url / prefix
        stream = self._asked(prefix, lambda s: s.list(prefix or None, chunk_size=PAGE_KEYS))
        found = pages(stream, max_keys, where)
        while (page := self._asked(prefix, lambda client: next(found, None))) is not None:
            yield from map(_listed, page)

    def list_folders(self, prefix: str = "") -> list[str]:
        return [key.rstrip("/").rpartition("/")[2] for key in self.names(prefix)[0]]

    def sizes(self, max_keys: int = MAX_KEYS) -> Callable[[Chunk], str | None]:
        """Return a function that compares sizes with a list, which its first call requests."""

        @cache
        def listed() -> dict[str, int]:
            return {each.key: each.size for each in self.list_files(max_keys=max_keys)}

        def fault(chunk: Chunk) -> str | None:
            if (found := listed().get(chunk.key)) is None:
                return "chunk missing"
            return None if found == chunk.num_bytes else wrong_size(found, chunk.num_bytes)

        return fault

    def check_chunk(self, chunk: Chunk, check: Check) -> str | None:
        try:
            content = self.get(chunk.key, chunk.num_bytes)
        except CacheMissing:
            return "chunk missing"
        except CacheDamaged:
            return f"chunk has more than {chunk.num_bytes:,} bytes"
        file: Any = io.BytesIO(content)
        return check(file, len(content))

    def map_chunk(self, chunk: Chunk, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return the values in memory, because an object cannot be mapped."""
        content = self.get_tagged(chunk.key, chunk.num_bytes).content
        if content is None or len(content) != chunk.num_bytes:
            raise BadFile(self.url / chunk.key, "chunk has the wrong size")
        little = np.dtype(dtype).newbyteorder("<")
        return np.frombuffer(content, little, math.prod(shape)).reshape(shape)

    def fetch(self, chunks: Sequence[Chunk]) -> None:
        """Do nothing: each chunk is fetched when it is read."""

    def at_once(
        self, function: Callable[[Item], Result], items: Iterable[Item], num_bytes: int
    ) -> Iterator[Result]:
        return in_parallel(function, items) if num_bytes else map(function, items)

    def names(self, prefix: str = "") -> tuple[list[str], list[Listed]]:
        """Return the folders and the objects directly below a prefix. Raises as `list_files`."""
        where = self.url / prefix

        def read(client: Any) -> Any:
            ask = client.list_with_delimiter_async
            return within(LIST_SECONDS, lambda: ask(prefix or None), where)

        found = self._asked(prefix, read)
        folders, objects = list(found["common_prefixes"]), found["objects"]
        if len(folders) + len(objects) > MOST_NAMES:
            raise ListWithoutEnd(f"{where} lists more than {MOST_NAMES:,} names")
        return folders, [_listed(each) for each in objects]

    def refuse_unconditional(self) -> None:
        """Raise CacheError if the store overwrites an object that a put should only create.

        Leaves an empty object, with which the next call needs only one request.
        """
        if self.create(_PROBE, b"") and self.create(_PROBE, b""):
            raise CacheError(
                f"the store of {self.url} ignores conditions: it overwrites an object that was to "
                f"be put only if absent (If-None-Match), so two writers could mix their records",
                fix="use a store with conditional writes",
            )

    @property
    def _client(self) -> Any:
        if _first_process and _first_process[0] != os.getpid():
            raise CacheError(
                f"{self.url} cannot be read in a process forked from one that reads it",
                fix="read the view before the processes start, or copy the cache to a folder",
            )
        if not _first_process:
            _first_process.append(os.getpid())
        return _client_of(self.url.bucket, self.url.key)

    def _asked(self, key: str, ask: Callable[[Any], Result]) -> Result:
        try:
            return ask(self._client)
        except CacheError:
            raise
        except Exception as error:
            raise self._refusal(key, error) from None

    def _refusal(self, key: str, error: Exception) -> CacheError:
        """Return the error for an object, without any part of obstore's message."""
        if isinstance(error, CacheError):
            return error
        where, kind, text = self.url / key if key else self.url, type(error).__name__, str(error)
        if kind == "InvalidPathError":
            name = _ODD_KEY.search(text)
            return OddKey(
                f"{self.url} holds an object whose key is not a path: "
                f"{one_line(name[1]) if name else 'it'} has an empty part, '.', '..' or a control "
                f"character, and the objects next to it cannot be listed",
                fix="remove it with the store's own tools, such as aws s3api delete-object",
            )
        if "NoSuchBucket" in text:
            return NoBucket(
                f"bucket {self.url.bucket!r} not found ({where})",
                fix="create it, or check AWS_ENDPOINT_URL and AWS_REGION",
            )
        if isinstance(error, FileNotFoundError):
            return CacheMissing(f"object {where} not found")
        status = _status_of(error)
        if any(word in text for word in _CLOCK_ERRORS):
            return CacheNotWritable(
                f"the store does not accept this machine's clock ({where}), which shows "
                f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}",
                fix="set the clock: `timedatectl set-ntp true`; then run the same command again",
            )
        refused = kind in ("PermissionDeniedError", "UnauthenticatedError")
        if refused or isinstance(error, PermissionError) or status in ("401", "403"):
            return CacheNotWritable(
                f"the store does not permit access to {where}",
                fix="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to a key that may access it; "
                "or, on a cloud's machine with a role, AWS_METADATA_ENDPOINT=http://169.254.169.254",
            )
        answer = f"it answered {status}" if status else "no answer"
        return ObjectsUnreachable(
            f"{where}: the store could not be reached ({answer}, after several attempts)",
            fix="check AWS_ENDPOINT_URL and AWS_REGION, then run the same command again; existing "
            "objects are not copied again",
        )


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield function(item) for each item, in order, with many requests at a time.

    At most 32 results wait to be taken.
    """
    rest = iter(items)
    first = list(islice(rest, THREADS))
    if len(first) < 2:
        yield from map(function, first)
        return
    pool = ThreadPoolExecutor(len(first), thread_name_prefix="objects")
    try:
        yield from in_order(pool, len(first), function, chain(first, rest))
    finally:
        pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=64)
def _client_of(bucket: str, prefix: str) -> Any:
    from obstore.store import S3Store

    options: Any = {"retry_config": RETRY or None}
    if not _KEYS.intersection(os.environ):
        options["skip_signature"] = True
    return S3Store(bucket, prefix=prefix or None, **options)


def _may_succeed(error: Exception) -> bool:
    """Return True if another put may succeed: the answer was lost, or was a conflict (409)."""
    return not isinstance(error, FileNotFoundError) and _status_of(error) in ("", "409")


def _status_of(error: Exception) -> str:
    """Return the HTTP status of the store's answer; "" if there was none."""
    found = _STATUS.search(str(error))
    return found[1] if found else ""


def _listed(found: Any) -> Listed:
    return Listed(found["path"], found["size"], found["e_tag"] or "")
