"""An object store with inconsistent responses: bounded memory, one message."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from teach_once.runtime.machine.urls import ObjectUrl, path_or_url
from teach_once.store import CacheDamaged, CacheError, CacheFull, CacheNotWritable, TeacherCache
from teach_once.store.command import cli
from teach_once.store.format.manifest import Manifest
from teach_once.store.format.metadata import zarr_metadata
from teach_once.store.move.copy import copy_cache
from teach_once.store.place import bucket as answers
from teach_once.store.place import bucket as store_objects
from teach_once.store.place.bucket import Bucket, Listed, in_parallel
from teach_once.store.read.mirror import attach
from tests.support.caches.object_store import ENVIRONMENT, Server, a_cache
from tests.support.caches.random_cache import records_of

CACHE = "caches/t-e4812202"
GROUP = f"{CACHE}/teacher.zarr"
ENDLESS_BYTES = 2**26  # what is sent if nobody stops it
PLENTY = 10**9


@dataclass
class Hostile:
    """answer: what a GET of this server gets. sent: bytes of the last body."""

    url: str
    answer: Callable[[BaseHTTPRequestHandler], None] = lambda request: None
    sent: int = 0
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hostile]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            server.asked.append((self.path, self.headers.get("Authorization")))
            server.answer(self)

        do_HEAD = do_PUT = do_GET

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = Hostile(f"http://127.0.0.1:{http.server_address[1]}")
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store_objects, "RETRY", {"max_retries": 0})
    store_objects._client_of.cache_clear()
    yield server
    http.shutdown()
    http.server_close()
    store_objects._client_of.cache_clear()


def head(request: BaseHTTPRequestHandler, status: int, **headers: object) -> None:
    request.send_response_only(status)
    request.send_header("ETag", '"a"')
    request.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), str(value))
    request.end_headers()


def endless(server: Hostile, status: int = 200, **headers: object) -> None:
    """Answer with a body that goes on after the bytes that were announced."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        head(request, status, Content_Length=10, Transfer_Encoding="chunked", **headers)
        server.sent = 0
        try:
            while server.sent < ENDLESS_BYTES:
                request.wfile.write(b"10000\r\n" + bytes(2**16) + b"\r\n")
                server.sent += 2**16
            request.wfile.write(b"0\r\n\r\n")
        except OSError:
            request.close_connection = True

    server.answer = answer


def pages_without_end(server: Hostile, page: str) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        number = len(server.asked)
        text = (
            f"<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>{number}"
            f"</NextContinuationToken>{page.replace('NUMBER', str(number))}</ListBucketResult>"
        ).encode()
        head(request, 200, Content_Length=len(text))
        request.wfile.write(text)

    server.answer = answer


KEYS = "".join(
    f"<Contents><Key>caches/NUMBER-{n}</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified>"
    f'<ETag>"a"</ETag><Size>1</Size></Contents>'
    for n in range(100)
)
FOLDERS = "<CommonPrefixes><Prefix>caches/NUMBER/</Prefix></CommonPrefixes>"


def objects_at(text: str) -> Bucket:
    url = path_or_url(text)
    assert isinstance(url, ObjectUrl)
    return Bucket(url)


READS: dict[str, Callable[[Bucket], object]] = {
    "get": lambda objects: objects.get("k", 100),
    "tagged": lambda objects: objects.get_tagged("k", 100),
    "array": lambda objects: objects.get_array("k", 100),
}


@pytest.mark.parametrize("read", READS)
def test_object_longer_than_announced_is_refused_before_its_end(
    hostile: Hostile, read: str
) -> None:
    endless(hostile)
    with pytest.raises(CacheDamaged, match=r"sends more of s3://bucket/k than 10 bytes"):
        READS[read](objects_at("s3://bucket"))
    assert hostile.sent < ENDLESS_BYTES


def test_part_longer_than_asked_for_is_refused_before_its_end(hostile: Hostile) -> None:
    endless(hostile, 206, Content_Range="bytes 0-9/1000")
    with pytest.raises(CacheDamaged, match=r"sends more of s3://bucket/k than 10 bytes"):
        objects_at("s3://bucket").part("k", 0, 10)
    assert hostile.sent < ENDLESS_BYTES


