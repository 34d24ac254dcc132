"""Checkpoints in an object store, by URL: the operations of `CheckpointStore` through fsspec."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from pipeline.data.documents import BadFile
from pipeline.data.streams import named_errors, open_filesystem
from pipeline.errors import CheckpointError, DataError
from pipeline.training.checkpoint_store import Buffer


class ObjectStore:
    """Objects whose names begin with one URL; an object appears whole or not at all."""

    rename = None

    def __init__(self, url: str) -> None:
        """Open the store.

        Args:
            url: Where names begin, as in s3://bucket/run.

        Raises:
            CheckpointError: There is no driver for it, or it cannot start.
        """
        self._url = url
        with self._errors("", "open"):
            self._filesystem, root = open_filesystem(url)
        self._root = root.rstrip("/")

    def write(self, files: Mapping[str, Iterable[Buffer]]) -> None:
        """Write objects one by one; see `CheckpointStore`."""
        for name, chunks in files.items():
            with self._errors(name, "write"), self._filesystem.open(self._path(name), "wb") as file:
                for chunk in chunks:
                    file.write(chunk)

    def read_into(self, name: str, offset_bytes: int, buffer: memoryview) -> None:
        """Fill a buffer; see `CheckpointStore`."""
        stop = offset_bytes + len(buffer)
        with self._errors(name, "read"):
            data = self._filesystem.cat_file(self._path(name), start=offset_bytes, end=stop)
        if len(data) != len(buffer):
            raise CheckpointError(f"{self._url}/{name} ends before byte {stop}")
        buffer[:] = data

    def entries(self, directory: str = "") -> dict[str, int]:
        """List a directory; see `CheckpointStore`."""
        place = self._path(directory)
        try:
            with self._errors(directory, "list"):
                found = self._filesystem.ls(place, detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        # Some stores list a directory as an entry of itself.
        named = {e["name"].rstrip("/"): int(e["size"] or 0) for e in found}
        return {n.rsplit("/", 1)[-1]: size for n, size in named.items() if n != place}

    def remove(self, name: str) -> None:
        """Remove an object, or all below a name; see `CheckpointStore`."""
        try:
            with self._errors(name, "remove"):
                self._filesystem.rm(self._path(name), recursive=True)
        except FileNotFoundError:
            return

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    @contextmanager
    def _errors(self, name: str, verb: str) -> Iterator[None]:
        """Let absence pass as FileNotFoundError, and turn all else into an error of ours."""
        try:
            with named_errors(f"{self._url}/{name}".rstrip("/"), verb):
                yield
        except BadFile as exc:
            raise FileNotFoundError(str(exc)) from exc
        except CheckpointError:
            raise
        except DataError as exc:
            raise CheckpointError(str(exc)) from exc
