"""How much the loss of the last token depends on each token before it, by distance.

The embedded tokens of a sample are leaves, and one backward pass gives the gradient at all of them.
All is computed in float64: in float32 a gradient that halves a step is 0 after 150 steps, and its
logarithm is gone. The scan of minLSTM alone stays in float32.

Shapes: `N` samples, `B` of a batch, `T` time, `D` model, `C` recurrent state.
"""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config.schema import RunConfig
from pipeline.models.base import LanguageModel
from pipeline.models.cells import Cell, State
from pipeline.models.lstm import LstmAttentionLM, RecurrentLayer
from pipeline.probes.arms import Arm, finite, open_arms
from pipeline.probes.context import ProbeContext
from pipeline.probes.embedded import logits_at_end
from pipeline.probes.settings import GradientParams, choose_runs
from pipeline.probes.text import Rows, in_batches, in_groups, measure_arms

NUDGE = 1e-6
"""Length of the disturbance of a state: small beside the state, large beside float64's rounding."""


def run(runs: Mapping[str, RunConfig], context: ProbeContext) -> list[dict[str, Any]]:
    """Measure every model.

    Args:
        runs: Label to run; random ids need a model whose vocabulary is stated.
        context: Rank group and arguments.

    Returns:
        For each model and group of samples a record of kind `gradient`: `group`, `num_samples` and
        `log_gradient_norm`, whose item k is the mean over samples of log(g_k / g_0), where g_k is
        the norm of the gradient at the token k before the last; None where no gradient arrives.
        For each recurrent layer a record of kind `growth`: `layer` and `log_growth_per_step`, the
        mean logarithm of how much a small disturbance of its state grows in a step.

    Raises:
        ConfigError: There is no model to measure, or random ids have no vocabulary.
        DataError: The validation text is missing or too short.
        CheckpointError: A run has no intact checkpoint.

    Source: Pascanu et al. 2013, section 2 (gradient over distance); Engelken et al. 2023 (growth of
        disturbances).
    """
    params = context.parse_params(GradientParams)

    def measure(arm: Arm, tokens_NT: Tensor) -> Rows:
        return measure_arm(arm, tokens_NT, params)

    if params.text == "validation":
        return measure_arms(runs, context, params, params.sequence_tokens + 1, measure)
    if context.ranks.rank > 0:
        return []
    records = []
    vocab_size = _stated_vocab(runs)
    shape = (params.num_samples, params.sequence_tokens + 1)
    tokens_NT = torch.from_numpy(np.random.default_rng(0).integers(0, vocab_size, shape))
    for arm in open_arms(params, choose_runs(params, runs), context, vocab_size):
        records += [{**arm.columns, **row} for row in measure(arm, tokens_NT)]
    return records


def _stated_vocab(runs: Mapping[str, RunConfig]) -> int:
    run = next(iter(runs.values()))
    return run.model.vocab_size or run.data.tokenizer.vocab_size


def measure_arm(arm: Arm, tokens_NT: Tensor, params: GradientParams) -> Rows:
    """Give the records of one model; its weights are in float64 afterwards."""
    model = arm.model.double()
    rows: Rows = []
    for group, places in in_groups(len(tokens_NT), params.num_groups):
        norms_NT = torch.cat(
            [
                gradient_norms(model, tokens_BT.to(model.embedding_VD.device))
                for tokens_BT in in_batches(tokens_NT[places], params.batch_samples)
            ]
        )
        logs_NT = norms_NT.log() - norms_NT[:, :1].log()
        rows.append(
            {
                "kind": "gradient", "group": group, "num_samples": len(logs_NT),
                "log_gradient_norm": finite(logs_NT.mean(dim=0).tolist()),
            }
        )  # fmt: skip
    if isinstance(model, LstmAttentionLM):
        some_BT = tokens_NT[: params.batch_samples, :-1].to(model.embedding_VD.device)
        rows += [
            {"kind": "growth", "layer": layer, "log_growth_per_step": growth}
            for layer, growth in enumerate(growth_of_layers(model, some_BT))
        ]
    return rows


def gradient_norms(model: LanguageModel, tokens_BT: Tensor) -> Tensor:
    """Give the norms g_k `[B, T - 1]` of the last token's loss at the embedded token k before.

    Args:
        model: Set to evaluation.
        tokens_BT: Ids; the last is the one to predict, the one before it has distance 0.
    """
    x_BTD = F.embedding(tokens_BT[:, :-1], model.embedding_VD).detach().requires_grad_()
    # The sum over samples: each sample's loss depends on its own tokens alone.
    loss = F.cross_entropy(logits_at_end(model, x_BTD), tokens_BT[:, -1], reduction="sum")
    (gradient_BTD,) = torch.autograd.grad(loss, x_BTD)
    norms_BT: Tensor = torch.linalg.vector_norm(gradient_BTD, dim=2)
    return norms_BT.flip(1)


@torch.no_grad()
def growth_of_layers(model: LstmAttentionLM, inputs_BT: Tensor) -> list[float]:
    """Give, for each recurrent layer, the mean log growth of a disturbance of its state a step.

    Args:
        model: In float64, set to evaluation.
        inputs_BT: Ids.
    """
    if model.config.input_feeding:
        return []
    reads: list[Tensor] = []
    hooks = [
        layer.cell.register_forward_pre_hook(lambda cell, given: reads.append(given[0]))
        for layer in recurrent_layers(model)
    ]
    model.logits(inputs_BT)
    for hook in hooks:
        hook.remove()
    layers = zip(recurrent_layers(model), reads, strict=True)
    return [growth_of_cell(layer.cell, read_BTD) for layer, read_BTD in layers]


def recurrent_layers(model: LstmAttentionLM) -> list[RecurrentLayer]:
    """Give the layers of a recurrent model."""
    return [cast("RecurrentLayer", layer) for layer in model.layers]


@torch.no_grad()
def growth_of_cell(cell: Cell, x_BTD: Tensor) -> float:
    """Give the mean log growth, by a disturbance that is made small again after each step.

    Source: Benettin et al. 1980.
    """
    generator = torch.Generator().manual_seed(0)
    state = cell.start(x_BTD)
    shift: State = tuple(
        torch.randn(part.shape, generator=generator, dtype=part.dtype).to(part) for part in state
    )
    shift = _scaled(shift, _length(shift))
    total_B = torch.zeros(len(x_BTD), dtype=x_BTD.dtype, device=x_BTD.device)
    for x_B1D in torch.split(x_BTD, 1, dim=1):
        moved = tuple(a + b for a, b in zip(state, shift, strict=True))
        state, moved = cell(x_B1D, None, state)[1], cell(x_B1D, None, moved)[1]
        shift = tuple(b - a for a, b in zip(state, moved, strict=True))
        length_B = _length(shift)
        total_B += (length_B / NUDGE).log()
        shift = _scaled(shift, length_B)
    return float(total_B.mean()) / x_BTD.shape[1]


def _length(state: State) -> Tensor:
    norms_B: Tensor = torch.linalg.vector_norm(torch.cat(state, dim=1), dim=1)
    return norms_B


def _scaled(state: State, length_B: Tensor) -> State:
    return tuple(part_BC * (NUDGE / length_B).unsqueeze(1) for part_BC in state)
