"""Prepared shards on disk: written whole or not at all, listed by a manifest, read by memory map.

A prepared directory holds `SPLIT-NNNNN.bin/.idx`, `tokenizer.json`, `token_bytes.npy` and, written
last, `manifest.json`. Without the manifest the directory is not prepared.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.data.indexed import little_endian
from pipeline.errors import DataError

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
TOKEN_BYTES_NAME = "token_bytes.npy"
SCHEMA_VERSION: Final = 2

SplitName = Literal["train", "validation"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceRange(_Record):
    """The part of a source that went into a shard: bytes of a file, or rows of a dataset."""

    name: str
    start: int
    stop: int


class ShardRecord(_Record):
    """One shard: the files `NAME.bin` and `NAME.idx`."""

    name: str
    sha256: str
    """Of `NAME.bin`."""
    index_sha256: str
    """Of `NAME.idx`."""
    tokens: int
    """Tokens, the end-of-document tokens included."""
    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents before tokenization."""
    largest_id: int
    """Largest token id, below the vocabulary's size."""
    source: str
    """Name of the source in the config's mixture; a shard never holds two."""
    encoder: str
    """The library that encoded this shard; ids do not depend on it."""
    ranges: list[SourceRange]
    """What was read, in order."""


class SplitRecord(_Record):
    """The shards of one split, in the order in which they are read, and their sums."""

    tokens: int
    documents: int
    text_bytes: int
    shards: list[ShardRecord]


class ShardManifest(_Record):
    """What a prepared directory holds, and what it was made from."""

    schema_version: Literal[2] = SCHEMA_VERSION
    fingerprint: str
    """Hash of `recipe`; also the name of the directory."""
    recipe: dict[str, Any]
    """Everything that decides the token ids: source contents and options, tokenizer, split."""
    vocab_size: int
    dtype: Literal["uint16", "int32"]
    end_of_document: str
    end_of_document_id: int
    tokenizer_sha256: str
    token_bytes_sha256: str
    encoder: str
    """The library that encoded; ids do not depend on it."""
    encoder_version: str
    splits: dict[SplitName, SplitRecord]
    input_documents: int
    """Records read: those in the splits, dropped and quarantined."""
    dropped_documents: dict[str, int]
    """Documents left out, by reason."""
    quarantined_documents: dict[str, int]
    """Records that could not be read and were left out on request, by reason."""
    bad_files: list[dict[str, str]]
    """Files or parts of them left out whole on request: name, reason, message; their records count
    nowhere."""
    directory: Path = Field(default=Path(), exclude=True)
    """Where the shards stand; not part of the file, so that a directory can be moved."""


