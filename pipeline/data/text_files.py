"""From a path, directory or glob to files, and from files, compressed or not, to bytes and lines.

A compressed stream that ends early is an error here, whatever the library below does: `zstandard`
returns the bytes of a half file without a word, and a short corpus would pass for a whole one.
"""

import glob
import gzip
import hashlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from pipeline.errors import DataError

COMPRESSED_SUFFIXES = (".gz", ".zst")
CHUNK_BYTES = 1 << 20
COMPRESSED_CHUNK_BYTES = 1 << 16
"""Kept small because zstd can expand its input some 30,000 times."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a source; `name` is relative to the source, so that moving a corpus keeps ids."""

    path: str
    name: str
    num_bytes: int

    @property
    def is_compressed(self) -> bool:
        """Whether the file can only be read from its beginning."""
        return self.path.endswith(COMPRESSED_SUFFIXES)


def find_files(location: str, suffixes: tuple[str, ...]) -> list[SourceFile]:
    """Find the files of a source, sorted by name.

    Args:
        location: A file, a directory (searched to any depth, hidden names left out) or a glob.
        suffixes: Endings that count in a directory, each also with `.gz` and `.zst` behind it.

    Raises:
        DataError: Nothing is there, the named file is empty, or a directory holds no such file.
    """
    path = Path(location).expanduser().absolute()
    if path.is_file():
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty: give a file with text (data.source.path)")
        return [_source_file(path, path.parent)]
    if path.is_dir():
        wanted = suffixes + tuple(s + c for s in suffixes for c in COMPRESSED_SUFFIXES)
        found = [p for p in _walk(path) if p.name.endswith(wanted)]
        if not any(p.stat().st_size for p in found):
            raise DataError(
                f"directory {path} holds no text: none of its files is named *{', *'.join(wanted)} "
                "and has bytes in it; name the files by a glob if they are called otherwise"
            )
        return _sorted_files(found, path)
    if glob.has_magic(location):
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        if not found:
            raise DataError(f"no file matches data.source.path={location!r}")
        return _sorted_files(found, _fixed_part(path))
    raise DataError(f"{path} does not exist (data.source.path={location!r})")


def read_chunks(path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a file in order, decompressed where its name ends in `.gz` or `.zst`.

    Args:
        path: The file.
        start: First byte of a plain file; compressed files are always read whole.
        stop: Byte behind the last one of a plain file; None reads to the end.

    Raises:
        DataError: The file cannot be read, or a compressed stream is damaged or ends early.
    """
    try:
        if path.endswith(COMPRESSED_SUFFIXES) and Path(path).stat().st_size == 0:
            raise DataError(f"{path} is not a whole archive (it is empty); copy it again")
        if path.endswith(".gz"):
            yield from _gzip_chunks(path)
        elif path.endswith(".zst"):
            yield from _zstd_chunks(path)
        else:
            yield from _plain_chunks(path, start, stop)
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror or exc}") from exc


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a byte stream without their line feeds, in time linear in its length."""
    parts: list[bytes] = []
    for chunk in chunks:
        head, *starts = chunk.split(b"\n")
        parts.append(head)
        for start in starts:
            yield b"".join(parts)
            parts = [start]
    last = b"".join(parts)
    if last:
        yield last


def cut_at_lines(file: SourceFile, limit_bytes: int) -> list[tuple[int, int, int]]:
    """Cut a plain file into byte ranges of about `limit_bytes` that begin and end at line borders.

    Returns:
        (start, stop, number of the first line, from 1) of each range; a compressed file is one.
    """
    if file.is_compressed or file.num_bytes <= limit_bytes:
        return [(0, file.num_bytes, 1)]
    cuts, position, line, target = [(0, 1)], 0, 1, limit_bytes
    for chunk in read_chunks(file.path):
        while target < position + len(chunk):
            feed = chunk.find(b"\n", max(target - position - 1, 0))
            if feed < 0:
                break
            cuts.append((position + feed + 1, line + chunk.count(b"\n", 0, feed + 1)))
            target = cuts[-1][0] + limit_bytes
        line += chunk.count(b"\n")
        position += len(chunk)
    cuts = [cut for cut in cuts if cut[0] < file.num_bytes]
    stops = [start for start, _ in cuts[1:]] + [file.num_bytes]
    return [(start, stop, first) for (start, first), stop in zip(cuts, stops, strict=True)]


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


def _plain_chunks(path: str, start: int, stop: int | None) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        stream.seek(start)
        position = start
        while stop is None or position < stop:
            size = CHUNK_BYTES if stop is None else min(CHUNK_BYTES, stop - position)
            chunk = stream.read(size)
            if not chunk:
                break
            yield chunk
            position += len(chunk)
    if stop is not None and position < stop:
        raise DataError(f"{path} shrank to {position} bytes while it was read; prepare again")


def _gzip_chunks(path: str) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as exc:
        raise DataError(f"{path} is not a whole gzip file ({exc}); copy it again") from exc


def _zstd_chunks(path: str) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor()
    frame = None
    try:
        with open(path, "rb") as stream:
            while data := stream.read(COMPRESSED_CHUNK_BYTES):
                while data:
                    frame = frame or decompressor.decompressobj()
                    if chunk := frame.decompress(data):
                        yield chunk
                    data = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
    except zstandard.ZstdError as exc:
        raise DataError(f"{path} is not a whole zstd file ({exc}); copy it again") from exc
    if frame is not None:
        raise DataError(f"{path} is not a whole zstd file (it ends in a frame); copy it again")


def _walk(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if path.is_file() and not hidden:
            yield path


def _sorted_files(paths: Iterable[Path], root: Path) -> list[SourceFile]:
    return sorted((_source_file(path, root) for path in paths), key=lambda file: file.name)


def _source_file(path: Path, root: Path) -> SourceFile:
    name = path.relative_to(root).as_posix()
    return SourceFile(path=str(path), name=name, num_bytes=path.stat().st_size)


def _fixed_part(pattern: Path) -> Path:
    fixed = [part for part in pattern.parents if not glob.has_magic(str(part))]
    return fixed[0]
