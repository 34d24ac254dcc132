"""How much the loss of a token rises when the tokens before it stand in another order.

Far tokens are permuted or reversed while the nearest k stay, or all are permuted within windows.
Every model reads the same changed tokens. Beside them stand the losses of counts that know no
order: of single tokens, and of pairs.

Shapes: `N` samples, `T` tokens before the one that is scored.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.data.shards import ShardManifest, ShardSet
from pipeline.probes.arms import Arm
from pipeline.probes.context import ProbeContext
from pipeline.probes.recall_loss import COUNTED_TOKENS, count_pairs
from pipeline.probes.settings import ShuffleParams
from pipeline.probes.task_base import Array
from pipeline.probes.text import Rows, in_groups, load_text, measure_arms, read_samples, score


def run(runs: Mapping[str, RunConfig], context: ProbeContext) -> list[dict[str, Any]]:
    """Measure every model on the last token of each sample.

    Args:
        runs: Label to run.
        context: Rank group and arguments.

    Returns:
        For each model, change and group of samples: `change` (`none`, `permute`, `reverse` with
        `kept_tokens`, or `local` with `window_tokens`), `group`, `num_samples` and `loss`. Then
        records with the label `unigram` and `bigram` and the change `none`, for scale.

    Raises:
        ConfigError: There is no model to measure.
        DataError: The text is missing or too short.
        CheckpointError: A run has no intact checkpoint.

    Source: Khandelwal et al. 2018, section 5.
    """
    params = context.parse_params(ShuffleParams)

    def measure(arm: Arm, tokens_NT: Tensor) -> Rows:
        return measure_arm(arm, tokens_NT, params)

    num_tokens = params.sequence_tokens + 1
    records = measure_arms(runs, context, params, num_tokens, measure)
    if context.ranks.rank > 0:
        return []
    shards = load_text(runs, context)
    samples_NT = read_samples(shards, params.num_samples, num_tokens)
    for label, losses_N in count_floors(samples_NT[:, -2:], shards).items():
        for group, places in in_groups(len(losses_N), params.num_groups):
            records.append(
                {
                    "label": label, "change": "none", "group": group,
                    "num_samples": len(losses_N[places]), "loss": float(losses_N[places].mean()),
                }
            )  # fmt: skip
    return records


def measure_arm(arm: Arm, tokens_NT: Tensor, params: ShuffleParams) -> Rows:
    """Give the records of one model."""
    rows: Rows = []
    plain_NT = tokens_NT.cpu().numpy()
    for columns, changed_NT in change_order(plain_NT, params):
        losses_NT = score(
            arm, torch.from_numpy(changed_NT).to(tokens_NT.device), params.batch_samples
        )
        for group, places in in_groups(len(losses_NT), params.num_groups):
            last_N = losses_NT[places, -1]
            rows.append(
                {
                    **columns,
                    "group": group,
                    "num_samples": len(last_N),
                    "loss": float(last_N.mean()),
                }
            )
    return rows


def change_order(tokens_NT: Array, params: ShuffleParams) -> Iterator[tuple[dict[str, Any], Array]]:
    """Give what each change is called, and the samples under it, the same at every call.

    The last token of a sample, which is scored, keeps its place.
    """
    num_before = tokens_NT.shape[1] - 1
    yield {"change": "none"}, tokens_NT
    for kept in params.kept_tokens:
        far = num_before - kept
        if far < 2:
            continue
        rng = np.random.default_rng([0, kept])
        permuted_NT, reversed_NT = tokens_NT.copy(), tokens_NT.copy()
        permuted_NT[:, :far] = rng.permuted(tokens_NT[:, :far], axis=1)
        reversed_NT[:, :far] = tokens_NT[:, :far][:, ::-1]
        yield {"change": "permute", "kept_tokens": kept}, permuted_NT
        yield {"change": "reverse", "kept_tokens": kept}, reversed_NT
    for window in params.window_tokens:
        rng = np.random.default_rng([1, window])
        local_NT = tokens_NT.copy()
        for start in range(0, num_before, window):
            stop = min(start + window, num_before)
            local_NT[:, start:stop] = rng.permuted(tokens_NT[:, start:stop], axis=1)
        yield {"change": "local", "window_tokens": window}, local_NT


def count_floors(last_N2: Array, shards: ShardManifest) -> dict[str, Array]:
    """Give the loss of the second of two tokens by counts of the training text.

    Args:
        last_N2: The last two tokens of each sample.
        shards: The text.

    Returns:
        `unigram`, with one added to every count, and `bigram`, half of which is the unigram's.
    """
    split, rows = ShardSet(shards, "train"), shards.vocab_size
    counts_V = np.zeros(rows, dtype=np.int64)
    for start in range(0, split.num_tokens, COUNTED_TOKENS):
        stop = min(start + COUNTED_TOKENS, split.num_tokens)
        counts_V += np.bincount(split.tokens(start, stop).astype(np.int64), minlength=rows)
    unigram_N = (counts_V[last_N2[:, 1]] + 1) / (counts_V.sum() + rows)
    pairs_N = last_N2[:, 0] * rows + last_N2[:, 1]
    wanted, places_N = np.unique(pairs_N, return_inverse=True)
    followed_N = count_pairs(wanted, shards)[places_N] / np.maximum(counts_V[last_N2[:, 0]], 1)
    return {"unigram": -np.log(unigram_N), "bigram": -np.log((followed_N + unigram_N) / 2)}
