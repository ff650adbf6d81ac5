"""An object store in the memory of one process on the loopback address, for benchmarks.

It speaks as much of S3 as this project requests: put (conditional or not), get, head, delete, list.
moto's server, which the tests use, answers some 300 requests a second and would dominate the
measurements; this server answers thousands. It checks no credentials and keeps nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"
_MAX_KEYS = 1000  # in one answer to a list
_LAST = "\U0010ffff"  # sorts after every character of a key
_DATE, _TIME = "Wed, 01 Jan 2025 00:00:00 GMT", "2025-01-01T00:00:00.000Z"


class Answer(NamedTuple):
    status: str
    body: bytes = b""
    headers: Mapping[str, str] = {}


class ServedObjects:
    """Objects by key, and their keys in order, sorted again after a change."""

    def __init__(self) -> None:
        self._objects: dict[str, tuple[bytes, str]] = {}  # data, ETag
        self._sorted: list[str] | None = None

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Answer a request for a path below the bucket."""
        parts = urlsplit(target)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        if bucket != BUCKET:
            return Answer("404 Not Found", b"<Error><Code>NoSuchBucket</Code></Error>")
        if method == "GET" and not key:
            return self._list(dict(parse_qsl(parts.query)))
        if method == "PUT":
            return self._put(key, headers, body)
        if method == "DELETE":
            self._objects.pop(key, None)
            self._sorted = None
            return Answer("204 No Content")
        return self._get(key, headers.get("range", ""))

    def _put(self, key: str, headers: Mapping[str, str], body: bytes) -> Answer:
        _, existing = self._objects.get(key, (b"", None))
        is_forbidden = headers.get("if-none-match") == "*" and existing is not None
        if is_forbidden or headers.get("if-match", existing) != existing:
            body = b"<Error><Code>PreconditionFailed</Code></Error>"
            return Answer("412 Precondition Failed", body)
        tag = f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
        if existing is None:
            self._sorted = None
        self._objects[key] = body, tag
        return Answer("200 OK", headers={"ETag": tag})

    def _get(self, key: str, requested: str) -> Answer:
        if key not in self._objects:
            return Answer("404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>")
        data, tag = self._objects[key]
        headers = {"ETag": tag, "Last-Modified": _DATE}
        if not requested.startswith("bytes="):
            return Answer("200 OK", data, headers)
        first, _, last = requested.removeprefix("bytes=").partition("-")
        start = int(first) if first else len(data) - int(last)
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return Answer("206 Partial Content", data[start:stop], headers)

    def _list(self, query: Mapping[str, str]) -> Answer:
        """List a page of the keys that begin with a prefix, or the folders directly below it."""
        keys = self._sorted = self._sorted or sorted(self._objects)
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", _LAST)
        last = query.get("continuation-token", query.get("start-after", ""))
        index, lines = max(bisect_left(keys, prefix), bisect_right(keys, last)), list[str]()
        stop = bisect_left(keys, prefix + _LAST)
        while index < stop and len(lines) < _MAX_KEYS:
            key = last = keys[index]
            head, is_below, _ = key.removeprefix(prefix).partition(delimiter)
            if is_below:  # the other keys of this folder are skipped
                folder = f"{prefix}{head}{delimiter}"
                lines.append(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>")
                last = folder + _LAST
            else:
                data, tag = self._objects[key]
                lines.append(
                    f"<Contents><Key>{escape(key)}</Key><LastModified>{_TIME}</LastModified>"
                    f"<ETag>{escape(tag)}</ETag><Size>{len(data)}</Size></Contents>"
                )
            index = bisect_right(keys, last)
        is_truncated = index < stop
        token = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>"
        body = (
            f'<?xml version="1.0"?><ListBucketResult><Name>{BUCKET}</Name>'
            f"<KeyCount>{len(lines)}</KeyCount><IsTruncated>{str(is_truncated).lower()}"
            f"</IsTruncated>{token if is_truncated else ''}{''.join(lines)}</ListBucketResult>"
        )
        return Answer("200 OK", body.encode(), {"Content-Type": "application/xml"})


class Server:
    """Answers each connection's requests in their order.

    mb_per_second: sent over all connections, one answer after the other; 0: no limit.
    """

    def __init__(self, mb_per_second: float) -> None:
        self._objects, self._free_at = ServedObjects(), 0.0
        self._seconds_per_byte = 1e-6 / mb_per_second if mb_per_second else 0.0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.strip().split("\r\n")
                method, target, _ = first.split(" ")
                pairs = (line.partition(":") for line in lines)
                headers = {name.lower(): value.strip() for name, _, value in pairs}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                answer = self._objects.answer(method, target, headers, body)
                if self._seconds_per_byte:
                    now = asyncio.get_running_loop().time()
                    sending = len(answer.body) * self._seconds_per_byte
                    self._free_at = max(now, self._free_at) + sending
                    await asyncio.sleep(self._free_at - now)
                lines = [f"HTTP/1.1 {answer.status}", f"Content-Length: {len(answer.body)}"]
                lines += [f"{name}: {value}" for name, value in answer.headers.items()]
                writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
                writer.write(b"" if method == "HEAD" else answer.body)
                await writer.drain()
        writer.close()


async def _serve(mb_per_second: float) -> None:
    server = await asyncio.start_server(Server(mb_per_second).serve, "127.0.0.1", 0, limit=2**22)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def object_server(mb_per_second: float = 0.0) -> Iterator[str]:
    """Start a server in its own process, set obstore's variables and yield the bucket's URL.

    mb_per_second: simulated network rate; 0: no limit. Call it before this process uses any store.
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
