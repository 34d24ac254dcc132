"""Input that cannot be read: refused by name, or quarantined so that every record is counted."""

import gzip
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from pipeline.config.data import DataConfig
from pipeline.data.documents import BadFile
from pipeline.data.prepare import prepare
from pipeline.data.shards import ShardManifest
from pipeline.data.sources import build_sources, plan_splits
from pipeline.data.split_reader import BadPiece, SplitReader
from pipeline.data.verification import verify_shards
from pipeline.errors import DataError

Make = Callable[..., DataConfig]
LIMIT_BYTES = 100_000
GOOD = [json.dumps({"id": f"good{i}", "text": f"{i} good words " * 30}) for i in range(20)]


def lines_of(*lines: str | bytes) -> bytes:
    return b"".join((x.encode() if isinstance(x, str) else x) + b"\n" for x in lines)


def plain_text(prefix: str) -> bytes:
    """Compresses to something much longer than what the tests cut off."""
    generator = np.random.default_rng(3)
    records = [
        {"id": f"{prefix}{i}", "text": " ".join(map(str, generator.integers(0, 10**6, 200)))}
        for i in range(200)
    ]
    return lines_of(*map(json.dumps, records))


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


def parquet(column: str, values: Any, **options: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({column: values}), sink, **options)
    return bytes(sink.getvalue())


class Extension:
    """Makes an extension array; imported late, as pyarrow is slow to load."""

    def __call__(self) -> Any:
        import pyarrow as pa

        return pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}"]))


RECORDS: dict[str, tuple[bytes, str, str]] = {
    "not_utf8": (b'{"text": "\xff"}', "not_utf8", "not UTF-8"),
    "cut JSON": (b'{"text": "x', "invalid_json", "invalid JSON"),
    "raw NUL": (b'{"text": "a\x00b"}', "invalid_json", "invalid JSON"),
    "a list": (b'["text"]', "not_an_object", "a list, not an object"),
    "no field": (b'{"body": "x"}', "no_text", "no field 'text'"),
    "null": (b'{"text": null}', "no_text", "holds a NoneType"),
    "a number": (b'{"text": 12}', "not_text", "holds a int"),
    "lone surrogate": (b'{"text": "a\\ud800b"}', "lone_surrogate", "half of a surrogate pair"),
    "long text": (b'{"text": "%s"}' % (b"x" * (LIMIT_BYTES + 1)), "too_large", "max_document_b"),
    "long line": (b'{"text": "%s"}' % (b"x" * (20 * LIMIT_BYTES)), "too_large", "max_document_b"),
}
"""A line, the reason by which it is counted, and part of the message."""

FILES: dict[str, tuple[str, Callable[[], bytes], str, str]] = {
    "half gz": ("a.jsonl.gz", lambda: gzip.compress(plain_text("h"))[:-9], "damaged_archive", "gz"),
    "half zst": (
        "b.jsonl.zst", lambda: zstandard.compress(plain_text("z"))[:-9], "damaged_archive", "zst",
    ),
    "flipped gz": (
        "c.jsonl.gz", lambda: flipped(gzip.compress(plain_text("f"))), "damaged_archive", "gz",
    ),
    "gz bomb": (
        "d.jsonl.gz", lambda: gzip.compress(b" " * (80 << 20)), "decompression_bomb", "1000 times",
    ),
    "zst bomb": (
        "e.jsonl.zst", lambda: zstandard.compress(b"\n" * (80 << 20)), "decompression_bomb", "1000",
    ),
}  # fmt: skip


def read_all(config: DataConfig) -> Iterator[str]:
    """Read the ids of all splits as a task does."""
    sources = build_sources(config)
    for split in plan_splits(sources):
        reader = SplitReader(split, config, sources[split.source])
        try:
            yield from (document.id for _, document in reader.documents())
        except BadPiece as bad:
            reader.leave_out(bad.number, bad.error)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    directory = tmp_path / "text"
    directory.mkdir()
    (directory / "good.jsonl").write_bytes(lines_of(*GOOD))
    return directory


@pytest.fixture
def config(good: Path, tmp_path: Path, make_config: Make) -> DataConfig:
    return make_config(good, tmp_path / "out", max_document_bytes=LIMIT_BYTES)


def check_whole(manifest: ShardManifest) -> None:
    written = sum(split.documents for split in manifest.splits.values())
    dropped = sum(manifest.dropped_documents.values())
    quarantined = sum(manifest.quarantined_documents.values())
    assert manifest.input_documents == written + dropped + quarantined
    verify_shards(manifest.directory)


