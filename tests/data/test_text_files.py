"""Finding files, and reading compressed streams that are not whole."""

import gzip
import os
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from pipeline.data.documents import BadFile, Piece, record_place
from pipeline.data.storage import SourceFile, describe_contents, find_files
from pipeline.data.text_files import COUNTED_BYTES, cut_file, read_chunks, split_lines, where_of
from pipeline.errors import DataError

DATA = "".join(f"line {i} na\u00efve {i * i}\n" for i in range(60_000)).encode()


def names(location: Path | str, *suffixes: str) -> list[str]:
    files = find_files(str(location), suffixes or (".txt",), "data.source.path")
    return [file.name for file in files]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("data", [b"", b"\n", b"a", b"a\n", b"a\n\nbb\nc", b"\n\na\n"])
def test_lines_do_not_depend_on_chunks(data: bytes, chunk: int) -> None:
    chunks = [data[i : i + chunk] for i in range(0, len(data), chunk)]
    expected = data.split(b"\n")
    assert list(split_lines(chunks, 10)) == (expected if expected[-1] else expected[:-1])


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_bytes_come_back_from_plain_and_compressed_files(tmp_path: Path, name: str) -> None:
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)(DATA)
    (tmp_path / name).write_bytes(packed)
    assert b"".join(read_chunks(str(tmp_path / name))) == DATA


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_stream_of_several_members_is_read_to_its_end(tmp_path: Path, suffix: str) -> None:
    pack = gzip.compress if suffix == ".gz" else zstandard.compress
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pack(DATA[:1000]) + pack(b"") + pack(DATA[1000:]))
    assert b"".join(read_chunks(str(path))) == DATA


def test_a_zstd_frame_with_the_longest_window_is_read(tmp_path: Path) -> None:
    # Source: RFC 8878, 3.1.1: magic number, no flags, window of 2^(10 + 21) bytes, raw last block.
    block = (len(b"line\n") << 3 | 1).to_bytes(3, "little")
    (tmp_path / "a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00\xa8" + block + b"line\n")
    assert b"".join(read_chunks(str(tmp_path / "a.txt.zst"))) == b"line\n"


def test_a_zstd_frame_with_a_longer_window_is_refused_by_its_window(tmp_path: Path) -> None:
    # A window of 9/8 of 2^31 bytes, the next one that the format can ask for.
    block = (len(b"line\n") << 3 | 1).to_bytes(3, "little")
    (tmp_path / "a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00\xa9" + block + b"line\n")
    with pytest.raises(BadFile, match="window above 2,147,483,648 bytes.*--long=27"):
        list(read_chunks(str(tmp_path / "a.txt.zst")))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(
    "damage", ["half", "last bytes", "flipped", "tail", "not packed", "none", "empty"]
)
def test_a_damaged_stream_is_an_error_never_a_short_text(
    tmp_path: Path, suffix: str, damage: str
) -> None:
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    packed = gzip.compress(DATA) if suffix == ".gz" else compressor.compress(DATA)
    middle = len(packed) // 2
    damaged = {
        "half": packed[:middle],
        "last bytes": packed[:-3],
        "flipped": packed[:middle] + bytes([packed[middle] ^ 255]) + packed[middle + 1 :],
        "tail": packed + b"rubbish behind the end",
        "not packed": DATA,
        "none": packed[:2],
        "empty": b"",
    }[damage]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=f"a.txt{suffix} is not a whole"):
        b"".join(read_chunks(str(path)))


def test_a_directory_gives_its_text_files_by_name_at_any_depth(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.txt.gz", "a/d.md", ".git/e.txt", "a/.f.txt", "g.TXT.part"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    assert names(tmp_path) == ["a/c.txt.gz", "b.txt"]


def test_a_glob_takes_what_it_matches_whatever_the_suffix(tmp_path: Path) -> None:
    for name in ("x/1.log", "x/2.log", "y/3.log", "y/4.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert names(f"{tmp_path}/*/*.log") == ["x/1.log", "x/2.log", "y/3.log"]
    assert names(f"{tmp_path}/**/4.txt") == ["y/4.txt"]


def test_a_file_that_goes_before_it_is_hashed_is_missing_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    files = find_files(str(tmp_path), (".txt",), "data.source.path")
    (tmp_path / "a.txt").unlink()
    assert describe_contents(files) == [{"name": "a.txt", "sha256": "missing"}]


@pytest.mark.parametrize("name", ["b.txt.xz", "b.TXT", "b.txt.GZ", "sub/b.txt.bz2", "b.txt.zstd"])
def test_a_directory_of_which_text_would_be_left_out_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    for each in ("a.txt", name):
        (tmp_path / each).write_bytes(b"x")
    with pytest.raises(DataError, match=f"1 files .* such as .*{name}.*data.source.path"):
        names(tmp_path)
    assert names(f"{tmp_path}/a.txt") == ["a.txt"]


def test_a_compression_that_is_not_read_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.bz2").write_bytes(b"BZh9")
    for location in (tmp_path / "a.jsonl.bz2", f"{tmp_path}/*.bz2"):
        with pytest.raises(DataError, match="a.jsonl.bz2 is compressed in a way .*data.source"):
            names(location)


def test_pipes_are_left_alone_and_links_to_nothing_are_missing_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "c.txt").write_bytes(b"x")
    assert names(tmp_path) == ["b.txt", "c.txt"]
    assert names(f"{tmp_path}/*") == ["b.txt", "c.txt"]


def test_lines_far_behind_in_a_file_are_named_without_reading_what_stands_before() -> None:
    start = COUNTED_BYTES + 1
    piece = Piece(path="/nowhere/a.jsonl", name="a", start=start, stop=start + 9, weight_bytes=9)
    assert where_of(piece, 4) == f"/nowhere/a.jsonl, line 5 from byte {start}"


def test_a_record_is_counted_from_one_in_its_part_of_the_file() -> None:
    piece = Piece(path="/a.jsonl", name="a", start=0, stop=9, weight_bytes=9)
    assert record_place(piece, 4) == "/a.jsonl, record 5"
    assert record_place(replace(piece, start=7), 0) == "/a.jsonl from 7 on, record 1"


def test_missing_empty_and_textless_places_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        names(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        names(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="holds no text"):
        names(tmp_path)
    with pytest.raises(DataError, match="no file matches"):
        names(f"{tmp_path}/*.jsonl")


@pytest.mark.parametrize("limit", [1, 10, 1000, 300_000, 1 << 20, 1 << 30])
def test_ranges_join_to_the_file_and_begin_at_lines(tmp_path: Path, limit: int) -> None:
    data = DATA if limit > 1000 else DATA[: DATA.index(b"\n", 20 * limit + 500) + 1]
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    file = SourceFile(path=str(path), name="a.txt", num_bytes=len(data))
    ranges = cut_file(file, limit)
    parts = [data[start:stop] for start, stop in ranges]
    assert b"".join(parts) == data
    assert all(parts)
    assert all(part.endswith(b"\n") for part in parts)
    assert len(ranges) == 1 or max(map(len, parts)) < limit + 40
