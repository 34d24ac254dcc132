"""From a path or URL to the files behind it and their bytes, on this machine or in a store.

A location with `://` is read through fsspec, whose drivers know S3, Google Cloud Storage, the
Hugging Face hub and more; anything else is a local path.
"""

import glob
import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.data.documents import BadFile
from pipeline.errors import DataError

COMPRESSED_SUFFIXES = (".gz", ".zst")
READ_AHEAD_BYTES = 8 << 20
"""Bytes that a store is asked for at once."""
HASHING_THREADS = 8
"""Files hashed at once; the hash lets other threads run, and disks like several readers."""
VERSION_KEYS = ("ETag", "etag", "md5Hash", "crc32c", "blob_id", "LastModified", "mtime", "created")
"""What stores call the thing that changes with a file's contents, best first."""
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""URL scheme to the extra of this package that brings its driver."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a source; `name` is relative to the source, so that moving a corpus keeps ids."""

    path: str
    name: str
    num_bytes: int
    version: str | None = None
    """What a store says of the contents; local files are hashed instead."""
    is_missing: bool = False
    """Whether it was named, or is linked to, but is not there."""

    @property
    def is_compressed(self) -> bool:
        """Whether the file can only be read from its beginning."""
        return self.path.endswith(COMPRESSED_SUFFIXES)


def is_remote(location: str) -> bool:
    """Tell whether a location is a URL."""
    return "://" in location and not location.startswith("file://")


def find_all(locations: tuple[str, ...], suffixes: tuple[str, ...]) -> list[SourceFile]:
    """Find the files of several locations; of several, each gets its own prefix in the names.

    A location that does not exist among others that do is given as a missing file: what becomes
    of it is for the reader's policy.

    Raises:
        DataError: As `find_files`, where there is one location or none of them exists.
    """
    if len(locations) == 1:
        return find_files(locations[0], suffixes)
    files, problems = [], []
    for number, location in enumerate(locations):
        try:
            found = find_files(location, suffixes)
        except DataError as exc:
            problems.append(exc)
            found = [SourceFile(path=location, name=location, num_bytes=0, is_missing=True)]
        files += [_renamed(file, f"{number:04d}/{file.name}") for file in found]
    if len(problems) == len(locations):
        raise problems[0]
    return files


def find_files(location: str, suffixes: tuple[str, ...]) -> list[SourceFile]:
    """Find the files of a source, sorted by name.

    Args:
        location: A file, a directory (searched to any depth, hidden names left out) or a glob.
        suffixes: Endings that count in a directory, each also with `.gz` and `.zst` behind it.

    Raises:
        DataError: Nothing is there, the named file is empty, or a directory holds no such file.
    """
    if is_remote(location):
        return _find_remote(location, suffixes)
    path = Path(location.removeprefix("file://")).expanduser().absolute()
    if path.is_file():
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty: give a file with text (data.source.path)")
        return [_source_file(path, path.parent)]
    if path.is_dir():
        found = [p for p in _walk(path) if p.name.endswith(_wanted(suffixes))]
        files = [_source_file(p, path) for p in found]
        return _checked(files, str(path), suffixes)
    if glob.has_magic(str(path)):
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if not Path(p).is_dir()]
        if not found:
            raise DataError(f"no file matches data.source.path={location!r}")
        return _sorted(_source_file(p, _fixed_part(path)) for p in found)
    raise DataError(f"{path} does not exist (data.source.path={location!r})")


def describe_contents(files: Iterable[SourceFile]) -> list[dict[str, str]]:
    """Give name and sha256 of each local file, and name, size and version of each in a store.

    Raises:
        DataError: A file cannot be read.
    """
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return list(pool.map(_describe, files))


def file_sha256(path: Path) -> str:
    """Give the sha256 of a file's bytes as they lie on disk.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror or exc}") from exc


@contextmanager
def open_binary(path: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, wherever it is.

    Raises:
        BadFile: It is not there.
        DataError: It cannot be read; also while the block runs.
    """
    try:
        if is_remote(path):
            fs, inner = _filesystem(path)
            with fs.open(inner, "rb", block_size=READ_AHEAD_BYTES) as stream:
                yield stream
        else:
            with open(path, "rb") as stream:
                yield stream
    except FileNotFoundError as exc:
        raise BadFile("missing_file", f"{path} does not exist") from exc
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror or exc}") from exc


