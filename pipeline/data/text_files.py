"""From a file, compressed or not, to its bytes and lines, and from a large file to ranges of it.

A compressed stream that ends early is an error here, whatever the library below does: `zstandard`
returns the bytes of a half file without a word, and a short corpus would pass for a whole one.
"""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import zstandard

from pipeline.data.documents import BadFile, Piece
from pipeline.data.storage import COMPRESSED_SUFFIXES, SourceFile
from pipeline.data.streams import ByteStream, open_binary

CHUNK_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""At the start of a file, where it is not part of the text."""
ZSTD_CHUNK_BYTES = 1 << 14
"""Kept small because zstd can expand its input some 30,000 times in one call."""
LARGEST_WINDOW_BYTES = 1 << 31
"""What `zstd --long=31` asks of a reader, as the dumps of Reddit do; the library's own limit is
1 << 27, and no library reads a larger one."""
COUNTED_BYTES = 256 << 20
"""Bytes whose lines are counted to name one behind them: seconds of reading. Of a file of 100 GB,
1,600 tasks would each read what stands before their part, 50 GB on average."""
BORDER_CHUNK_BYTES = 1 << 16
LARGEST_EXPANSION = 1000
"""Bytes that may come out of one byte of an archive. Text reaches 10, machine logs 100; gzip cannot
go beyond 1032."""
FREE_EXPANSION_BYTES = 64 << 20
"""Bytes that may come out of any archive: a small one of equal lines is no bomb."""


Line = bytes | bytearray
"""The second where a line came in several parts."""


@dataclass(frozen=True)
class LongLine:
    """A line that was passed over because it is longer than a reader will hold."""

    num_bytes: int


def read_chunks(path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a file in order, decompressed where its name ends in `.gz` or `.zst`.

    Args:
        path: The file, local or a URL.
        start: First byte of a plain file; compressed files are always read whole.
        stop: Byte behind the last one of a plain file; None reads to the end.

    Raises:
        BadFile: It is missing, shorter than `stop`, or its compressed stream is damaged, ends
            early, or expands beyond reason.
        DataError: It cannot be read.
    """
    with open_binary(path) as stream:
        if not path.endswith(COMPRESSED_SUFFIXES):
            yield from _plain_chunks(stream, path, start, stop)
            return
        if not stream.read(1):
            raise _damaged(path, "it is empty")
        stream.seek(0)
        unpack = _gzip_chunks if path.endswith(".gz") else _zstd_chunks
        size = 0
        for chunk in unpack(stream, path):
            size += len(chunk)
            if size > FREE_EXPANSION_BYTES and size > LARGEST_EXPANSION * stream.tell():
                raise BadFile(
                    "decompression_bomb",
                    f"{path} expands to more than {LARGEST_EXPANSION} times its "
                    f"{stream.tell():,} bytes: this is no text; remove the file",
                )
            yield chunk


def split_lines(
    chunks: Iterable[bytes], limit_bytes: int, *, keep_ends: bool = False
) -> Iterator[Line | LongLine]:
    """Yield the lines of a byte stream, in time linear in its length.

    Args:
        chunks: The stream.
        limit_bytes: Longest line that is held; of a longer one only the size is given.
        keep_ends: Whether a line comes with its line feed, which its size then counts.
    """
    end = b"\n" if keep_ends else b""
    # It grows in place, where joining parts would hold a long line twice.
    line, size = bytearray(), 0
    for chunk in chunks:
        head, *starts = chunk.split(b"\n")
        for start in starts:
            size += len(head) + len(end)
            if size > limit_bytes:
                yield LongLine(size)
            elif line:
                line += head + end
                yield line
            else:
                yield head + end if end else head
            line, size, head = bytearray(), 0, start
        size += len(head)
        if size > limit_bytes:
            line = bytearray()
        else:
            line += head
    if size:
        yield line if size <= limit_bytes else LongLine(size)


