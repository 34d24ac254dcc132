"""From the runs and arguments of a probe to the models that it measures, fresh or trained."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from pipeline.config.load import lineage_hash, read_run
from pipeline.config.schema import RunConfig
from pipeline.data.shards import ShardManifest
from pipeline.errors import CheckpointError
from pipeline.models import build_model
from pipeline.models.base import LanguageModel
from pipeline.models.documents import DocumentRule
from pipeline.probes.context import ProbeContext
from pipeline.probes.settings import TrainedParams, require_models
from pipeline.training.checkpoint import open_store
from pipeline.training.checkpoint_files import load_stored_state, sorted_names, verify_stored
from pipeline.training.distributed import RankContext, gather_json

Job = TypeVar("Job")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model to measure."""

    label: str
    state: Literal["initial", "trained"]
    seed: int
    """Of the fresh weights, or of the run."""
    model: LanguageModel
    """Set to evaluation, on the rank's device, in float32."""
    step: int = 0
    """Optimizer steps that the weights have seen."""

    @property
    def columns(self) -> dict[str, Any]:
        """What every record of this model begins with."""
        return {"label": self.label, "state": self.state, "seed": self.seed, "step": self.step}


def open_arms(
    params: TrainedParams,
    runs: Mapping[str, RunConfig],
    context: ProbeContext,
    vocab_size: int,
    shards: ShardManifest | None = None,
) -> Iterator[Arm]:
    """Build the models one after the other: all fresh ones of a label, then its trained ones.

    Args:
        params: Which weights.
        runs: From `choose_runs`.
        context: Where relative run directories stand, and the device.
        vocab_size: Rows of the embedding table.
        shards: The text that trained models must have been trained on; None where there are none.

    Raises:
        ConfigError: There is nothing to measure, or a label of `trained` has no run.
        CheckpointError: A run has no intact checkpoint, or was trained on another text.
    """
    require_models(params, runs)
    device = context.ranks.device
    for label, run in runs.items():
        for seed in params.seeds:
            model = build_model(run.model, vocab_size, seed).to(device).eval()
            yield Arm(label=label, state="initial", seed=seed, model=model)
        for directory in params.trained.get(label, []):
            yield load_arm(label, context.run_dir.parent / directory, vocab_size, device, shards)


def load_arm(
    label: str,
    run_dir: Path,
    vocab_size: int,
    device: torch.device,
    shards: ShardManifest | None = None,
) -> Arm:
    """Load the newest checkpoint of a run.

    Raises:
        ConfigError: The directory holds no run.
        CheckpointError: There is no checkpoint, it is damaged, or it belongs to another config or
            text.
    """
    run = read_run(run_dir)
    store = open_store(run_dir, run)
    names = sorted_names(store.entries())
    if not names:
        raise CheckpointError(
            f"{run_dir} holds no checkpoint; train first: python -m launch train {run_dir}"
        )
    manifest = verify_stored(store, names[0])
    if manifest.config_hash != lineage_hash(run):
        raise CheckpointError(
            f"{names[0]} of {run_dir} was written by another config than its run.yaml holds now; "
            "bring back the file that it was trained with"
        )
    if shards is not None and manifest.data_fingerprint != shards.fingerprint:
        raise CheckpointError(
            f"{names[0]} of {run_dir} was trained on data {manifest.data_fingerprint}, the probe "
            f"reads {shards.fingerprint}: measure it on its own text"
        )
    rule = None
    if shards is not None:
        end_id, switches = shards.end_of_document_id, run.train.documents
        rule = DocumentRule(end_of_document_id=end_id, switches=switches)
    model = build_model(run.model, vocab_size, run.seed, rule)
    tensors = load_stored_state(store, names[0], manifest).parameters
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    return Arm(
        label=label, state="trained", seed=run.seed, model=model.to(device).eval(),
        step=manifest.step,
    )  # fmt: skip


def share_out(
    jobs: Sequence[Job], ranks: RankContext, measure: Callable[[Job], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Measure each job on one rank, and give every rank the records of all, in the jobs' order."""
    mine = {
        index: measure(job)
        for index, job in enumerate(jobs)
        if index % ranks.world_size == ranks.rank
    }
    by_job = {int(index): rows for part in gather_json(mine, ranks) for index, rows in part.items()}
    return [row for index in range(len(jobs)) for row in by_job[index]]


def finite(values: Iterable[float]) -> list[float | None]:
    """Give the numbers, with None where one is not finite: JSON has no word for it."""
    return [value if math.isfinite(value) else None for value in values]
