"""From a prepared directory in an object store to a copy on this host, every file checked."""

import fcntl
import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config.data import DataConfig
from pipeline.data.shards import (
    MANIFEST_NAME,
    ShardManifest,
    commit_file,
    load_manifest,
    write_atomic,
)
from pipeline.data.storage import file_sha256
from pipeline.data.streams import open_binary
from pipeline.data.verification import expected_files
from pipeline.errors import DataError

CHUNK_BYTES = 8 << 20


def stage(data: DataConfig) -> None:
    """Copy the shards that a config names in an object store to this host, unless they are here.

    One process a host copies, the others wait for it. A file that an earlier call has copied whole
    is not copied again; the manifest comes last, so that its presence says that all is here.

    Args:
        data: `prepared_url` and `prepared_dir`; without the former there is nothing to do.

    Raises:
        DataError: A file cannot be read or written, is not what the manifest says, or the directory
            holds other shards.
    """
    if data.prepared_url is None or data.prepared_dir is None:
        return
    url, directory = data.prepared_url.rstrip("/"), data.prepared_dir
    with _alone(directory):
        manifest_bytes = _read(f"{url}/{MANIFEST_NAME}")
        if (directory / MANIFEST_NAME).is_file():
            _check_same(directory, manifest_bytes, url)
            return
        parsed = ShardManifest.model_validate_json(manifest_bytes)
        for name, sha256 in expected_files(parsed).items():
            path = directory / name
            if not path.is_file() or file_sha256(path) != sha256:
                _copy(f"{url}/{name}", path, sha256)
        write_atomic(directory / MANIFEST_NAME, manifest_bytes)


def _check_same(directory: Path, manifest_bytes: bytes, url: str) -> None:
    if (directory / MANIFEST_NAME).read_bytes() != manifest_bytes:
        raise DataError(
            f"{directory} holds the shards {load_manifest(directory).fingerprint}, not those of "
            f"{url}; remove it, or name another data.prepared_dir"
        )


def _copy(url: str, path: Path, sha256: str) -> None:
    """Copy a file under a temporary name, and give it its own once its hash is right."""
    digest = hashlib.sha256()
    try:
        with (
            open_binary(url) as source,
            tempfile.NamedTemporaryFile(
                dir=path.parent, prefix=f".{path.name}.", delete=False
            ) as target,
        ):
            try:
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    target.write(chunk)
                _check_hash(url, digest.hexdigest(), sha256)
                target.flush()
                commit_file(target.fileno(), Path(target.name), path)
            finally:
                Path(target.name).unlink(missing_ok=True)
    except OSError as exc:
        raise DataError(f"cannot write {path}: {exc.strerror or exc}") from exc


def _check_hash(url: str, found: str, expected: str) -> None:
    if found != expected:
        raise DataError(
            f"{url} is damaged: its sha256 is {found}, its manifest says {expected}; upload the "
            "prepared directory again"
        )


def _read(url: str) -> bytes:
    with open_binary(url) as stream:
        parts = []
        while chunk := stream.read(CHUNK_BYTES):
            parts.append(chunk)
    return b"".join(parts)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep other processes of this host from staging to the same directory."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        stream = (directory / ".staging.lock").open("w")
    except OSError as exc:
        raise DataError(f"cannot write to {directory}: {exc.strerror}") from exc
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
