"""From a run directory or one of its checkpoints to a model with its weights and its tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config.load import RUN_FILE, lineage_hash, read_run
from pipeline.config.schema import RunConfig
from pipeline.data.shards import ShardManifest
from pipeline.errors import CheckpointError
from pipeline.inference.tensor_files import (
    TensorReader,
    check_entries,
    fill_parameters,
    read_headers,
)
from pipeline.inference.text import TextCodec, load_codec
from pipeline.models import build_model
from pipeline.models.base import LanguageModel
from pipeline.models.documents import DocumentRule
from pipeline.training.checkpoint_files import (
    MANIFEST,
    CheckpointManifest,
    checkpoint_name,
    find_damage,
    list_checkpoints,
    read_manifest,
)
from pipeline.training.train import load_prepared


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with its weights, and the tokenizer that it speaks."""

    model: LanguageModel
    """In float32, set to evaluation."""
    codec: TextCodec

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embedding_VD.device


@dataclass(frozen=True, kw_only=True)
class TrainedModel(LoadedModel):
    """A model as a checkpoint of a run left it."""

    run: RunConfig
    shards: ShardManifest
    """What it was trained on."""
    checkpoint: Path
    step: int
    """Optimizer steps that the weights have seen."""


def load_trained(
    path: Path,
    step: int | None = None,
    device: torch.device | None = None,
    on_event: Callable[[str], None] = print,
) -> TrainedModel:
    """Load the newest intact checkpoint of a run, or the one that is named.

    Args:
        path: A run directory, or a checkpoint directory inside one.
        step: The step wanted of a run directory; None takes the newest.
        device: Where to put the weights; None keeps them on the CPU.
        on_event: Told of each damaged checkpoint that is passed over.

    Raises:
        ConfigError: `run.yaml` is missing or wrong.
        DataError: The shards, which hold the tokenizer, are missing or not those of the run.
        CheckpointError: There is no such checkpoint, none is intact, or it is not of this model.
    """
    run_dir = find_run_dir(path)
    run = read_run(run_dir)
    shards = load_prepared(run, run_dir / RUN_FILE)
    codec = load_codec(shards.directory, shards, run.data.tokenizer)
    if path == run_dir:
        checkpoint, manifest = choose_checkpoint(run_dir, step, on_event)
    else:
        if step is not None:
            raise CheckpointError(f"{path} is one checkpoint; give --step with a run directory")
        checkpoint, manifest = path, read_manifest(path)
        if (damage := weight_damage(path, manifest)) is not None:
            raise CheckpointError(f"{path} is damaged: {damage}")
    check_belongs(checkpoint, manifest, run, shards)
    # Without what training does for speed: a compiler's minutes would come before the first word.
    rule = DocumentRule(end_of_document_id=shards.end_of_document_id, switches=run.train.documents)
    model = build_model(run.model, shards.vocab_size, run.seed, rule)
    load_weights(model, checkpoint, manifest)
    return TrainedModel(
        model=model.to(device or torch.device("cpu")).eval(),
        codec=codec,
        run=run,
        shards=shards,
        checkpoint=checkpoint,
        step=manifest.step,
    )


def find_run_dir(path: Path) -> Path:
    """Give the run directory itself, or the one that a checkpoint directory stands in.

    Raises:
        CheckpointError: The path is neither.
    """
    if (path / RUN_FILE).is_file():
        return path
    if (path / MANIFEST).is_file():
        run_dir = path.absolute().parent.parent
        if (run_dir / RUN_FILE).is_file():
            return run_dir
        raise CheckpointError(
            f"{path} is a checkpoint outside a run directory: {run_dir} holds no {RUN_FILE}, which "
            "says what model it is; name it where it stands in its run"
        )
    state = "holds neither" if path.is_dir() else "is no directory, so it holds neither"
    raise CheckpointError(
        f"{path} {state} {RUN_FILE} nor {MANIFEST}; name a run directory or a checkpoint in one"
    )


def choose_checkpoint(
    run_dir: Path, step: int | None, on_event: Callable[[str], None]
) -> tuple[Path, CheckpointManifest]:
    """Choose a run's newest checkpoint with intact weights, or the one of a step.

    Raises:
        CheckpointError: There is none, the step has none, or none is intact.
    """
    found = list_checkpoints(run_dir)
    if not found:
        raise CheckpointError(
            f"{run_dir} holds no checkpoint; train first: python -m launch train {run_dir}"
        )
    wanted = found if step is None else [p for p in found if p.name == checkpoint_name(step)]
    if not wanted:
        steps = ", ".join(str(int(p.name.rpartition("-")[2])) for p in reversed(found))
        raise CheckpointError(f"{run_dir} has no checkpoint of step {step}; it has {steps}")
    damages = []
    for checkpoint in wanted:
        try:
            manifest = read_manifest(checkpoint)
            damage = weight_damage(checkpoint, manifest)
        except CheckpointError as exc:
            damage = str(exc)
        if damage is None:
            return checkpoint, manifest
        damages.append(f"{checkpoint.name}: {damage}")
        on_event(f"checkpoint {checkpoint.name} is passed over: {damage}")
    raise CheckpointError(f"no checkpoint of {run_dir} is intact: {'; '.join(damages)}")


def weight_damage(checkpoint: Path, manifest: CheckpointManifest) -> str | None:
    """Tell what is wrong with the files of weights, or None; optimizer state is not looked at."""
    files = [file for file in manifest.files if file.kind == "weights"]
    return next((d for file in files if (d := find_damage(checkpoint, file)) is not None), None)


def check_belongs(
    checkpoint: Path, manifest: CheckpointManifest, run: RunConfig, shards: ShardManifest
) -> None:
    """Refuse a checkpoint of another family, other data or another config than its run names.

    The config counts as a whole, as when training is resumed: a field such as `model.heads` changes
    what the weights compute and none of their shapes.

    Raises:
        CheckpointError: They differ; the fields are named.
    """
    if manifest.family != run.model.family:
        raise CheckpointError(
            f"{checkpoint} holds a model of family {manifest.family}, its run has "
            f"model.family={run.model.family}; legal here: {run.model.family}"
        )
    if manifest.data_fingerprint != shards.fingerprint:
        raise CheckpointError(
            f"{checkpoint} was trained on data {manifest.data_fingerprint}, its run names "
            f"{shards.fingerprint} as data.prepared_dir: its tokenizer may be another one"
        )
    if manifest.config_hash != lineage_hash(run):
        raise CheckpointError(
            f"{checkpoint} was written by another config than the {RUN_FILE} of its run holds now, "
            f"so it may be another model; bring back the {RUN_FILE} that it was trained with"
        )


def load_weights(model: LanguageModel, checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Fill a model with the weights of a checkpoint.

    Raises:
        CheckpointError: The tensors are not those of the model, in name, shape or kind.
    """
    files = [checkpoint / file.name for file in manifest.files if file.kind == "weights"]
    entries = read_headers(files)
    rows = entries["embedding_VD"].shape[0] if "embedding_VD" in entries else None
    expected = model.embedding_VD.shape[0]
    if rows is not None and rows != expected:
        raise CheckpointError(
            f"{checkpoint} has a vocabulary of {rows} entries, its run one of {expected} "
            "(model.vocab_size, or the tokenizer's size); they must be equal"
        )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    check_entries(entries, shapes, str(checkpoint))
    fill_parameters(model, TensorReader(entries))