@pytest.mark.parametrize("page", [KEYS, ""])
def test_list_without_end_is_refused(
    hostile: Hostile, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages_without_end(hostile, page)
    monkeypatch.setattr(answers, "LIST_SECONDS", 30.0 if page else 0.3)
    with pytest.raises(CacheError, match=r"lists more than 2,000|has not ended a list") as error:
        list(objects_at("s3://bucket").list_files("caches", 2000))
    assert "fix: check AWS_ENDPOINT_URL" in str(error.value)


@pytest.mark.parametrize("page", [FOLDERS, ""])
def test_names_without_end_are_refused_by_the_command(
    hostile: Hostile,
    page: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pages_without_end(hostile, page)
    monkeypatch.setattr(store_objects, "LIST_SECONDS", 0.3)
    assert cli(["list", "--caches", "s3://bucket/caches"]) == 2
    assert "s3://bucket/caches: the store has not ended a list" in capsys.readouterr().err


def test_request_without_keys_in_the_environment_is_unsigned_and_asks_nobody_for_keys(
    hostile: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile.answer = lambda request: head(request, 403, Content_Length=0)
    for name in (*store_objects._KEYS, "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(CacheNotWritable, match=r"set AWS_ACCESS_KEY_ID .* AWS_METADATA_ENDPOINT"):
        objects_at("s3://bucket").get("k")
    assert hostile.asked == [("/bucket/k", None)]
    hostile.asked.clear()  # with that variable, as on a cloud's machine, its service is asked
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", hostile.url)
    store_objects._client_of.cache_clear()
    with pytest.raises(CacheError):
        objects_at("s3://bucket").get("k")
    assert "/latest/api/token" in {path for path, _ in hostile.asked}


def test_requests_in_parallel_keep_few_results_that_nobody_has_asked_for() -> None:
    done: list[int] = []
    results = in_parallel(lambda number: done.append(number) or number, range(1000))  # type: ignore[func-returns-value]
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert len(done) <= 40
    assert list(in_parallel(lambda number: number, range(100))) == list(range(100))


# ---- a real store, with strange objects


@pytest.fixture
def caches(server: Server, tmp_path: Path) -> ObjectUrl:
    """s3://bucket/caches with one complete cache."""
    url = path_or_url("s3://bucket/caches")
    assert isinstance(url, ObjectUrl)
    copy_cache(TeacherCache.open(a_cache(tmp_path)), url)
    return url


def test_lists_are_read_within_a_running_event_loop_too(caches: ObjectUrl) -> None:
    async def notebook() -> tuple[list[str], int]:
        return Bucket(caches).names()[0], len(list(Bucket(caches).list_files()))

    names, num_objects = asyncio.run(notebook())
    assert names == ["t-e4812202"]
    assert num_objects > 18


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_mirror_compares_metadata_before_it_is_written(
    server: Server, caches: ObjectUrl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spelled(manifest: Manifest) -> dict[str, bytes]:
        """As another version of zarr would, so that what is there counts."""
        return {**zarr_metadata(manifest), "logits/zarr.json": b"{}"}

    monkeypatch.setattr("teach_once.store.read.zarr_source.zarr_metadata", spelled)
    server.ask("PUT", f"{GROUP}/logits/zarr.json", bytes(3 * 2**20))
    folder = attach(caches, tmp_path / "mirror", PLENTY)
    with pytest.raises(CacheDamaged, match=r"zarr\.json has 3,145,728 bytes, expected at most"):
        TeacherCache.open(folder / "t-e4812202")
    server.ask("PUT", f"{GROUP}/logits/zarr.json", b"forged")
    with pytest.raises(CacheDamaged, match="zarr metadata damaged"):
        TeacherCache.open(folder / "t-e4812202")
    assert not list((tmp_path / "mirror").rglob("zarr.json"))


def test_mirror_counts_manifests_and_metadata(
    server: Server, caches: ObjectUrl, tmp_path: Path
) -> None:
    for number in range(20):
        server.ask("PUT", f"caches/x-{number}/manifest.json", bytes(10_000))
    with pytest.raises(CacheFull, match="the manifests of the caches at s3://bucket/caches") as e:
        attach(caches, tmp_path / "mirror", 100_000)
    assert "fix: name the cache: --cache s3://bucket/caches/CACHE" in str(e.value)
    assert size_of(tmp_path / "mirror") == 0
    folder = attach(caches, tmp_path / "mirror", 10**6)
    cache = TeacherCache.open(folder / "t-e4812202")
    most = size_of(tmp_path / "mirror/bucket")
    folder = attach(caches, tmp_path / "mirror", most, ["t-e4812202"])  # the others are not needed
    cache = TeacherCache.open(folder / "t-e4812202")
    assert (cache.read_view(0)["logits"] == records_of(0, slice(None))["logits"]).all()
    assert size_of(tmp_path / "mirror/bucket") <= most
    assert len(list((tmp_path / "mirror").rglob("manifest.json"))) < 21


def test_journals_larger_than_any_cache_has_are_refused_unread(
    server: Server, caches: ObjectUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teach_once.store.place.bucket_log.SPARE_BYTES", 64 * 10**6 - 10_000)
    for number in range(3, 13):
        server.ask("PUT", f"{CACHE}/journal/{number:06d}-0000.jsonl", bytes(10**5))
    monkeypatch.setattr("teach_once.store.place.bucket_log._MOST_REPEATED", 1)
    monkeypatch.setattr("teach_once.store.place.bucket_log.SPARE_BYTES", 10**5)
    monkeypatch.setattr(
        "teach_once.store.place.bucket_log.most_journal_bytes", lambda manifest: 2 * 10**5
    )
    server.requests.clear()
    with pytest.raises(CacheDamaged, match=r"contains 11 files of 1,00\d,\d+ bytes, expected"):
        TeacherCache.open(caches / "t-e4812202")
    assert not any("jsonl" in path for _, path in server.requests)


def test_journal_larger_than_listed_and_journals_in_large_numbers_are_refused(
    server: Server, caches: ObjectUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Bucket.names

    def small(objects: Bucket, prefix: str = "") -> tuple[list[str], list[Listed]]:
        folders, found = names(objects, prefix)
        return folders, [dataclasses.replace(each, size=1) for each in found]

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "names", small)
        with pytest.raises(CacheDamaged, match=r"jsonl has [\d,]+ bytes, expected at most 1"):
            TeacherCache.open(caches / "t-e4812202")
    monkeypatch.setattr("teach_once.store.place.bucket_log._MOST_WHOLE", 0)
    with pytest.raises(CacheDamaged, match="journal contains 1 file of"):
        TeacherCache.open(caches / "t-e4812202")


def test_url_of_more_folders_than_are_looked_into_asks_for_the_cache(
    server: Server, caches: ObjectUrl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teach_once.store.read.mirror._MOST_CACHES", 1)
    attach(caches, tmp_path / "mirror", PLENTY)
    server.ask("PUT", "caches/another/x", b"")
    with pytest.raises(CacheError, match="contains 2 folders, too many to look for") as error:
        attach(caches, tmp_path / "mirror", PLENTY)
    assert "fix: name the cache: --cache s3://bucket/caches/CACHE" in str(error.value)
    attach(caches, tmp_path / "mirror", PLENTY, ["t-e4812202"])


@pytest.mark.parametrize("key", ["caches/./x", "caches//", "caches/a%01b"])
def test_key_that_is_not_a_path_is_named(
    server: Server, caches: ObjectUrl, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.ask("PUT", key, b"x")
    assert cli(["list", "--caches", "s3://bucket/caches"]) == 2
    told = capsys.readouterr().err
    assert "could not be reached" not in told
    assert "s3://bucket/caches holds an object whose key is not a path: caches/" in told
    assert "fix: remove it with the store's own tools" in told
