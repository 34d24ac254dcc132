"""Every host copies shards from an object store once, and takes no file whose hash is wrong."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.config.data import DataConfig
from pipeline.data.ray_surroundings import environment_set
from pipeline.data.shards import MANIFEST_NAME, ShardManifest, load_manifest
from pipeline.data.staging import stage
from pipeline.data.verification import expected_files
from pipeline.errors import DataError


@pytest.fixture
def stored(
    make_prepared: Callable[..., ShardManifest], s3_variables: dict[str, str]
) -> Iterator[ShardManifest]:
    """A prepared directory that also stands in a bucket, as `s3://shards/data`."""
    import boto3

    manifest = make_prepared([[[1, 2, 3], [4, 0]], [[5, 6, 0]]], [[[7, 8, 0]]])
    with environment_set(s3_variables):
        client = boto3.client("s3")
        client.create_bucket(Bucket="shards")
        for path in manifest.directory.iterdir():
            client.upload_file(str(path), "shards", f"data/{path.name}")
        yield manifest


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that is this host's alone."""
    return tmp_path_factory.mktemp("disk")


def config_for(directory: Path) -> DataConfig:
    return DataConfig(prepared_dir=directory, prepared_url="s3://shards/data")


def overwrite(name: str, body: bytes) -> None:
    import boto3

    boto3.client("s3").put_object(Bucket="shards", Key=f"data/{name}", Body=body)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name[0] != "."}


def test_a_bucket_is_copied_byte_for_byte_and_only_once(stored: ShardManifest, disk: Path) -> None:
    here = disk / "disk" / "shards"
    stage(config_for(here))
    assert contents(here) == contents(stored.directory)
    assert load_manifest(here).fingerprint == stored.fingerprint
    before = {path.name: path.stat().st_mtime_ns for path in here.iterdir()}
    stage(config_for(here))
    del before[".staging.lock"]
    assert {name: (here / name).stat().st_mtime_ns for name in before} == before


def test_a_killed_copy_goes_on_with_what_is_whole(stored: ShardManifest, disk: Path) -> None:
    here = disk / "shards"
    here.mkdir()
    first, second, *_ = expected_files(stored)
    shutil.copy(stored.directory / first, here / first)
    os.utime(here / first, (1, 1))
    (here / second).write_bytes(b"half of it")
    stage(config_for(here))
    assert contents(here) == contents(stored.directory)
    assert (here / first).stat().st_mtime == 1


def test_a_damaged_file_is_refused_by_name_and_leaves_no_manifest(
    stored: ShardManifest, disk: Path
) -> None:
    name = next(name for name in expected_files(stored) if name.endswith(".bin"))
    body = (stored.directory / name).read_bytes()
    overwrite(name, bytes([body[0] ^ 1]) + body[1:])
    here = disk / "shards"
    with pytest.raises(DataError, match=f"s3://shards/data/{name} is damaged: its sha256 is"):
        stage(config_for(here))
    assert not (here / MANIFEST_NAME).exists()
    assert name not in contents(here)
    assert [path.name for path in here.glob(".*")] == [".staging.lock"]


def test_another_directory_of_shards_is_not_taken_for_this_one(
    stored: ShardManifest, disk: Path
) -> None:
    here = disk / "shards"
    shutil.copytree(stored.directory, here)
    tree = json.loads((here / MANIFEST_NAME).read_text())
    (here / MANIFEST_NAME).write_text(json.dumps(tree | {"fingerprint": "0" * 16}))
    with pytest.raises(DataError, match=r"holds the shards 0000000000000000, not those of s3://"):
        stage(config_for(here))


def test_a_place_in_the_store_without_shards_is_an_error(stored: ShardManifest, disk: Path) -> None:
    data = DataConfig(prepared_dir=disk / "shards", prepared_url="s3://shards/elsewhere")
    with pytest.raises(DataError, match="s3://shards/elsewhere/manifest.json"):
        stage(data)


def test_an_url_without_a_place_for_the_copy_is_refused() -> None:
    with pytest.raises(ValueError, match="prepared_url needs prepared_dir"):
        DataConfig(prepared_url="s3://shards/data")


def test_shards_on_shared_storage_are_left_as_they_are(tmp_path: Path) -> None:
    stage(DataConfig(prepared_dir=tmp_path / "shards"))
    assert not (tmp_path / "shards").exists()