@pytest.mark.parametrize("case", RECORDS)
def test_a_bad_record_ends_the_preparation_by_file_and_line(
    config: DataConfig, good: Path, case: str
) -> None:
    line, _, message = RECORDS[case]
    (good / "bad.jsonl").write_bytes(lines_of(GOOD[0], b"", line, GOOD[1]))
    with pytest.raises(DataError, match=rf"bad\.jsonl:3: .*{message}"):
        list(read_all(config))


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_ends_the_preparation_by_name(config: DataConfig, good: Path, case: str) -> None:
    name, make, _, message = FILES[case]
    (good / name).write_bytes(make())
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        list(read_all(config))


def test_text_that_only_looks_strange_is_kept_as_it_is(
    good: Path, tmp_path: Path, make_config: Make
) -> None:
    strange = {"nul": "a\x00b", "crlf": "a\r\nb", "inner mark": "a\ufeffb", "private": "\U0010ffff"}
    lines = [json.dumps({"id": name, "text": text}) for name, text in strange.items()]
    data = b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode()
    (good / "good.jsonl").write_bytes(data)
    config = make_config(good, tmp_path / "out")
    (source,) = build_sources(config).values()
    (piece,) = source.pieces()
    assert {d.id: d.text for d in source.read(piece)} == strange  # type: ignore[union-attr]


@pytest.mark.slow
def test_all_bad_input_is_quarantined_with_reasons_and_every_record_is_counted_once(
    local_ray: None, config: DataConfig, good: Path, tmp_path: Path
) -> None:
    bad = [line for line, _, _ in RECORDS.values()]
    blank = b'{"id": "blank", "text": " \\n"}'
    (good / "bad.jsonl").write_bytes(lines_of(*bad, blank, '{"id": "last", "text": "the last"}'))
    for name, make, _, _ in FILES.values():
        (good / name).write_bytes(make())
    (good / "gone.jsonl").symlink_to(good / "nowhere.jsonl")
    again = {"id": "good3", "text": "an id that was given before"}
    (good / "zz.jsonl").write_text(json.dumps(again) + "\n")
    quarantine = config.model_copy(update={"on_bad_input": "quarantine"})
    manifest = prepare(quarantine)
    expected: dict[str, int] = {"duplicate_id": 1}
    for _, reason, _ in RECORDS.values():
        expected[reason] = expected.get(reason, 0) + 1
    assert manifest.quarantined_documents == expected
    assert manifest.dropped_documents == {"empty": 1}
    assert {entry["name"]: entry["reason"] for entry in manifest.bad_files} == {
        "gone.jsonl": "missing_file", **{name: reason for name, _, reason, _ in FILES.values()},
    }  # fmt: skip
    assert manifest.input_documents == len(GOOD) + len(bad) + 3
    check_whole(manifest)
    listed = [
        json.loads(line)
        for path in (manifest.directory / "quarantine").iterdir()
        for line in path.read_text().splitlines()
    ]
    assert len(listed) == sum(expected.values()) + len(manifest.bad_files)
    assert all(entry["where"] and entry["detail"] for entry in listed)
    for number, (_, reason, _) in enumerate(RECORDS.values(), 1):
        assert any(e["where"].endswith(f"bad.jsonl:{number}") and e["reason"] == reason
                   for e in listed)  # fmt: skip
    # Whoever asks for failure does not get the shards that lack something.
    with pytest.raises(DataError, match="was prepared without bad input"):
        prepare(config)
    assert prepare(quarantine) == manifest


@pytest.mark.slow
def test_quarantine_leaves_the_shards_of_the_good_documents(
    local_ray: None, config: DataConfig, good: Path, tmp_path: Path, make_config: Make
) -> None:
    tokenizer = {"path": str(prepare(config).directory / "tokenizer.json")}
    alone = prepare(
        config.model_copy(update={"tokenizer": config.tokenizer.model_validate(tokenizer)})
    )
    bad = [line for line, _, _ in RECORDS.values()]
    mixed = [x for pair in zip(GOOD, [*bad, *bad], strict=True) for x in pair]
    (good / "good.jsonl").write_bytes(lines_of(*mixed))
    (good / "a.jsonl.gz").write_bytes(gzip.compress(plain_text("h"))[:-9])
    fields = {"max_document_bytes": LIMIT_BYTES, "on_bad_input": "quarantine"}
    manifest = prepare(make_config(good, tmp_path / "out", tokenizer=tokenizer, **fields))
    check_whole(manifest)
    for name, split in alone.splits.items():
        assert [s.sha256 for s in manifest.splits[name].shards] == [s.sha256 for s in split.shards]


