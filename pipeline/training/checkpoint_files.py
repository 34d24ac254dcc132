"""Canonical checkpoints on disk: safetensors of float32 tensors by name, and their manifest.

A directory `step-00001000` is a checkpoint if its manifest is intact and every file in it has the
size and sha256 that the manifest says. Nothing in it is a pickle.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.errors import CheckpointError
from pipeline.training.engine import EngineState

SCHEMA_VERSION: Literal[2] = 2
DIRECTORY = "checkpoints"
MANIFEST = "manifest.json"
PREFIX = "step-"
READ_BYTES = 1 << 20

Kind = Literal["weights", "exp_avg", "exp_avg_sq"]


class Record(BaseModel):
    """A part of a manifest: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(Record):
    """One safetensors file and the tensors in it."""

    name: str
    kind: Kind
    """Master weights, or one of AdamW's moments; keys are parameter names in all of them."""
    num_bytes: int
    sha256: str
    tensors: list[str]


class CheckpointManifest(Record):
    """What a checkpoint holds and which run it belongs to."""

    schema_version: Literal[2] = SCHEMA_VERSION
    step: int
    """Optimizer steps done, skipped ones included."""
    tokens: int
    """Tokens seen over all ranks."""
    optimizer_step: int
    """Updates applied, which AdamW's bias correction counts."""
    samples: int
    """Samples taken from the stream over all ranks, where the loader goes on."""
    skipped_total: int
    skipped_in_a_row: int
    guard: dict[str, Any] = Field(default_factory=dict)
    """What the guards remember."""
    config_hash: str
    data_fingerprint: str
    family: str
    zero_stage: int
    """Of the run that wrote it; any stage and world size can read it."""
    world_size: int
    attempt: int
    random_states: list[dict[str, str]]
    """torch's global generators by rank, base64; no model of ours draws from them."""
    files: list[FileRecord]


class StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors of one kind, each read from disk when asked for."""

    def __init__(self, directory: Path, files: list[FileRecord], kind: Kind) -> None:
        """Index the tensors by name.

        Args:
            directory: The checkpoint.
            files: Its files.
            kind: Which tensors.
        """
        self._places = {
            name: directory / file.name
            for file in files
            if file.kind == kind
            for name in file.tensors
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self._places[name]
        try:
            with safe_open(str(path), framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as exc:
            raise CheckpointError(f"cannot read {name} from {path}: {exc}") from exc
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """List the committed checkpoint directories of a run, newest first, by step and not by time."""
    found = (run_dir / DIRECTORY).glob(f"{PREFIX}*")
    return sorted((p for p in found if p.name[len(PREFIX) :].isdigit()), key=_step, reverse=True)


def checkpoint_name(step: int) -> str:
    """Give the directory name of a step's checkpoint."""
    return f"{PREFIX}{step:08d}"


def _step(path: Path) -> int:
    return int(path.name[len(PREFIX) :])


def load_state(checkpoint: Path, manifest: CheckpointManifest) -> EngineState:
    """Give the engine state of a checkpoint; tensors are read one by one when used."""
    return EngineState(
        parameters=StoredTensors(checkpoint, manifest.files, "weights"),
        exp_avg=StoredTensors(checkpoint, manifest.files, "exp_avg"),
        exp_avg_sq=StoredTensors(checkpoint, manifest.files, "exp_avg_sq"),
        step=manifest.optimizer_step,
    )


def verify_checkpoint(checkpoint: Path) -> CheckpointManifest:
    """Check the manifest and every file of a checkpoint.

    Raises:
        CheckpointError: Names each file that is missing or damaged.
    """
    manifest = read_manifest(checkpoint)
    problems = [p for file in manifest.files if (p := find_damage(checkpoint, file)) is not None]
    if problems:
        raise CheckpointError(f"{checkpoint} is damaged: {'; '.join(problems)}")
    return manifest


def find_damage(checkpoint: Path, file: FileRecord) -> str | None:
    """Tell what is wrong with a file, or None if size and sha256 are those of the manifest."""
    path = checkpoint / file.name
    if not path.is_file():
        return f"{file.name} is missing"
    num_bytes = path.stat().st_size
    if num_bytes != file.num_bytes:
        return f"{file.name} has {num_bytes} bytes instead of {file.num_bytes}"
    if hash_file(path) != file.sha256:
        return f"{file.name} has another sha256 than the manifest says"
    return None


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """Read a manifest and check it against its own digest.

    Raises:
        CheckpointError: It is missing, malformed, or not what was written.
    """
    path = checkpoint / MANIFEST
    try:
        tree: dict[str, Any] = json.loads(path.read_bytes())
        digest = tree.pop("digest")
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror}") from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CheckpointError(f"{path} is not a manifest: {exc}") from exc
    if digest != _digest(tree):
        raise CheckpointError(f"{path} was changed after it was written: its digest differs")
    try:
        return CheckpointManifest.model_validate(tree)
    except ValidationError as exc:
        raise CheckpointError(f"{path} is not a manifest of this version: {exc}") from exc


def write_manifest(checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest with its digest, and force it and its directory to disk."""
    tree = manifest.model_dump(mode="json")
    text = json.dumps({**tree, "digest": _digest(tree)}, indent=1)
    with (checkpoint / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(checkpoint)


def _digest(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def write_tensors(path: Path, kind: Kind, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
    """Write one safetensors file, force it to disk, and hash what stands there.

    Raises:
        CheckpointError: A tensor is not finite: such a state must not replace a good one.
        OSError: The disk refused.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{kind} of {name} is not finite; the checkpoint is not written")
    try:
        save_file(dict(tensors), str(path))
    except SafetensorError as exc:
        # The library wraps a full disk in an error of its own.
        raise OSError(f"cannot write {path}: {exc}") from exc
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileRecord(
        name=path.name,
        kind=kind,
        num_bytes=path.stat().st_size,
        sha256=hash_file(path),
        tensors=sorted(tensors),
    )


def hash_file(path: Path) -> str:
    """Give the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_directory(directory: Path) -> None:
    """Force the entries of a directory to disk, so that a rename survives a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
