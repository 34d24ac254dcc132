"""From a manifest to whether the files beside it are what it says."""

from pathlib import Path

from pipeline.data.indexed import read_index
from pipeline.data.shards import (
    TOKEN_BYTES_NAME,
    TOKENIZER_NAME,
    ShardManifest,
    ShardRecord,
    load_manifest,
)
from pipeline.data.storage import file_sha256
from pipeline.errors import DataError


def verify_shards(prepared_dir: Path) -> None:
    """Check every file of a prepared directory against its manifest.

    Raises:
        DataError: Lists each file that is missing, damaged or contradicts the manifest.
    """
    manifest = load_manifest(prepared_dir)
    problems = []
    for name, sha256 in expected_files(manifest).items():
        path = manifest.directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif file_sha256(path) != sha256:
            problems.append(f"{name} is damaged ({path.stat().st_size} bytes, sha256 differs)")
    if not problems:
        problems = [text for shard in _all(manifest) for text in _contradictions(manifest, shard)]
    if problems:
        raise DataError(
            f"{manifest.directory} is not as it was prepared: {'; '.join(problems)}; "
            "delete the directory and prepare again"
        )


def expected_files(manifest: ShardManifest) -> dict[str, str]:
    """Give the files that stand beside a manifest: name to sha256."""
    return {
        TOKENIZER_NAME: manifest.tokenizer_sha256,
        TOKEN_BYTES_NAME: manifest.token_bytes_sha256,
        **{f"{shard.name}.bin": shard.sha256 for shard in _all(manifest)},
        **{f"{shard.name}.idx": shard.index_sha256 for shard in _all(manifest)},
    }


def _all(manifest: ShardManifest) -> list[ShardRecord]:
    return [shard for split in manifest.splits.values() for shard in split.shards]


def _contradictions(manifest: ShardManifest, shard: ShardRecord) -> list[str]:
    index = read_index(manifest.directory / f"{shard.name}.idx")
    found = (index.dtype, index.num_tokens, len(index.lengths_tokens))
    promised = (manifest.dtype, shard.tokens, shard.documents)
    if found != promised:
        return [f"{shard.name}.idx has {found}, the manifest says {promised}"]
    return []