def cut_file(file: SourceFile, limit_bytes: int, border: bytes = b"\n") -> list[tuple[int, int]]:
    """Cut a plain file into byte ranges of about `limit_bytes` that begin and end at borders.

    Only the surroundings of each cut are read.

    Args:
        file: The file; a compressed one is not cut.
        limit_bytes: Size of a range, about.
        border: Where a range may begin: behind these bytes.

    Returns:
        (start, stop) of each range.
    """
    if file.is_compressed or file.num_bytes <= limit_bytes:
        return [(0, file.num_bytes)]
    starts = [0]
    with open_binary(file.path) as stream:
        while (target := starts[-1] + limit_bytes) < file.num_bytes:
            start = _behind_border(stream, target, border)
            if start is None or start >= file.num_bytes:
                break
            starts.append(start)
    return list(zip(starts, [*starts[1:], file.num_bytes], strict=True))


def where_of(piece: Piece, number: int) -> str:
    """Name a line of a piece: file and line, from 1; far behind in a file, from the piece's start.

    Lines before a piece are counted here, where somebody is told of one, so that a large file need
    not be read before it is cut.

    Args:
        piece: A file, or a range that begins at a line.
        number: Line in the piece, from 0.
    """
    is_range = piece.start > 0 and not piece.path.endswith(COMPRESSED_SUFFIXES)
    if is_range and piece.start > COUNTED_BYTES:
        return f"{piece.path}, line {number + 1} from byte {piece.start}"
    before = _lines_before(piece.path, piece.start) if is_range else 0
    return f"{piece.path}:{before + number + 1}"


@lru_cache(maxsize=8)
def _lines_before(path: str, start: int) -> int:
    """Count the lines before a byte, once for all the bad records of a range."""
    return sum(chunk.count(b"\n") for chunk in read_chunks(path, 0, start))


def _behind_border(stream: ByteStream, target: int, border: bytes) -> int | None:
    # A range may begin at the target itself if the border stands right before it.
    position = max(target - len(border), 0)
    stream.seek(position)
    carried = b""
    while chunk := stream.read(BORDER_CHUNK_BYTES):
        window = carried + chunk
        found = window.find(border)
        if found >= 0:
            return position - len(carried) + found + len(border)
        position += len(chunk)
        carried = window[len(window) - len(border) + 1 :] if len(border) > 1 else b""
    return None


def _plain_chunks(stream: ByteStream, path: str, start: int, stop: int | None) -> Iterator[bytes]:
    stream.seek(start)
    position = start
    while stop is None or position < stop:
        size = CHUNK_BYTES if stop is None else min(CHUNK_BYTES, stop - position)
        chunk = stream.read(size)
        if not chunk:
            break
        position += len(chunk)
        yield chunk
    if stop is not None and position < stop:
        raise BadFile(
            "truncated_file",
            f"{path} ends at byte {position}, it had {stop} when the work began; prepare again",
        )


def _gzip_chunks(stream: ByteStream, path: str) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=stream, mode="rb") as unpacked:
            while chunk := unpacked.read(CHUNK_BYTES):
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as exc:
        raise _damaged(path, str(exc)) from exc


def _zstd_chunks(stream: ByteStream, path: str) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW_BYTES)
    frame = None
    try:
        while data := stream.read(ZSTD_CHUNK_BYTES):
            while data:
                frame = frame or decompressor.decompressobj(write_size=CHUNK_BYTES)
                if chunk := frame.decompress(data):
                    yield chunk
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as exc:
        if "too much memory" in str(exc):
            raise BadFile(
                "damaged_archive",
                f"{path} asks for a zstd window above {LARGEST_WINDOW_BYTES:,} bytes, which no "
                "library reads; compress it again with --long=27 or less",
            ) from exc
        raise _damaged(path, str(exc)) from exc
    if frame is not None:
        raise _damaged(path, "it ends in a frame")


def _damaged(path: str, cause: str) -> BadFile:
    kind = "gzip" if path.endswith(".gz") else "zstd"
    return BadFile("damaged_archive", f"{path} is not a whole {kind} file ({cause}); copy it again")
