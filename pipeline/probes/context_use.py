"""How the loss of a model falls with the context it has: by position, truncated, and carried over.

Shapes: `N` samples, `B` of a batch, `T` time, `V` vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config.schema import RunConfig
from pipeline.models.base import LanguageModel
from pipeline.models.lstm import LstmAttentionLM
from pipeline.probes.arms import Arm
from pipeline.probes.context import ProbeContext
from pipeline.probes.settings import ContextParams
from pipeline.probes.text import Rows, in_batches, in_groups, measure_arms, score


def run(runs: Mapping[str, RunConfig], context: ProbeContext) -> list[dict[str, Any]]:
    """Measure every model on samples of 2 T + 1 tokens.

    Args:
        runs: Label to run.
        context: Rank group and arguments.

    Returns:
        For each model and group of samples records of `kind`, `group` and `num_samples`:
        `stateless`, `loss_by_position`: the second half of each sample, read from its own begin
        with nothing before it; `overlapped`, the same tokens, each read with at least T/2 others
        before it, in windows that no model finds too long; `stateful`, the same tokens, read by a
        recurrent model whose state comes from the first half, attention beginning anew. Item t is
        the loss of the token behind position t. And `truncated`, `context_tokens` and `loss`: the
        last token of each sample, given that many tokens before it alone.

    Raises:
        ConfigError: There is no model to measure, or T is longer than its positions.
        DataError: The validation text is missing or too short.
        CheckpointError: A run has no intact checkpoint.

    Source: Kaplan et al. 2020, figure 7 (position); Khandelwal et al. 2018, section 4 (truncation).
    """
    params = context.parse_params(ContextParams)

    def measure(arm: Arm, tokens_NT: Tensor) -> Rows:
        return measure_arm(arm, tokens_NT, params)

    return measure_arms(runs, context, params, 2 * params.sequence_tokens + 1, measure)


def measure_arm(arm: Arm, tokens_NT: Tensor, params: ContextParams) -> Rows:
    """Give the records of one model."""
    length = params.sequence_tokens
    curves = {
        "stateless": score(arm, tokens_NT[:, length:], params.batch_samples),
        "overlapped": score_overlapped(arm, tokens_NT, params),
    }
    if isinstance(arm.model, LstmAttentionLM):
        batches = in_batches(tokens_NT, params.batch_samples)
        curves["stateful"] = torch.cat([score_stateful(arm.model, batch) for batch in batches])
    rows: Rows = []
    groups = list(in_groups(len(tokens_NT), params.num_groups))
    for kind, losses_NT in curves.items():
        for group, places in groups:
            part_NT = losses_NT[places]
            rows.append(
                {
                    "kind": kind, "group": group, "num_samples": len(part_NT),
                    "loss_by_position": part_NT.mean(dim=0).tolist(),
                }
            )  # fmt: skip
    for context_tokens in params.context_tokens:
        if context_tokens > length:
            continue
        losses_N = score(arm, tokens_NT[:, -context_tokens - 1 :], params.batch_samples)[:, -1]
        for group, places in groups:
            rows.append(
                {
                    "kind": "truncated", "group": group, "num_samples": len(losses_N[places]),
                    "context_tokens": context_tokens, "loss": float(losses_N[places].mean()),
                }
            )  # fmt: skip
    return rows


def score_overlapped(arm: Arm, tokens_NT: Tensor, params: ContextParams) -> Tensor:
    """Give the losses `[N, T]` of the second half, in windows of T that score their last half."""
    length = params.sequence_tokens
    new = length // 2
    parts = []
    for start in range(length, 2 * length, new):
        stop = min(start + new, 2 * length)
        window_NT = tokens_NT[:, stop - length : stop + 1]
        parts.append(score(arm, window_NT, params.batch_samples)[:, start - stop :])
    return torch.cat(parts, dim=1)


@torch.no_grad()
def score_stateful(model: LanguageModel, tokens_BT: Tensor) -> Tensor:
    """Give the losses `[B, T]` of the second half, with the recurrent state of the first.

    What attention keeps is dropped between the halves: it was trained on T tokens at most.
    """
    half = (tokens_BT.shape[1] - 1) // 2
    cache = model.start(len(tokens_BT))
    model.extend(tokens_BT[:, :half], cache)
    *states, _past, fed = cache.layers
    cache.layers, cache.num_tokens = [*states, (), fed], 0
    logits_BTV = model.extend(tokens_BT[:, half:-1], cache)
    losses_BT = F.cross_entropy(
        logits_BTV.double().transpose(1, 2), tokens_BT[:, half + 1 :], reduction="none"
    )
    return losses_BT.cpu()