@pytest.mark.slow
def test_an_id_given_twice_is_refused_by_place_and_made_ids_are_the_way_out(
    local_ray: None, config: DataConfig, good: Path, make_config: Make, tmp_path: Path
) -> None:
    (good / "more.jsonl").write_bytes(lines_of(GOOD[7].replace("words", "other words")))
    with pytest.raises(DataError, match=r"more\.jsonl, record 1: the id 'good7' has been given"):
        prepare(config)
    config = make_config(good, tmp_path / "out", source={"id_column": None})
    assert prepare(config).splits["train"].documents > 10


@pytest.mark.slow
def test_dropped_documents_are_written_aside_on_request(
    local_ray: None, good: Path, tmp_path: Path, make_config: Make
) -> None:
    (good / "blank.jsonl").write_bytes(lines_of('{"id": "b1", "text": "\\n"}'))
    manifest = prepare(make_config(good, tmp_path / "out", clean={"keep_dropped": True}))
    (path,) = (manifest.directory / "dropped").iterdir()
    (line,) = zstandard.decompress(path.read_bytes(), max_output_size=1 << 20).splitlines()
    assert json.loads(line) == {"reason": "empty", "source": "blank.jsonl", "id": "b1",
                                "text": "\n"}  # fmt: skip
    check_whole(manifest)


def column_cases() -> list[tuple[Any, str]]:
    return [
        (lambda: parquet("body", ["x"]), r"no column 'text'.*one of \['body'\]"),
        (lambda: parquet("text", [1]), "column 'text' holds int64, not text"),
        (lambda: parquet("text", Extension()()), "column 'text' holds extension"),
        (lambda: parquet("text", ["x"] * 9)[:-20], "is not a whole Parquet file"),
        (lambda: b"PAR1", "is not a whole Parquet file"),
        (lambda: flipped_footer(parquet("text", ["x"] * 9)), "is not a whole Parquet file"),
        (lambda: flipped_at(checked_page(), checked_page().index(b"text")), "is not a whole Parq"),
    ]


def flipped_at(data: bytes, place: int) -> bytes:
    damaged = bytearray(data)
    damaged[place] ^= 255
    return bytes(damaged)


def flipped_footer(data: bytes) -> bytes:
    # Source: the Parquet format: footer, its length in 4 bytes, and the magic number, end a file.
    return flipped_at(data, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))


def checked_page() -> bytes:
    return parquet(
        "text",
        ["text that is not compressed"],
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )


@pytest.mark.parametrize("number", range(7))
def test_a_parquet_file_without_text_is_refused_and_quarantined(
    tmp_path: Path, make_config: Make, number: int
) -> None:
    make, message = column_cases()[number]
    (tmp_path / "a.parquet").write_bytes(parquet("text", ["one", "two"]))
    (tmp_path / "b.parquet").write_bytes(make())
    config = make_config(tmp_path, tmp_path / "out", source={"kind": "parquet"})
    with pytest.raises(DataError, match=rf"b\.parquet.*{message}"):
        list(read_all(config))
    (split,) = plan_splits(build_sources(config))
    quarantine = config.model_copy(update={"on_bad_input": "quarantine"})
    reader = SplitReader(split, quarantine, build_sources(config)["parquet"])
    with pytest.raises(BadPiece) as caught:
        list(reader.documents())
    reader.leave_out(caught.value.number, caught.value.error)
    assert [document.text for _, document in reader.documents()] == ["one", "two"]
    assert [entry["name"] for entry in reader.counts.bad_files] == ["b.parquet"]


def test_a_parquet_file_that_was_damaged_when_it_was_cut_stays_left_out(
    tmp_path: Path, make_config: Make
) -> None:
    path = tmp_path / "a.parquet"
    whole = parquet("text", ["one", "two"], row_group_size=1)
    path.write_bytes(whole[:-20])
    source = build_sources(make_config(path, tmp_path, source={"kind": "parquet"}))["parquet"]
    (piece,) = source.pieces()
    path.write_bytes(whole)
    with pytest.raises(BadFile, match="not a whole Parquet file") as caught:
        list(source.read(piece))
    assert caught.value.reason == "damaged_file"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a disk that is full")
def test_a_full_disk_is_said_and_work_goes_on_once_there_is_room(
    local_ray: None, tmp_path: Path, make_config: Make
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(plain_text("t"))
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=True)
    try:
        config = make_config(path, disk / "out", tokenizer={"vocab_size": 257})
        with pytest.raises(DataError, match="cannot write to .*No space left on device"):
            prepare(config)
        assert not list(disk.rglob("manifest.json"))
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        check_whole(prepare(config))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