def local_copy_name(location: str) -> str:
    """Give a location with a local path made absolute: workers may stand in another directory."""
    if is_remote(location):
        return location
    return str(Path(location.removeprefix("file://")).expanduser().absolute())


def _find_remote(location: str, suffixes: tuple[str, ...]) -> list[SourceFile]:
    fs, inner = _filesystem(location)
    scheme = location.partition("://")[0]
    try:
        if glob.has_magic(inner):
            found = fs.glob(inner, detail=True)
            root = str(_fixed_part(Path(inner)))
        elif fs.isfile(inner):
            found, root = {inner: fs.info(inner)}, inner.rpartition("/")[0]
        else:
            found, root = fs.find(inner, detail=True), inner
    except (OSError, ValueError) as exc:
        raise DataError(f"cannot list {location}: {exc}") from exc
    infos = {path: info for path, info in found.items() if info.get("type") != "directory"}
    is_named = len(infos) == 1 and inner in infos
    files = []
    for path, info in infos.items():
        name = path.removeprefix(root.rstrip("/")).lstrip("/")
        hidden = any(part.startswith(".") for part in name.split("/"))
        if is_named or glob.has_magic(inner) or (not hidden and name.endswith(_wanted(suffixes))):
            files.append(
                SourceFile(
                    path=f"{scheme}://{path.lstrip('/') if scheme != 'memory' else path}",
                    name=name,
                    num_bytes=int(info["size"]),
                    version=_version(info),
                )
            )
    if not files:
        raise DataError(f"{location} holds no file that data.source reads, or does not exist")
    return _checked(files, location, suffixes)


def _filesystem(location: str) -> tuple[Any, str]:
    import fsspec

    scheme = location.partition("://")[0]
    try:
        fs, inner = fsspec.core.url_to_fs(location)
    except ImportError as exc:
        extra = EXTRAS.get(scheme)
        advice = f"pip install 'tandem-pretraining[{extra}]'" if extra else str(exc)
        raise DataError(f"{location} needs a driver that is not installed: {advice}") from exc
    except ValueError as exc:
        raise DataError(f"{location}: {exc}") from exc
    # A store is asked anew: what it listed before may have changed since.
    fs.invalidate_cache()
    return fs, str(inner)


def _version(info: dict[str, Any]) -> str | None:
    return next((str(info[key]) for key in VERSION_KEYS if info.get(key)), None)


def _describe(file: SourceFile) -> dict[str, str]:
    if file.is_missing:
        return {"name": file.name, "sha256": "missing"}
    if is_remote(file.path):
        return {"name": file.name, "bytes": str(file.num_bytes), "version": str(file.version)}
    return {"name": file.name, "sha256": file_sha256(Path(file.path))}


def _checked(files: list[SourceFile], place: str, suffixes: tuple[str, ...]) -> list[SourceFile]:
    if not any(file.num_bytes for file in files):
        raise DataError(
            f"directory {place} holds no text: none of its files is named "
            f"*{', *'.join(_wanted(suffixes))} and has bytes in it; "
            "name the files by a glob if they are called otherwise"
        )
    return _sorted(files)


def _wanted(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    return suffixes + tuple(s + c for s in suffixes for c in COMPRESSED_SUFFIXES)


def _walk(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if not path.is_dir() and not hidden:
            yield path


def _sorted(files: Iterable[SourceFile]) -> list[SourceFile]:
    return sorted(files, key=lambda file: file.name)


def _source_file(path: Path, root: Path) -> SourceFile:
    name = path.relative_to(root).as_posix()
    if not path.exists():
        return SourceFile(path=str(path), name=name, num_bytes=0, is_missing=True)
    return SourceFile(path=str(path), name=name, num_bytes=path.stat().st_size)


def _renamed(file: SourceFile, name: str) -> SourceFile:
    return SourceFile(**{**vars(file), "name": name})


def _fixed_part(pattern: Path) -> Path:
    fixed = [part for part in pattern.parents if not glob.has_magic(str(part))]
    return fixed[0]
