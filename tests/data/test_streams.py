"""Drivers of stores that fail, in a store that fails on request, on the web and without a key."""

import errno
import io
import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.config.data import SourceConfig
from pipeline.data.documents import BadFile, BadRecord, Piece, trusted
from pipeline.data.sources import Source, build_source
from pipeline.data.storage import MissingSource
from pipeline.data.streams import open_binary
from pipeline.errors import DataError

LINES = [json.dumps({"id": f"d{i}", "text": f"{i} " + "sea ship " * 50}) for i in range(300)]
DATA = "".join(line + "\n" for line in LINES).encode()


def build(path: str | tuple[str, ...], kind: str = "jsonl") -> Source:
    config = SourceConfig.model_validate({"kind": kind, "path": path})
    return build_source(config, max_document_bytes=1 << 20)


class Unauthorized(Exception):
    """A driver's own exception, of no class that Python knows."""


class WeakStore(MemoryFileSystem):
    """A store whose every operation can be made to fail, and that notes how much is asked for."""

    protocol = "weak"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures: ClassVar[dict[str, Exception]] = {}
    asked_bytes: ClassVar[list[int]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("weak://", "memory://")))

    def fail(self, operation: str) -> None:
        if operation in self.failures:
            raise self.failures[operation]

    def info(self, path: str, **kwargs: Any) -> Any:
        self.fail("list")
        info = super().info(path, **kwargs)
        info.pop("created", None)
        return info

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self.fail("open")
        stream = super()._open(path, mode, **kwargs)
        return stream if mode != "rb" else WeakFile(self, stream.getvalue())


class WeakFile(io.BytesIO):
    def __init__(self, fs: WeakStore, data: bytes) -> None:
        super().__init__(data)
        self._fs = fs

    def read(self, size: int | None = -1) -> bytes:
        self._fs.fail("read")
        data = super().read(size)
        self._fs.asked_bytes.append(len(data))
        return data


@pytest.fixture
def weak() -> Iterator[WeakStore]:
    fsspec.register_implementation("weak", WeakStore, clobber=True)
    WeakStore.failures.clear()
    WeakStore.asked_bytes.clear()
    fs = fsspec.filesystem("weak")
    yield fs
    fs.failures.clear()
    fs.rm("/", recursive=True)


FAILURES = [Unauthorized("no key"), OSError(errno.EIO, "no key"), OSError("no key"), TimeoutError()]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: repr(failure))
@pytest.mark.parametrize("operation", ["list", "open", "read"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "jsonl.gz"])
def test_a_store_that_fails_is_named_and_is_never_a_bad_file(
    weak: WeakStore, kind: str, operation: str, failure: Exception
) -> None:
    weak.pipe(f"/c/a.{kind}", {"jsonl": DATA, "parquet": parquet_bytes(2)}.get(kind, b"packed"))
    source = build("weak://c", kind=kind.removesuffix(".gz"))
    pieces = source.pieces()
    weak.failures[operation] = failure
    cause = "no key" if str(failure) else "TimeoutError"
    verb = "list" if operation == "list" else "read"
    with pytest.raises(DataError, match=f"cannot {verb} weak://.*c.*: {cause}") as caught:
        source.pieces() if operation == "list" else list(source.read(pieces[0]))
    assert not isinstance(caught.value, BadFile)
    if kind == "parquet":
        with pytest.raises(DataError, match=f"cannot {verb} weak://") as caught:
            source.pieces()
        assert not isinstance(caught.value, BadFile)


def test_a_store_that_fails_is_no_missing_location_among_several(weak: WeakStore) -> None:
    weak.pipe("/c/a.jsonl", DATA)
    source = build(("weak://c", "weak://nowhere"))
    assert [piece.flaw is None for piece in source.pieces()] == [True, False]
    weak.failures["list"] = Unauthorized("no key")
    with pytest.raises(DataError, match="cannot list weak://c: no key"):
        build(("weak://c", "weak://c")).pieces()
    weak.failures.clear()
    with pytest.raises(DataError, match="nonsense"):
        build(("weak://c", "nonsense://x")).pieces()


