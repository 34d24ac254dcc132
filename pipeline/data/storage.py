"""From a path or URL to the files behind it and what tells their contents, local or in a store."""

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.data.documents import BadFile
from pipeline.data.streams import is_absence, is_remote, named_errors, open_filesystem
from pipeline.errors import DataError

COMPRESSED_SUFFIXES = (".gz", ".zst")
UNREAD_SUFFIXES = (".bz2", ".xz", ".lz4", ".zip", ".7z", ".br", ".snappy", ".zstd")
"""Of compressed files that are not read."""
HASHING_THREADS = 8
"""Files hashed at once; the hash lets other threads run, and disks like several readers."""
VERSION_KEYS = ("ETag", "etag", "md5Hash", "crc32c", "blob_id", "LastModified", "mtime", "created")
"""What stores call the thing that changes with a file's contents, best first."""


class MissingSource(DataError):
    """Nothing is where a source is said to be; a store that cannot be asked is no such case."""


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


def find_all(locations: tuple[str, ...], suffixes: tuple[str, ...], field: str) -> list[SourceFile]:
    """Find the files of several locations; of several, each gets its own prefix in the names.

    A location that does not exist among others that do is given as a missing file: what becomes
    of it is for the reader's policy. An empty file among others is a file without documents.

    Args:
        locations: Files, directories or globs, local or by URL.
        suffixes: As `find_files` takes them.
        field: The config field that names them, for messages.

    Raises:
        MissingSource: None of the locations exists.
        DataError: A location cannot be listed, or all that exist are empty.
    """
    if len(locations) == 1:
        return find_files(locations[0], suffixes, field)
    files, absent = [], []
    for number, location in enumerate(locations):
        try:
            found = _find(location, suffixes, field)
        except MissingSource as exc:
            absent.append(exc)
            found = [SourceFile(path=location, name=location, num_bytes=0, is_missing=True)]
        files += [replace(file, name=f"{number:04d}/{file.name}") for file in found]
    if len(absent) == len(locations):
        raise absent[0]
    return _not_all_empty(files, ", ".join(locations), field)


def find_files(location: str, suffixes: tuple[str, ...], field: str) -> list[SourceFile]:
    """Find the files of a source, sorted by name.

    Args:
        location: A file, a directory (searched to any depth, hidden names left out) or a glob.
        suffixes: Endings that count in a directory, each also with `.gz` and `.zst` behind it.
        field: The config field that names the location, for messages.

    Raises:
        MissingSource: Nothing is there.
        DataError: It cannot be listed, holds no such file, or one that is called nearly so and
            would be left out, or all of them are empty.
    """
    return _not_all_empty(_find(location, suffixes, field), location, field)


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
        BadFile: It is not there.
        DataError: It cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError as exc:
        raise BadFile("missing_file", f"cannot read {path}: it does not exist") from exc
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror or exc}") from exc


def local_copy_name(location: str) -> str:
    """Give a location with a local path made absolute: workers may stand in another directory."""
    if is_remote(location):
        return location
    return str(Path(location.removeprefix("file://")).expanduser().absolute())


def _find(location: str, suffixes: tuple[str, ...], field: str) -> list[SourceFile]:
    """Find files, empty ones too, sorted by name."""
    if is_remote(location):
        return _find_remote(location, suffixes, field)
    path = Path(location.removeprefix("file://")).expanduser().absolute()
    if path.is_file():
        _check_named([str(path)], field)
        return [_source_file(path, path.parent)]
    if path.is_dir():
        paths = list(_walk(path))
        _check_left_out([str(p) for p in paths], f"directory {path}", suffixes, field)
        files = [_source_file(p, path) for p in paths if p.name.endswith(_wanted(suffixes))]
        if not files:
            raise _textless(f"directory {path}", suffixes, field)
        return _sorted(files)
    if glob.has_magic(str(path)):
        found = [p for p in glob.glob(str(path), recursive=True) if _may_be_file(Path(p))]
        if not found:
            raise MissingSource(f"no file matches {field}={location!r}")
        _check_named(found, field)
        return _sorted(_source_file(Path(p), _fixed_part(path)) for p in found)
    raise MissingSource(f"{path} does not exist ({field}={location!r})")


def _find_remote(location: str, suffixes: tuple[str, ...], field: str) -> list[SourceFile]:
    if "::" in location:
        raise DataError(
            f"{field}={location!r} is a chain of drivers, which is not read; unpack the archive, "
            "or name the files where they are stored"
        )
    fs, inner = open_filesystem(location)
    infos = _list_remote(fs, inner, location)
    if not infos:
        raise MissingSource(f"{location} holds no file, or does not exist ({field})")
    is_named = inner in infos or glob.has_magic(inner)
    fixed = re.split(r"[*?\[]", inner, maxsplit=1)[0]
    root = fixed.rpartition("/")[0] if is_named else inner
    names = {path: path.removeprefix(root.rstrip("/")).lstrip("/") for path in infos}
    if is_named:
        _check_named(infos, field)
    else:
        names = {p: n for p, n in names.items() if not n.startswith(".") and "/." not in n}
        _check_left_out(names, location, suffixes, field)
    files = [
        _remote_file(fs.unstrip_protocol(path), name, infos[path])
        for path, name in names.items()
        if is_named or name.endswith(_wanted(suffixes))
    ]
    if not files:
        raise _textless(location, suffixes, field)
    return _sorted(files)


