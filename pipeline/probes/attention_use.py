"""Where the attention of a model looks, and what its loss is without it.

Queries are those of the second half of a sample: each sees at least half of it, and the weights of
one query sum to 1, so the mass by distance does too.

Shapes: `N` samples, `B` of a batch, `H` heads, `T` time of queries, `S` time of keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.probes.arms import Arm
from pipeline.probes.attention_watch import Watch
from pipeline.probes.context import ProbeContext
from pipeline.probes.settings import AttentionParams
from pipeline.probes.text import Rows, in_batches, in_groups, measure_arms, score


@dataclass
class Gaze:
    """Sums over queries of what one call of attention did, by head, float64 on the CPU."""

    mass_HS: Tensor
    """Weight at each distance, 0 the own token."""
    entropy_H: Tensor
    """Nats."""
    num_queries: int = 0

    def add(self, weights_BHTS: Tensor) -> None:
        """Add the queries of the second half of a batch."""
        length = weights_BHTS.shape[3]
        late_BHTS = weights_BHTS[:, :, length // 2 :].double().cpu()
        self.num_queries += len(late_BHTS) * late_BHTS.shape[2]
        for place, row_BHS in enumerate(late_BHTS.unbind(2), start=length // 2):
            self.mass_HS[:, : place + 1] += row_BHS[:, :, : place + 1].flip(2).sum(dim=0)
        self.entropy_H += torch.special.entr(late_BHTS).sum(dim=(0, 2, 3))


def run(runs: Mapping[str, RunConfig], context: ProbeContext) -> list[dict[str, Any]]:
    """Measure every model; one without attention has only its loss `as_trained`.

    Args:
        runs: Label to run.
        context: Rank group and arguments.

    Returns:
        For each model, call of attention (`layer`, in the order of the model) and `head` a record
        of kind `gaze`: `mass_by_distance`, `mean_distance_tokens` and `entropy_nats`, means over
        the queries; a causal model is assumed. For each group of samples records of kind `loss`:
        `ablation` (`none`, `zeroed`, `swapped`, or `head` with `layer` and `head`), `group`,
        `num_samples` and `loss`.

    Raises:
        ConfigError: There is no model to measure.
        DataError: The validation text is missing or too short.
        CheckpointError: A run has no intact checkpoint.

    Source: Khandelwal et al. 2018 (loss under changes at test time); Michel et al. 2019 (heads
        taken out one at a time).
    """
    params = context.parse_params(AttentionParams)

    def measure(arm: Arm, tokens_NT: Tensor) -> Rows:
        return measure_arm(arm, tokens_NT, params)

    return measure_arms(runs, context, params, params.sequence_tokens + 1, measure)


def measure_arm(arm: Arm, tokens_NT: Tensor, params: AttentionParams) -> Rows:
    """Give the records of one model."""
    gazes = watch_gaze(arm, tokens_NT, params.batch_samples)
    rows: Rows = []
    for layer, gaze in gazes.items():
        for head, mass_S in enumerate(gaze.mass_HS / gaze.num_queries):
            distances_S = torch.arange(len(mass_S), dtype=mass_S.dtype)
            rows.append(
                {
                    "kind": "gaze", "layer": layer, "head": head,
                    "mass_by_distance": mass_S.tolist(),
                    "mean_distance_tokens": float((distances_S * mass_S).sum()),
                    "entropy_nats": float(gaze.entropy_H[head]) / gaze.num_queries,
                }
            )  # fmt: skip
    num_heads = {layer: len(gaze.mass_HS) for layer, gaze in gazes.items()}
    return rows + _ablate(arm, tokens_NT, params, num_heads)


def watch_gaze(arm: Arm, tokens_NT: Tensor, batch_samples: int) -> dict[int, Gaze]:
    """Watch all samples; give one sum for each call of attention that holds all queries.

    With input feeding, or where a network scores some queries at a time, no call does.
    """
    gazes: dict[int, Gaze] = {}
    length = tokens_NT.shape[1] - 1

    def take(number: int, weights_BHTS: Tensor) -> None:
        if weights_BHTS.shape[2:] != (length, length):
            return
        zeros_HS = torch.zeros(weights_BHTS.shape[1], length, dtype=torch.float64)
        gaze = gazes.setdefault(number, Gaze(mass_HS=zeros_HS, entropy_H=zeros_HS[:, 0].clone()))
        gaze.add(weights_BHTS)

    for tokens_BT in in_batches(tokens_NT, batch_samples):
        with Watch(take=take), torch.no_grad():
            arm.model(tokens_BT[:, :-1], tokens_BT[:, 1:])
    return gazes


def _ablate(
    arm: Arm, tokens_NT: Tensor, params: AttentionParams, num_heads: Mapping[int, int]
) -> Rows:
    """Read the loss as trained and under each change that changes an attention."""
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = [({"ablation": "none"}, {})]
    if "zeroed" in params.ablations:
        changes.append(({"ablation": "zeroed"}, {"zeroed_heads": "all"}))
    if "swapped" in params.ablations:
        changes.append(({"ablation": "swapped"}, {"is_swapped": True}))
    if "heads" in params.ablations:
        changes += [
            ({"ablation": "head", "layer": layer, "head": head}, {"zeroed_heads": {layer: [head]}})
            for layer, count in num_heads.items()
            for head in range(count)
        ]
    rows: Rows = []
    for columns, change in changes:
        losses, num_calls = [], 0
        for tokens_BT in in_batches(tokens_NT, params.batch_samples):
            # Calls are counted from the begin of a pass.
            with Watch(**change) as watch:
                losses.append(score(arm, tokens_BT, params.batch_samples))
            num_calls += watch.num_calls
        if change and not num_calls:
            continue
        losses_NT = torch.cat(losses)
        rows += [
            {
                "kind": "loss", **columns, "group": group, "num_samples": len(losses_NT[places]),
                "loss": float(losses_NT[places].mean()),
            }
            for group, places in in_groups(len(losses_NT), params.num_groups)
        ]  # fmt: skip
    return rows