def test_what_the_block_raises_passes_unchanged(weak: WeakStore, tmp_path: Path) -> None:
    weak.pipe("/c/a.jsonl", DATA)
    (tmp_path / "a").write_bytes(DATA)
    for path in ("weak://c/a.jsonl", str(tmp_path / "a")):
        for error in (OSError(errno.ENOSPC, "full"), FileNotFoundError("other"), KeyError("k")):
            stack = ExitStack()
            stream = stack.enter_context(open_binary(path))
            assert stream.read(3) == DATA[:3]
            assert not stack.__exit__(type(error), error, None)
            assert stream.closed


def test_a_store_without_versions_is_known_by_sizes(weak: WeakStore) -> None:
    weak.pipe("/c/a.jsonl", DATA)
    source = build("weak://c/a.jsonl")
    assert source.contents() == [{"name": "a.jsonl", "bytes": str(len(DATA))}]
    weak.pipe("/c/a.jsonl", DATA[:-1])
    assert source.contents() == [{"name": "a.jsonl", "bytes": str(len(DATA) - 1)}]


def test_a_row_group_is_not_asked_for_as_a_whole(weak: WeakStore) -> None:
    texts = [str(number) * 4096 for number in range(1000)]
    weak.pipe(
        "/c/a.parquet",
        parquet_bytes(texts, compression="none", use_dictionary=False, write_batch_size=16),
    )
    (piece,) = build("weak://c", kind="parquet").pieces()
    assert piece.weight_bytes > 8 << 20
    weak.asked_bytes.clear()
    source = build("weak://c", kind="parquet")
    assert [d.text for d in trusted(source.read(piece))] == texts
    assert max(weak.asked_bytes) <= 2 << 20


def test_lines_before_a_range_are_counted_once_for_all_its_bad_records(weak: WeakStore) -> None:
    weak.pipe("/c/a.jsonl", DATA + b"{}\n" * 100)
    half = DATA.index(b"\n", len(DATA) // 2) + 1
    size = len(DATA) + 300
    piece = Piece(path="weak://c/a.jsonl", name="a", start=half, stop=size, weight_bytes=1)
    records = list(build("weak://c").read(piece))
    places = [record.where for record in records if isinstance(record, BadRecord)]
    assert places == [f"weak://c/a.jsonl:{number}" for number in range(301, 401)]
    assert sum(weak.asked_bytes) == size


def parquet_bytes(texts: Any, **options: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    texts = texts if isinstance(texts, list) else ["text"] * texts
    pq.write_table(pa.table({"text": texts}), sink, **options)
    return bytes(sink.getvalue())


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        del args


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a web server that gives the files of `tmp_path`."""
    handler = partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_web_address_is_read_and_an_absent_file_told_from_a_server_that_is_down(
    web: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(DATA)
    source = build(f"{web}/a.jsonl")
    (piece,) = source.pieces()
    assert piece.path == f"{web}/a.jsonl"
    assert [d.id for d in trusted(source.read(piece))] == [f"d{i}" for i in range(300)]
    with pytest.raises(MissingSource, match="b.jsonl holds no file"):
        build(f"{web}/b.jsonl").pieces()
    with pytest.raises(DataError, match="cannot list http://127.0.0.1:9/a.jsonl") as caught:
        build("http://127.0.0.1:9/a.jsonl").pieces()
    assert not isinstance(caught.value, MissingSource)


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An environment without credentials for S3, in which nothing beyond this machine is asked."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    # fsspec keeps a driver with the environment in which it was made.
    driver = fsspec.get_filesystem_class("s3")
    driver.clear_instance_cache()
    yield
    driver.clear_instance_cache()


def test_a_bucket_without_credentials_is_named(no_key: None) -> None:
    with pytest.raises(DataError, match="cannot list s3://corpus/text: .*credentials"):
        build("s3://corpus/text").pieces()
