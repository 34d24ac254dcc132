"""From the prepared text to the samples that probes of trained models read, in groups.

Shapes: `N` samples, `T` time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.data.shards import ShardManifest, ShardSet
from pipeline.errors import DataError
from pipeline.probes.arms import Arm, open_arms
from pipeline.probes.context import ProbeContext
from pipeline.probes.settings import TextParams, choose_runs
from pipeline.tracking.store import PROBE_FILE
from pipeline.training.train import load_prepared

Rows = list[dict[str, Any]]
Tokens = npt.NDArray[np.int64]


def measure_arms(
    runs: Mapping[str, RunConfig],
    context: ProbeContext,
    params: TextParams,
    num_tokens: int,
    measure: Callable[[Arm, Tensor], Rows],
) -> Rows:
    """Measure every model on the same samples of the validation split, on rank 0.

    Args:
        runs: The probe's runs, which share one text.
        context: Rank group and directory.
        params: Which models and samples.
        num_tokens: Tokens of a sample.
        measure: Gives the records of one model for samples `[N, num_tokens]`, int64.

    Raises:
        DataError: There is no prepared text, or it is too short.
        CheckpointError: As `open_arms`.
    """
    shards = load_text(runs, context)
    # A probe of its own rank count is not worth it: other ranks have nothing to add.
    if context.ranks.rank > 0:
        return []
    tokens_NT = torch.from_numpy(read_samples(shards, params.num_samples, num_tokens))
    tokens_NT = tokens_NT.to(context.ranks.device)
    records = []
    for arm in open_arms(params, choose_runs(params, runs), context, shards.vocab_size, shards):
        context.on_event(f"measure {arm.label}, {arm.state}, seed {arm.seed}")
        records += [{**arm.columns, **row} for row in measure(arm, tokens_NT)]
    return records


def load_text(runs: Mapping[str, RunConfig], context: ProbeContext) -> ShardManifest:
    """Load the manifest of the text that the runs share."""
    return load_prepared(next(iter(runs.values())), context.run_dir / PROBE_FILE)


def read_samples(shards: ShardManifest, num_samples: int, num_tokens: int) -> Tokens:
    """Read samples spread evenly over the validation split, none of which overlap.

    Returns:
        `[N, num_tokens]`, int64.

    Raises:
        DataError: The split is too short for so many.
    """
    split = ShardSet(shards, "validation")
    if num_samples * num_tokens > split.num_tokens:
        raise DataError(
            f"{num_samples} samples of {num_tokens} tokens do not fit into the "
            f"{split.num_tokens} validation tokens of {shards.directory}; nearest: "
            f"{split.num_tokens // num_tokens} samples"
        )
    starts = np.arange(num_samples, dtype=np.int64) * split.num_tokens // num_samples
    return split.rows(starts, num_tokens).astype(np.int64)


def in_groups(num_samples: int, num_groups: int) -> Iterator[tuple[int, slice]]:
    """Cut samples into neighbouring groups of nearly one size; give their numbers and places."""
    num_groups = min(num_groups, num_samples)
    edges = [index * num_samples // num_groups for index in range(num_groups + 1)]
    for group, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        yield group, slice(start, stop)


def in_batches(tokens_NT: Tensor, size: int) -> Sequence[Tensor]:
    """Cut samples into batches of at most `size`."""
    return torch.split(tokens_NT, size)


@torch.no_grad()
def score(arm: Arm, tokens_NT: Tensor, batch_samples: int) -> Tensor:
    """Give the loss `[N, T - 1]` of every token but the first, float64 nats on the CPU."""
    parts = [
        arm.model(tokens_BT[:, :-1], tokens_BT[:, 1:]).double().cpu()
        for tokens_BT in in_batches(tokens_NT, batch_samples)
    ]
    return torch.cat(parts)