def _list_remote(fs: Any, inner: str, location: str) -> dict[str, dict[str, Any]]:
    """Give what the store says of each file; of nothing where nothing is there."""
    with named_errors(location, "list"):
        try:
            if glob.has_magic(inner):
                found = fs.glob(inner, detail=True)
            elif (info := fs.info(inner))["type"] == "file":
                found = {inner: info}
            else:
                found = fs.find(inner, detail=True)
        except FileNotFoundError as exc:
            if not is_absence(exc):
                raise
            found = {}
    return {path: info for path, info in found.items() if info.get("type") != "directory"}


def _remote_file(path: str, name: str, info: dict[str, Any]) -> SourceFile:
    if info.get("size") is None:
        raise DataError(f"the store does not say how large {path} is; copy it to a disk or a store")
    return SourceFile(path=path, name=name, num_bytes=int(info["size"]), version=_version(info))


def _version(info: dict[str, Any]) -> str | None:
    return next((str(info[key]) for key in VERSION_KEYS if info.get(key)), None)


def _describe(file: SourceFile) -> dict[str, str]:
    if file.is_missing:
        return {"name": file.name, "sha256": "missing"}
    if is_remote(file.path):
        known = {"name": file.name, "bytes": str(file.num_bytes)}
        return known if file.version is None else {**known, "version": file.version}
    try:
        return {"name": file.name, "sha256": file_sha256(Path(file.path))}
    except BadFile:
        return {"name": file.name, "sha256": "missing"}


def _not_all_empty(files: list[SourceFile], place: str, field: str) -> list[SourceFile]:
    if not any(file.num_bytes for file in files):
        raise DataError(f"{place} is empty: it holds no text ({field})")
    return files


def _check_named(names: Iterable[str], field: str) -> None:
    """Refuse files that were asked for and cannot be read.

    Raises:
        DataError: One is compressed in a way that is not read.
    """
    for name in names:
        if name.lower().endswith(UNREAD_SUFFIXES):
            raise DataError(
                f"{name} is compressed in a way that is not read ({field}); "
                f"unpack it, or compress it to {' or '.join(COMPRESSED_SUFFIXES)}"
            )


def _check_left_out(
    names: Iterable[str], place: str, suffixes: tuple[str, ...], field: str
) -> None:
    """Refuse a directory of which text would be left out without a word.

    Raises:
        DataError: A file is called as one with text but for its case or its compression.
    """
    wanted = _wanted(suffixes)
    similar = wanted + tuple(s + c for s in suffixes for c in UNREAD_SUFFIXES)
    left_out = [n for n in names if not n.endswith(wanted) and n.lower().endswith(similar)]
    if left_out:
        raise DataError(
            f"{place} holds {len(left_out)} files that would be left out, such as "
            f"{min(left_out)}: read are names that end in {', '.join(wanted)}; "
            f"rename or repack them, move them away, or name the files by a glob ({field})"
        )


def _textless(place: str, suffixes: tuple[str, ...], field: str) -> DataError:
    return DataError(
        f"{place} holds no text: none of its files is named *{', *'.join(_wanted(suffixes))}; "
        f"name the files by a glob if they are called otherwise ({field})"
    )


def _wanted(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    return suffixes + tuple(s + c for s in suffixes for c in COMPRESSED_SUFFIXES)


def _walk(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if _may_be_file(path) and not hidden:
            yield path


def _may_be_file(path: Path) -> bool:
    """Tell a file, or a link to none, from directories, pipes and sockets."""
    return path.is_file() or not path.exists()


def _sorted(files: Iterable[SourceFile]) -> list[SourceFile]:
    return sorted(files, key=lambda file: file.name)


def _source_file(path: Path, root: Path) -> SourceFile:
    name = path.relative_to(root).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError as exc:
        raise DataError(f"the file name {os.fsencode(path)!r} is not UTF-8; rename it") from exc
    if not path.exists():
        return SourceFile(path=str(path), name=name, num_bytes=0, is_missing=True)
    return SourceFile(path=str(path), name=name, num_bytes=path.stat().st_size)


def _fixed_part(pattern: Path) -> Path:
    fixed = [part for part in pattern.parents if not glob.has_magic(str(part))]
    return fixed[0]
