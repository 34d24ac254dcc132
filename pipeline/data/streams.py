"""From a path or URL to its bytes, whatever driver reads it, with errors that name it.

A location with `://` is read through fsspec, whose drivers know S3, Google Cloud Storage, the
Hugging Face hub and more; anything else is a local path.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from pipeline.data.documents import BadFile
from pipeline.errors import DataError

READ_AHEAD_BYTES = 8 << 20
"""Bytes that a store is asked for at once."""
ABSENT_STATUSES = (404, 410)
"""Answers of a web server that there is no such file."""
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""URL scheme to the extra of this package that brings its driver."""


def is_remote(location: str) -> bool:
    """Tell whether a location is a URL."""
    return "://" in location and not location.startswith("file://")


class ByteStream(io.RawIOBase):
    """The bytes of an open file; whatever its driver raises is an error of ours that names it."""

    def __init__(self, path: str, stream: IO[bytes]) -> None:
        """Take a stream and where it comes from."""
        self._path = path
        self._stream = stream

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that it can be read from any place."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Give the next bytes, fewer than `size` only at the end.

        Raises:
            BadFile: The file is gone.
            DataError: It cannot be read.
        """
        with named_errors(self._path):
            return self._stream.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte.

        Raises:
            DataError: The driver cannot.
        """
        with named_errors(self._path):
            return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """Give the number of the next byte."""
        return self._stream.tell()

    def close(self) -> None:
        """Close the stream below."""
        if not self.closed:
            super().close()
            with named_errors(self._path):
                self._stream.close()


@contextmanager
def open_binary(path: str) -> Iterator[ByteStream]:
    """Open a file for reading, wherever it is; what the block itself raises passes unchanged.

    Raises:
        BadFile: It is not there.
        DataError: It cannot be read; also while the block runs.
    """
    with named_errors(path):
        if is_remote(path):
            fs, inner = open_filesystem(path)
            opened = fs.open(inner, "rb", block_size=READ_AHEAD_BYTES)
        else:
            opened = open(path, "rb")  # noqa: SIM115
    with ByteStream(path, opened) as stream:
        yield stream


def open_filesystem(location: str) -> tuple[Any, str]:
    """Give the driver of a URL and the path in its store.

    Raises:
        DataError: There is no such driver, it is not installed, or it cannot start.
    """
    import fsspec

    scheme = location.partition("://")[0]
    with named_errors(location, "open"):
        try:
            fs, inner = fsspec.core.url_to_fs(location)
        except ImportError as exc:
            extra = EXTRAS.get(scheme)
            advice = f"pip install 'tandem-pretraining[{extra}]'" if extra else str(exc)
            raise DataError(f"{location} needs a driver that is not installed: {advice}") from exc
        # A store is asked anew: what it listed before may have changed since.
        fs.invalidate_cache()
    return fs, str(inner)


@contextmanager
def named_errors(location: str, verb: str = "read") -> Iterator[None]:
    """Turn what a driver raises into errors of ours; each driver has types of its own.

    Args:
        location: The file or place that the driver is asked for.
        verb: What is asked.

    Raises:
        BadFile: The driver says that nothing is there.
        DataError: It raises anything else.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as exc:
        if is_absence(exc):
            raise BadFile("missing_file", f"{location} does not exist") from exc
        cause = exc.__cause__ if isinstance(exc, FileNotFoundError) else exc
        text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        raise DataError(f"cannot {verb} {location}: {text}") from exc


def is_absence(exc: Exception) -> bool:
    """Tell whether a driver says that a file is not there.

    fsspec's HTTP driver raises FileNotFoundError at every failure, with aiohttp's as its cause.
    """
    is_http = type(exc.__cause__).__module__.partition(".")[0] == "aiohttp"
    is_other = is_http and getattr(exc.__cause__, "status", None) not in ABSENT_STATUSES
    return isinstance(exc, FileNotFoundError) and not is_other
