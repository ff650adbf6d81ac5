"""An object store in the memory of one process on the loopback address, for benchmarks.

It speaks as much of S3 as this project asks for: put (if absent), get, head, delete, list. moto's
server, which the tests use, answers some 300 requests a second and would be all that is measured;
this one answers thousands. It knows no credentials and keeps nothing.
"""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"
_MOST_KEYS = 1000  # of one answer to a list
_DATE = "Wed, 01 Jan 2025 00:00:00 GMT"
_TIME = "2025-01-01T00:00:00.000Z"


class Answer(NamedTuple):
    """To a request."""

    status: str
    body: bytes = b""
    headers: Mapping[str, str] = {}


_REFUSED = Answer("412 Precondition Failed", b"<Error><Code>PreconditionFailed</Code></Error>")


class StoredObject(NamedTuple):
    """An object."""

    data: bytes
    tag: str


class ServedObjects:
    """Objects by key."""

    def __init__(self) -> None:
        self._objects: dict[str, StoredObject] = {}
        self._sorted: list[str] | None = []

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """What a store answers to a request for a path below the bucket."""
        parts = urlsplit(target)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        if bucket != BUCKET:
            return Answer("404 Not Found", b"<Error><Code>NoSuchBucket</Code></Error>")
        if method == "GET" and not key:
            return self._list({name: values[0] for name, values in parse_qs(parts.query).items()})
        if method == "PUT":
            return self._put(key, headers, body)
        if method == "DELETE":
            if self._objects.pop(key, None) is not None:
                self._sorted = None
            return Answer("204 No Content")
        return self._get(key, headers)

    def _put(self, key: str, headers: Mapping[str, str], body: bytes) -> Answer:
        there = self._objects.get(key)
        if headers.get("if-none-match") == "*" and there is not None:
            return _REFUSED
        wanted = headers.get("if-match")
        if wanted is not None and (there is None or there.tag != wanted):
            return _REFUSED
        if there is None:
            self._sorted = None
        stored = StoredObject(body, f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"')
        self._objects[key] = stored
        return Answer("200 OK", headers={"ETag": stored.tag})

    def _get(self, key: str, headers: Mapping[str, str]) -> Answer:
        stored = self._objects.get(key)
        if stored is None:
            return Answer("404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>")
        described = {"ETag": stored.tag, "Last-Modified": _DATE}
        span = headers.get("range", "")
        if not span.startswith("bytes="):
            return Answer("200 OK", stored.data, described)
        first, _, last = span.removeprefix("bytes=").partition("-")
        size = len(stored.data)
        start = int(first) if first else size - int(last)
        stop = min(int(last) + 1, size) if first and last else size
        described["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Answer("206 Partial Content", stored.data[start:stop], described)

    def _list(self, query: Mapping[str, str]) -> Answer:
        if self._sorted is None:
            self._sorted = sorted(self._objects)
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token", query.get("start-after", ""))
        index = bisect.bisect_left(self._sorted, prefix)
        if after:
            index = max(index, bisect.bisect_right(self._sorted, after))
        lines: list[str] = []
        seen, last, is_cut = "", "", False
        for key in self._sorted[index:]:
            if not key.startswith(prefix):
                break
            folder = _folder_of(key, prefix, delimiter)
            if folder and (folder == seen or after.startswith(folder)):
                last = key
                continue
            if len(lines) == _MOST_KEYS:
                is_cut = True
                break
            seen, last = folder, key
            lines.append(_folder_line(folder) if folder else self._object_line(key))
        token = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if is_cut else ""
        body = (
            f'<?xml version="1.0"?><ListBucketResult><Name>{BUCKET}</Name><KeyCount>{len(lines)}'
            f"</KeyCount><IsTruncated>{str(is_cut).lower()}</IsTruncated>{token}{''.join(lines)}"
            "</ListBucketResult>"
        )
        return Answer("200 OK", body.encode(), {"Content-Type": "application/xml"})

    def _object_line(self, key: str) -> str:
        stored = self._objects[key]
        return (
            f"<Contents><Key>{escape(key)}</Key><LastModified>{_TIME}</LastModified>"
            f"<ETag>{escape(stored.tag)}</ETag><Size>{len(stored.data)}</Size></Contents>"
        )


def _folder_of(key: str, prefix: str, delimiter: str) -> str:
    """The folder directly below the prefix that a key is in; "" where it is in none."""
    rest = key[len(prefix) :]
    return prefix + rest[: rest.index(delimiter) + 1] if delimiter and delimiter in rest else ""


def _folder_line(folder: str) -> str:
    return f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"


class Wire:
    """What all connections together may send in a second; 0: as much as they can.

    One answer after the other takes the line, and is sent when its turn has passed.
    """

    def __init__(self, mb_per_second: float) -> None:
        self._bytes_per_second, self._free_at = mb_per_second * 1e6, 0.0

    def send(self, transport: asyncio.Transport, head: bytes, body: bytes) -> None:
        def write() -> None:
            transport.write(head)
            transport.write(body)

        if not self._bytes_per_second:
            write()
            return
        loop = asyncio.get_running_loop()
        begun = max(loop.time(), self._free_at)
        self._free_at = begun + len(body) / self._bytes_per_second
        loop.call_at(self._free_at, write)


class _Connection(asyncio.Protocol):
    """One client's requests, answered in their order."""

    def __init__(self, bucket: ServedObjects, line: Wire) -> None:
        self._bucket, self._line, self._received = bucket, line, bytearray()
        self._head: tuple[str, str, dict[str, str]] | None = None  # of the request that is coming

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while self._head is not None or (end := self._received.find(b"\r\n\r\n")) >= 0:
            if self._head is None:
                self._head = _parse_head(self._received[:end].decode("latin-1"))
                del self._received[: end + 4]
            method, target, headers = self._head
            size = int(headers.get("content-length", 0))
            if len(self._received) < size:
                return
            body = bytes(memoryview(self._received)[:size])
            del self._received[:size]
            self._head = None
            self._answer(method, self._bucket.answer(method, target, headers, body))

    def _answer(self, method: str, answer: Answer) -> None:
        lines = [f"HTTP/1.1 {answer.status}", f"Content-Length: {len(answer.body)}"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        body = b"" if method == "HEAD" else answer.body
        self._line.send(self._transport, head, body)


def _parse_head(text: str) -> tuple[str, str, dict[str, str]]:
    """Method, target and headers of a request, their names in small letters."""
    first, *lines = text.split("\r\n")
    method, target, _ = first.split(" ")
    named = (line.partition(":") for line in lines)
    return method, target, {name.lower(): value.strip() for name, _, value in named}


async def _serve(mb_per_second: float) -> None:
    bucket, line = ServedObjects(), Wire(mb_per_second)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(bucket, line), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def object_server(mb_per_second: float = 0.0) -> Iterator[str]:
    """A server in a process of its own, and obstore's variables set for it; gives the bucket's URL.

    mb_per_second: that it answers with, as if over a network; 0: as fast as it can. The variables
    must be set before this process has used any store.
    """
    command = [sys.executable, "-m", "benchmarks.synthetic.object_server", str(mb_per_second)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{process.stdout.readline().strip()}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_REGION": "us-east-1",
        }
        yield f"s3://{BUCKET}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    asyncio.run(_serve(float(sys.argv[1])))
