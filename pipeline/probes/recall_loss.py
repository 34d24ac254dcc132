"""The loss on tokens that recall can tell, against the loss on all others.

A token is a hit if it and the one before it stood side by side earlier in the same sample, and the
training text holds that pair too rarely for the weights to know it.

Shapes: `N` samples, `T` time.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.data.shards import ShardManifest, ShardSet
from pipeline.probes.arms import Arm
from pipeline.probes.attention_watch import Watch
from pipeline.probes.context import ProbeContext
from pipeline.probes.settings import RecallLossParams
from pipeline.probes.task_base import Array
from pipeline.probes.text import Rows, in_groups, load_text, measure_arms, score

COUNTED_TOKENS = 1 << 22
"""Training tokens counted at once."""


def run(runs: Mapping[str, RunConfig], context: ProbeContext) -> list[dict[str, Any]]:
    """Measure every model.

    Args:
        runs: Label to run.
        context: Rank group and arguments.

    Returns:
        For each model, group of samples, `attention` (`as_trained`, or `zeroed`) and `slice` (`hit`
        or `rest`): `group`, `num_tokens`, and `loss` in nats unless there is no such token.

    Raises:
        ConfigError: There is no model to measure.
        DataError: The text is missing or too short.
        CheckpointError: A run has no intact checkpoint.

    Source: Arora et al. 2023, section 3.1.
    """
    params = context.parse_params(RecallLossParams)
    shards = load_text(runs, context)

    def measure(arm: Arm, tokens_NT: Tensor) -> Rows:
        hits_NT = find_hits(tokens_NT.cpu().numpy(), shards, params.max_train_occurrences)
        return measure_arm(arm, tokens_NT, torch.from_numpy(hits_NT), params)

    return measure_arms(runs, context, params, params.sequence_tokens + 1, measure)


def measure_arm(arm: Arm, tokens_NT: Tensor, hits_NT: Tensor, params: RecallLossParams) -> Rows:
    """Give the records of one model.

    Args:
        arm: The model.
        tokens_NT: Samples of T + 1 tokens.
        hits_NT: bool `[N, T]`, whether each token but the first is a hit.
        params: Groups and batches.
    """
    losses = {"as_trained": score(arm, tokens_NT, params.batch_samples)}
    with Watch(zeroed_heads="all") as watch:
        without_NT = score(arm, tokens_NT, params.batch_samples)
    if watch.num_calls:
        losses["zeroed"] = without_NT
    rows: Rows = []
    for attention, losses_NT in losses.items():
        for group, places in in_groups(len(tokens_NT), params.num_groups):
            for name, mask_NT in (("hit", hits_NT[places]), ("rest", ~hits_NT[places])):
                chosen = losses_NT[places][mask_NT]
                row = {
                    "attention": attention, "slice": name, "group": group,
                    "num_tokens": len(chosen),
                }  # fmt: skip
                rows.append({**row, "loss": float(chosen.mean())} if len(chosen) else row)
    return rows


def find_hits(tokens_NT: Array, shards: ShardManifest, max_occurrences: int | None) -> Array:
    """Tell for each token but the first whether it is a hit: bool `[N, T - 1]`.

    Args:
        tokens_NT: Samples.
        shards: Holds the training text that pairs are counted in.
        max_occurrences: Above it a pair is known by heart; None asks for no count.
    """
    pairs_NT = tokens_NT[:, :-1].astype(np.int64) * shards.vocab_size + tokens_NT[:, 1:]
    hits_NT: Array = np.ones(pairs_NT.shape, dtype=np.bool_)
    for row, pairs_T in enumerate(pairs_NT):
        _, first_seen = np.unique(pairs_T, return_index=True)
        hits_NT[row, first_seen] = False
    if max_occurrences is None:
        return hits_NT
    wanted = np.unique(pairs_NT[hits_NT])
    known = wanted[count_pairs(wanted, shards) > max_occurrences]
    return np.logical_and(hits_NT, ~np.isin(pairs_NT, known))


def count_pairs(wanted: Array, shards: ShardManifest) -> Array:
    """Count pairs of neighbouring tokens in the training text.

    Args:
        wanted: Sorted pairs, each as first x vocabulary + second.
        shards: The text.
    """
    split = ShardSet(shards, "train")
    counts = np.zeros(len(wanted), dtype=np.int64)
    for start in range(0, split.num_tokens - 1, COUNTED_TOKENS):
        stop = min(start + COUNTED_TOKENS + 1, split.num_tokens)
        tokens = split.tokens(start, stop).astype(np.int64)
        pairs, times = np.unique(tokens[:-1] * shards.vocab_size + tokens[1:], return_counts=True)
        _, mine, theirs = np.intersect1d(wanted, pairs, assume_unique=True, return_indices=True)
        counts[mine] += times[theirs]
    return counts
