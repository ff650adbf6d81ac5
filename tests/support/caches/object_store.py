"""A local object store (moto) behind a server that counts requests and disturbs some.

moto is called as a function, which saves the connection, thread and parsing of each request, half
of its cost.
"""

from __future__ import annotations

import functools
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from moto import backends
from moto.core import DEFAULT_ACCOUNT_ID, serialize
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

from teach_once.store.place import bucket as objects
from tests.support.caches.random_cache import fill

SECRETS = ("AKIDEXAMPLE", "SECRETEXAMPLE")
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": SECRETS[0],
    "AWS_SECRET_ACCESS_KEY": SECRETS[1],
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}
_QUICK = {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=20)}

_SLOW_SECONDS = 0.05

_SIGNED = "AWS4-HMAC-SHA256 Credential=A/20260101/us-east-1/s3/aws4_request, Signature=0"
# What happens to a request: an HTTP status instead of the store's answer; "skewed", refused for the
# clock; "cut" before it reaches
# the store; "lost" after the store has done it; "slow" to be answered; "unconditional", its
# conditions taken away; "half", its answer's content cut off, and announced so.
Fault = int | str | None


@dataclass
class Server:
    """The server. spoil: (method, path, number of earlier such requests) -> disturbance."""

    requests: list[tuple[str, str]] = field(default_factory=list)
    spoil: Callable[[str, str, int], Fault] = lambda method, path, before: None
    num_open: int = 0  # requests in progress

    def take(self, method: str, path: str) -> Fault:
        with _lock:
            before = self.requests.count((method, path))
            self.requests.append((method, path))
            return self.spoil(method, path, before)

    def settle(self) -> None:
        """Wait until the store has handled all requests, even of dead processes."""
        while self.num_open:
            time.sleep(0.01)

    def all_keys(self) -> list[str]:
        """Return the keys of all objects."""
        bucket = backends.get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"].buckets["bucket"]
        return sorted(bucket.keys)

    def ask(self, method: str, key: str, body: bytes = b"") -> bytes:
        """Send a request directly to the store, bypassing the code under test."""
        return _answer_of_moto(method, f"/bucket/{key}", {"Authorization": _SIGNED}, body)[2]


@functools.cache
def _moto() -> DomainDispatcherApplication:
    # moto lists its own folder for every request, which is a third of a request's time, and parses
    # the times of all objects for every list of them.
    names = tuple(backends.list_of_moto_modules())
    backends.list_of_moto_modules = lambda: names
    serialize.parse_to_aware_datetime = functools.cache(serialize.parse_to_aware_datetime)
    return DomainDispatcherApplication(create_backend_app)


def _answer_of_moto(
    method: str, path: str, headers: Mapping[str, str], body: bytes
) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and content of moto's response, by WSGI."""
    before, _, query = path.partition("?")
    environ: dict[str, object] = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(before).decode("latin-1"),
        "QUERY_STRING": query,
        "RAW_URI": path,
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "CONTENT_LENGTH": str(len(body)),
        "HTTP_HOST": "127.0.0.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    for name, value in headers.items():
        if name.lower() == "content-type":
            environ["CONTENT_TYPE"] = value
        elif name.lower() not in ("host", "content-length"):
            environ[f"HTTP_{name.upper().replace('-', '_')}"] = value
    started: list[tuple[str, list[tuple[str, str]]]] = []
    answer = _moto()(environ, lambda status, given, error=None: started.append((status, given)))
    content = b"".join(answer)
    ((status, given),) = started
    return int(status.split()[0]), dict(given), content


_lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement
    server_of: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _forward(self) -> None:
        with _lock:
            self.server_of.num_open += 1
        try:
            self._forward_one()
        finally:
            with _lock:
                self.server_of.num_open -= 1

    def _forward_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server_of.take(self.command, self.path)
        if isinstance(fault, int):
            self._answer(fault, {}, b"<Error><Code>AKIDEXAMPLE</Code></Error>")
            return
        if fault == "skewed":
            self._answer(403, {}, b"<Error><Code>RequestTimeTooSkewed</Code></Error>")
            return
        if fault == "cut":
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(_SLOW_SECONDS)
        headers = dict(self.headers.items())
        if fault == "unconditional":
            headers = {k: v for k, v in headers.items() if k.lower() != "if-none-match"}
        status, given, content = _answer_of_moto(self.command, self.path, headers, body)
        if fault == "lost":
            self.close_connection = True
            return
        if fault == "half":
            content = content[: len(content) // 2]
        self._answer(status, given, content)

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        size = len(content) if self.command != "HEAD" else headers.get("Content-Length", "0")
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward


class _Served(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore the error of a client that a test has killed."""


@contextmanager
def running() -> Iterator[Server]:
    """Yield the server, to which the environment directs obstore."""
    server = Server()
    handler = type("Handler", (_Handler,), {"server_of": server})
    served = _Served(("127.0.0.1", 0), handler)
    served.daemon_threads = True
    threading.Thread(target=served.serve_forever, args=(0.05,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{served.server_address[1]}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        patch.setattr(objects, "RETRY", {"max_retries": 3, "backoff": _QUICK})
        patch.setattr(objects, "_PAUSE_SECONDS", 0.01)
        objects._client_of.cache_clear()
        yield server
    served.shutdown()
    served.server_close()
    objects._client_of.cache_clear()


@contextmanager
def emptied(server: Server) -> Iterator[Server]:
    """Yield the server with one empty bucket and without disturbances."""
    for method, path in (("POST", "/moto-api/reset"), ("PUT", "/bucket")):
        _answer_of_moto(method, path, {}, b"")
    server.spoil = lambda method, path, before: None
    server.requests.clear()
    yield server


def a_cache(folder: Path) -> Path:
    """Create the complete cache of tests.support.caches.random_cache: 18 chunks."""
    return fill(folder / "t-e4812202")
