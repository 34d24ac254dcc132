"""Canonical checkpoints: what makes a directory of tensor files one that a resume may trust.

A directory `step-00001000` is a checkpoint if its manifest is intact and every file in it has the
size and sha256 that the manifest says. Nothing in it is a pickle.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.errors import CheckpointError
from pipeline.training.checkpoint_store import CheckpointStore, LocalStore
from pipeline.training.checkpoint_tensors import CHUNK_BYTES, FileRecord, Record, StoredTensors
from pipeline.training.engine import EngineState

SCHEMA_VERSION: Literal[3] = 3
DIRECTORY = "checkpoints"
MANIFEST = "manifest.json"
PREFIX = "step-"


class CheckpointManifest(Record):
    """What a checkpoint holds and which run it belongs to.

    The learning rate is no part of it: the schedule is a closed form of the step.
    """

    schema_version: Literal[3] = SCHEMA_VERSION
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
    guard: dict[str, Any] = {}
    """What the guards of training remember, such as their window of losses."""
    event_seq: int | None = None
    """Last event of `events.jsonl` at the save; what tracking replays up to there is of this
    state."""
    config_hash: str
    """`lineage_hash` of the run: of all that its losses follow from."""
    code_hash: str
    """sha256 over the package's sources."""
    data_fingerprint: str
    family: str
    zero_stage: int
    """Of the run that wrote it; any stage and world size can read it."""
    world_size: int
    attempt: int
    owner: str
    """Token of the attempt that wrote it, as `checkpoint_commit.claim`."""
    random_states: list[dict[str, str]]
    """torch's global generators by rank, base64; no model of ours draws from them."""
    files: list[FileRecord]


def list_checkpoints(run_dir: Path) -> list[Path]:
    """List the committed checkpoint directories of a run, newest first, by step and not by time."""
    root = run_dir / DIRECTORY
    return [root / name for name in sorted_names(p.name for p in root.glob(f"{PREFIX}*"))]


def sorted_names(names: Iterable[str]) -> list[str]:
    """Give those of the names that are checkpoints, newest first, by step."""
    is_one = re.compile(rf"{PREFIX}\d{{8,}}").fullmatch
    return sorted((name for name in names if is_one(name)), key=checkpoint_step, reverse=True)


def checkpoint_name(step: int) -> str:
    """Give the directory name of a step's checkpoint."""
    return f"{PREFIX}{step:08d}"


def checkpoint_step(name: str) -> int:
    """Give the step of a checkpoint's name."""
    return int(name[len(PREFIX) :])


def load_state(checkpoint: Path, manifest: CheckpointManifest) -> EngineState:
    """Give the engine state of a directory; tensors are read one by one when used."""
    return load_stored_state(LocalStore(checkpoint.parent), checkpoint.name, manifest)


def load_stored_state(
    store: CheckpointStore, name: str, manifest: CheckpointManifest
) -> EngineState:
    """Give the engine state of a checkpoint; tensors are read one by one when used."""
    return EngineState(
        parameters=StoredTensors(store, name, manifest.files, "weights"),
        exp_avg=StoredTensors(store, name, manifest.files, "exp_avg"),
        exp_avg_sq=StoredTensors(store, name, manifest.files, "exp_avg_sq"),
        step=manifest.optimizer_step,
    )


def verify_checkpoint(checkpoint: Path) -> CheckpointManifest:
    """Check the manifest and every file of a checkpoint.

    Raises:
        CheckpointError: Names each file that is missing or damaged.
    """
    return verify_stored(LocalStore(checkpoint.parent), checkpoint.name)


def verify_stored(store: CheckpointStore, name: str) -> CheckpointManifest:
    """Check the manifest and every file of a checkpoint in a store; raises as its twin above."""
    manifest = read_stored_manifest(store, name)
    sizes = store.entries(name)
    problems = [p for file in manifest.files if (p := file_damage(store, name, file, sizes))]
    if problems:
        raise CheckpointError(f"{name} is damaged: {'; '.join(problems)}")
    return manifest


def find_damage(checkpoint: Path, file: FileRecord) -> str | None:
    """Tell what is wrong with a file, or None if size and sha256 are those of the manifest."""
    store = LocalStore(checkpoint.parent)
    return file_damage(store, checkpoint.name, file, store.entries(checkpoint.name))


def file_damage(
    store: CheckpointStore, name: str, file: FileRecord, sizes: Mapping[str, int]
) -> str | None:
    """Tell what is wrong with a file of a checkpoint, or None.

    Args:
        store: Where it is.
        name: The checkpoint.
        file: What the manifest says.
        sizes: What `store.entries` says of the checkpoint.
    """
    if (damage := size_damage(file, sizes)) is not None:
        return damage
    digest = hashlib.sha256()
    buffer = bytearray(min(CHUNK_BYTES, file.num_bytes))
    for start in range(0, file.num_bytes, CHUNK_BYTES):
        chunk = memoryview(buffer)[: file.num_bytes - start]
        store.read_into(f"{name}/{file.name}", start, chunk)
        digest.update(chunk)
    if digest.hexdigest() != file.sha256:
        return f"{file.name} has another sha256 than the manifest says"
    return None


def size_damage(file: FileRecord, sizes: Mapping[str, int]) -> str | None:
    """Tell whether a file is missing or of another size than the manifest says."""
    if file.name not in sizes:
        return f"{file.name} is missing"
    if sizes[file.name] != file.num_bytes:
        return f"{file.name} has {sizes[file.name]} bytes instead of {file.num_bytes}"
    return None


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """Read a manifest and check it against its own digest.

    Raises:
        CheckpointError: It is missing, malformed, or not what was written.
    """
    return read_stored_manifest(LocalStore(checkpoint.parent), checkpoint.name)


def read_stored_manifest(store: CheckpointStore, name: str) -> CheckpointManifest:
    """Read and check a manifest in a store; raises as its twin above."""
    path = f"{name}/{MANIFEST}"
    try:
        text = bytearray(store.entries(name)[MANIFEST])
        store.read_into(path, 0, memoryview(text))
        tree: dict[str, Any] = json.loads(text)
        digest = tree.pop("digest")
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc}") from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        is_missing = isinstance(exc, KeyError) and exc.args == (MANIFEST,)
        problem = "is missing" if is_missing else f"is not a manifest: {exc}"
        raise CheckpointError(f"{path} {problem}") from exc
    if digest != _digest(tree):
        raise CheckpointError(f"{path} was changed after it was written: its digest differs")
    try:
        return CheckpointManifest.model_validate(tree)
    except ValidationError as exc:
        raise CheckpointError(f"{path} is not a manifest of this version: {exc}") from exc


def write_manifest(store: CheckpointStore, name: str, manifest: CheckpointManifest) -> None:
    """Write the manifest of a checkpoint with its digest, and force it to disk."""
    tree = manifest.model_dump(mode="json")
    text = json.dumps({**tree, "digest": _digest(tree)}, indent=1)
    store.write({f"{name}/{MANIFEST}": [text.encode()]})


def _digest(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
