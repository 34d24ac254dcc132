"""Sources in a store: fsspec's memory, and a real S3 server on loopback read by real Ray tasks."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import DataConfig, SourceConfig
from pipeline.data.documents import trusted
from pipeline.data.prepare import prepare
from pipeline.data.ray_surroundings import environment_set
from pipeline.data.sources import Source, build_source
from pipeline.errors import DataError

Make = Callable[..., DataConfig]
LINES = [json.dumps({"id": f"d{i}", "text": f"{i} " + "sea ship " * 50}) for i in range(300)]
DATA = "".join(line + "\n" for line in LINES).encode()


def build(path: str | tuple[str, ...], kind: str = "jsonl", **fields: Any) -> Source:
    config = SourceConfig.model_validate({"kind": kind, "path": path, **fields})
    return build_source(config, max_document_bytes=1 << 20)


def ids(source: Source) -> list[str]:
    return [d.id for piece in source.pieces() for d in trusted(source.read(piece))]


@pytest.fixture
def memory() -> Iterator[Any]:
    import fsspec

    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


def test_a_store_is_read_by_file_directory_and_glob(memory: Any) -> None:
    memory.pipe("/corpus/b/two.jsonl.gz", gzip.compress(DATA[: len(LINES[0]) + 1]))
    memory.pipe("/corpus/one.jsonl", DATA)
    memory.pipe("/corpus/.hidden.jsonl", DATA)
    memory.pipe("/corpus/readme.pdf", b"x")
    assert ids(build("memory://corpus/one.jsonl")) == [f"d{i}" for i in range(300)]
    assert ids(build("memory://corpus")) == ["d0", *(f"d{i}" for i in range(300))]
    assert ids(build("memory://corpus/*/*.gz")) == ["d0"]
    names = [entry["name"] for entry in build("memory://corpus").contents()]
    assert names == ["b/two.jsonl.gz", "one.jsonl"]


def test_contents_in_a_store_follow_its_own_versions(memory: Any) -> None:
    memory.pipe("/corpus/one.jsonl", DATA)
    before = build("memory://corpus").contents()
    assert build("memory://corpus").contents() == before
    memory.pipe("/corpus/one.jsonl", DATA)
    assert build("memory://corpus").contents() != before


def test_what_is_not_there_is_named(memory: Any) -> None:
    with pytest.raises(DataError, match="memory://nowhere holds no file"):
        build("memory://nowhere").pieces()
    with pytest.raises(DataError, match="Protocol not known: nonsense"):
        build("nonsense://x").pieces()


def test_text_that_would_be_left_out_of_a_store_is_refused_unless_hidden(memory: Any) -> None:
    memory.pipe("/corpus/one.jsonl", DATA)
    memory.pipe("/corpus/.old/two.jsonl.xz", b"x")
    assert len(build("memory://corpus").pieces()) == 1
    memory.pipe("/corpus/three.jsonl.xz", b"x")
    with pytest.raises(DataError, match="1 files .* such as .*three.jsonl.xz"):
        build("memory://corpus").pieces()


def test_a_chain_of_drivers_is_refused_by_its_field() -> None:
    for chain in ("zip://a.jsonl::memory://x.zip", "simplecache::memory://corpus/one.jsonl"):
        with pytest.raises(DataError, match=r"data\.source\.path='.*' is a chain of drivers"):
            build(chain).pieces()


def put_files(directory: Path) -> None:
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="corpus")
    for path in directory.iterdir():
        client.upload_file(str(path), "corpus", f"text/{path.name}")


@pytest.mark.slow
def test_an_s3_bucket_gives_the_shards_of_the_same_files_on_disk(
    local_ray: None, s3_variables: dict[str, str], tmp_path: Path, make_config: Make
) -> None:
    local = tmp_path / "text"
    local.mkdir()
    for number in range(3):
        body = "".join(line + "\n" for line in LINES[100 * number : 100 * number + 100])
        (local / f"part{number}.jsonl").write_text(body)
    here = prepare(make_config(local, tmp_path / "out"))
    config = make_config(local, tmp_path / "out", source={"path": "s3://corpus/text"})
    with environment_set(s3_variables):
        put_files(local)
        manifest = prepare(config)
    for name, split in here.splits.items():
        assert [s.sha256 for s in manifest.splits[name].shards] == [s.sha256 for s in split.shards]
    contents = manifest.recipe["contents"]["jsonl"]
    assert [entry["name"] for entry in contents] == [f"part{i}.jsonl" for i in range(3)]
    assert all(entry["version"] not in ("None", "") for entry in contents)