class ShardSet:
    """The tokens of one split, or of sources in it, back to back and memory-mapped."""

    def __init__(
        self, manifest: ShardManifest, split: SplitName, sources: Sequence[str] | None = None
    ) -> None:
        """Map every shard.

        Args:
            manifest: The prepared directory.
            split: The split to read.
            sources: The sources to read, one behind the other; None reads all shards as they stand.

        Raises:
            DataError: A shard is missing or has another size than the manifest says.
        """
        self.manifest = manifest
        self.split = split
        self._shards = manifest.splits[split].shards
        if sources is not None:
            self._shards = [s for name in sources for s in self._shards if s.source == name]
        # Slices of plain arrays cost a third of those of np.memmap.
        self._arrays = [np.asarray(_map_shard(manifest, shard)) for shard in self._shards]
        self._starts = np.cumsum([0] + [len(array) for array in self._arrays])

    @property
    def num_tokens(self) -> int:
        """Tokens, the end-of-document tokens included."""
        return int(self._starts[-1])

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.integer[Any]]:
        """Copy the tokens [start, stop).

        Args:
            start: First token, from 0.
            stop: Token behind the last one, at most `num_tokens`.

        Raises:
            IndexError: The range is not inside the tokens.
            DataError: A token id is outside the vocabulary.
        """
        row: npt.NDArray[np.integer[Any]] = self.rows(np.array([start]), stop - start)[0]
        return row

    def rows(
        self, starts_B: npt.NDArray[np.int64], num_tokens: int
    ) -> npt.NDArray[np.integer[Any]]:
        """Copy runs of equal length, `[B, num_tokens]`, each over as many shards as it takes.

        Args:
            starts_B: First token of each run, from 0.
            num_tokens: Tokens of a run.

        Raises:
            IndexError: A run is not inside the tokens.
            DataError: A token id is outside the vocabulary.
        """
        last = self.num_tokens - num_tokens
        if num_tokens < 0 or (starts_B < 0).any() or (starts_B > last).any():
            raise IndexError(
                f"runs of {num_tokens} tokens from {starts_B.tolist()} of {self.num_tokens} tokens"
            )
        result = np.empty((len(starts_B), num_tokens), dtype=little_endian(self.manifest.dtype))
        shards_B = np.searchsorted(self._starts, starts_B, side="right") - 1
        offsets_B = starts_B - self._starts[shards_B]
        for row, shard, offset in zip(result, shards_B.tolist(), offsets_B.tolist(), strict=True):
            self._fill(row, shard, offset)
        # Negative ids are the largest ones of the unsigned type of the same size.
        ids = result.view(f"u{result.itemsize}")
        if ids.size and ids.max() >= self.manifest.vocab_size:
            row_index, column = np.argwhere(ids >= self.manifest.vocab_size)[0].tolist()
            self._refuse(int(starts_B[row_index]) + column, int(result[row_index, column]))
        return result

    def _fill(self, row: npt.NDArray[np.integer[Any]], shard: int, offset: int) -> None:
        filled = 0
        while filled < len(row):
            part = self._arrays[shard][offset : offset + len(row) - filled]
            row[filled : filled + len(part)] = part
            filled, shard, offset = filled + len(part), shard + 1, 0

    def _refuse(self, position: int, token_id: int) -> NoReturn:
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        path = self.manifest.directory / f"{self._shards[shard].name}.bin"
        raise DataError(
            f"{path} holds the id {token_id} as its token {position - int(self._starts[shard])}, "
            f"the vocabulary has {self.manifest.vocab_size} entries: the file is damaged; list "
            f"what is with: python -m launch verify {self.manifest.directory}"
        )


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or none: a temporary file beside it, fsync, rename."""
    prefix = f".{path.name}."
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=prefix, delete=False) as stream:
        stream.write(data)
        stream.flush()
        commit_file(stream.fileno(), Path(stream.name), path)


def commit_file(descriptor: int, temporary: Path, path: Path) -> None:
    """Give a written file its name once its bytes are on the disk."""
    os.fchmod(descriptor, 0o644)
    os.fsync(descriptor)
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_manifest(manifest: ShardManifest) -> None:
    """Write the manifest, which makes its directory a prepared one."""
    data = manifest.model_dump_json(indent=1).encode()
    write_atomic(manifest.directory / MANIFEST_NAME, data + b"\n")


def load_manifest(prepared_dir: Path) -> ShardManifest:
    """Load the manifest of a prepared directory.

    Raises:
        DataError: There is no manifest, or this version cannot read it.
    """
    path = prepared_dir / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError as exc:
        raise DataError(
            f"{prepared_dir} holds no prepared shards ({MANIFEST_NAME} is missing); "
            "make them with: python -m launch prepare RUN"
        ) from exc
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror}") from exc
    try:
        manifest = ShardManifest.model_validate_json(data)
    except ValidationError as exc:
        raise DataError(f"{path} is not a shard manifest of this version: {exc}") from exc
    return manifest.model_copy(update={"directory": prepared_dir.absolute()})


def load_token_bytes(prepared_dir: Path) -> npt.NDArray[np.int32]:
    """Load the number of raw bytes that each token id stands for.

    Returns:
        int32 [vocab_size]; 0 for the end-of-document token.

    Raises:
        DataError: The file is missing or is no such array.
    """
    path = prepared_dir / TOKEN_BYTES_NAME
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as exc:
        raise DataError(f"cannot read {path}: {exc}") from exc
    return np.asarray(array, dtype=np.int32)


def describe_prepared(prepared_dir: Path) -> dict[str, Any]:
    """Summarise a prepared directory for printing: sources, sizes, vocabulary, drops, shards.

    Raises:
        DataError: As `load_manifest`.
    """
    manifest = load_manifest(prepared_dir)
    splits = manifest.splits
    return {
        "directory": str(manifest.directory),
        "fingerprint": manifest.fingerprint,
        "source_kinds": {
            name: options["kind"] for name, options in manifest.recipe.get("sources", {}).items()
        },
        "vocab_size": manifest.vocab_size,
        "dtype": manifest.dtype,
        "end_of_document": manifest.end_of_document,
        "end_of_document_id": manifest.end_of_document_id,
        "encoder": f"{manifest.encoder} {manifest.encoder_version}",
        "tokens": {name: split.tokens for name, split in splits.items()},
        "documents": {name: split.documents for name, split in splits.items()},
        "text_bytes": {name: split.text_bytes for name, split in splits.items()},
        "bytes_per_token": {
            name: split.text_bytes / (split.tokens - split.documents)
            for name, split in splits.items()
        },
        "input_documents": manifest.input_documents,
        "dropped_documents": manifest.dropped_documents,
        "quarantined_documents": manifest.quarantined_documents,
        "bad_files": manifest.bad_files,
        "shards": [shard.name for split in splits.values() for shard in split.shards],
    }


def _map_shard(manifest: ShardManifest, shard: ShardRecord) -> npt.NDArray[Any]:
    path = manifest.directory / f"{shard.name}.bin"
    dtype = little_endian(manifest.dtype)
    try:
        num_bytes = path.stat().st_size
    except OSError as exc:
        raise DataError(f"shard {path} is missing; delete its directory and prepare again") from exc
    if num_bytes != shard.tokens * dtype.itemsize:
        raise DataError(
            f"shard {path} has {num_bytes} bytes, the manifest says {shard.tokens} tokens of "
            f"{dtype.itemsize} bytes; delete its directory and prepare again"
        )
    return np.memmap(path, dtype=dtype, mode="r")
