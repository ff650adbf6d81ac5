"""An object store on this machine, moto's, behind a proxy that counts requests and spoils some."""

from __future__ import annotations

import http.client
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from moto import backends
from moto.server import ThreadedMotoServer

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
    """spoil: (method, path, how many such requests came before) -> what happens to it."""

    port: int
    requests: list[tuple[str, str]] = field(default_factory=list)
    spoil: Callable[[str, str, int], Fault] = lambda method, path, before: None
    num_open: int = 0  # requests that the proxy has not dealt with yet

    def take(self, method: str, path: str) -> Fault:
        with _lock:
            before = self.requests.count((method, path))
            self.requests.append((method, path))
            return self.spoil(method, path, before)

    def settle(self) -> None:
        """Wait until the store has done what was asked, also by a process that is dead."""
        while self.num_open:
            time.sleep(0.01)

    def all_keys(self) -> list[str]:
        """Of all objects, past the proxy."""
        found = re.findall(b"<Key>([^<]*)</Key>", self.ask("GET", "?list-type=2&max-keys=9999"))
        return [key.decode() for key in found]

    def ask(self, method: str, key: str, body: bytes = b"") -> bytes:
        """Go round the code under test: straight to the store."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request(method, f"/bucket/{key}", body, {"Authorization": _SIGNED})
        content = connection.getresponse().read()
        connection.close()
        return content


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
        headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
        if fault == "unconditional":
            headers = {k: v for k, v in headers.items() if k.lower() != "if-none-match"}
        connection = http.client.HTTPConnection("127.0.0.1", self.server_of.port)
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "lost":
            self.close_connection = True
            return
        if fault == "half":
            content = content[: len(content) // 2]
        self._answer(answer.status, dict(answer.getheaders()), content)

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


class _Proxy(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing to say: a test has killed the client."""


@contextmanager
def running(*, has_proxy: bool = True) -> Iterator[Server]:
    """The server and its proxy; the environment leads obstore to the proxy, or past it."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    server = Server(moto.get_host_and_port()[1])
    handler = type("Handler", (_Handler,), {"server_of": server})
    proxy = _Proxy(("127.0.0.1", 0), handler)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{proxy.server_address[1] if has_proxy else server.port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        patch.setattr(objects, "RETRY", {"max_retries": 3, "backoff": _QUICK})
        patch.setattr(objects, "_PAUSE_SECONDS", 0.01)
        # moto lists its own folder for every request, which is a third of a request's time.
        names = tuple(backends.list_of_moto_modules())
        patch.setattr(backends, "list_of_moto_modules", lambda: names)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        objects._client_of.cache_clear()
        yield server
    proxy.shutdown()
    proxy.server_close()
    moto.stop()
    objects._client_of.cache_clear()


@contextmanager
def emptied(server: Server) -> Iterator[Server]:
    """The server with one empty bucket and nothing spoiled."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    for method, path in (("POST", "/moto-api/reset"), ("PUT", "/bucket")):
        connection.request(method, path)
        connection.getresponse().read()
    connection.close()
    server.spoil = lambda method, path, before: None
    server.requests.clear()
    yield server


def a_cache(folder: Path) -> Path:
    """The cache of tests.support.caches.random_cache, complete: 18 chunks."""
    return fill(folder / "t-e4812202")
