"""What a next token costs, in time and in state, as the text before it grows.

Weights are fresh: neither depends on them. The time of a token includes that of copying what is
kept into tensors that hold one token more, which a server that sets memory aside would not do.
Models and contexts take turns, each round in the reverse order of the one before, and a round times
some tokens one after the other, on rank 0.
"""

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.models import build_model
from pipeline.models.base import LanguageModel
from pipeline.probes.context import ProbeContext
from pipeline.probes.settings import GenerationParams, choose_runs
from pipeline.training.device import synchronize

PREFILL_TOKENS = 512
"""Tokens of a prompt that are read at once; its length changes what is kept by no more than
rounding."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model with a context and a number of texts."""

    label: str
    model: LanguageModel
    context_tokens: int
    batch_samples: int


def run(runs: Mapping[str, RunConfig], context: ProbeContext) -> list[dict[str, Any]]:
    """Time the next tokens behind contexts.

    Args:
        runs: Label to run, of which the model alone counts; its positions are raised as needed.
        context: Rank group and arguments.

    Returns:
        For each model, context, number of texts and round: `context_tokens`, `batch_samples`,
        `num_tokens` timed, `seconds_per_token` and `cpu_seconds_per_token` of a step of all texts,
        `state_bytes` of all texts at the end of the context, `threads` and `load_average`.

    Raises:
        ConfigError: A model cannot generate.
    """
    params = context.parse_params(GenerationParams)
    if context.ranks.rank > 0:
        return []
    longest = max(params.context_tokens) + params.num_tokens
    settings = []
    for label, config in choose_runs(params, runs).items():
        positions = max(longest, config.model.max_positions)
        shape = config.model.model_copy(update={"max_positions": positions})
        model = build_model(shape, config.model.vocab_size or config.data.tokenizer.vocab_size, 0)
        model = model.to(context.ranks.device).eval()
        settings += [
            Setting(label=label, model=model, context_tokens=tokens, batch_samples=samples)
            for tokens, samples in itertools.product(params.context_tokens, params.batch_samples)
        ]
    records = []
    for number in range(params.repeats):
        context.on_event(f"round {number + 1} of {params.repeats}")
        for setting in settings if number % 2 == 0 else reversed(settings):
            records.append({**measure_setting(setting, params.num_tokens), "round": number})
    return records


@torch.inference_mode()
def measure_setting(setting: Setting, num_tokens: int) -> dict[str, Any]:
    """Read a context of equal tokens, then time the next ones."""
    model, samples = setting.model, setting.batch_samples
    device = model.embedding_VD.device
    cache = model.start(samples)
    prompt_BT = torch.zeros(samples, setting.context_tokens, dtype=torch.int64, device=device)
    for piece_BT in torch.split(prompt_BT, PREFILL_TOKENS, dim=1):
        logits_BTV = model.extend(piece_BT, cache)
    state_bytes = cache.num_bytes
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(num_tokens):
        token_B1: Tensor = logits_BTV[:, -1:].argmax(dim=2)
        logits_BTV = model.extend(token_B1, cache)
    synchronize(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "label": setting.label, "context_tokens": setting.context_tokens,
        "batch_samples": samples, "num_tokens": num_tokens,
        "seconds_per_token": wall / num_tokens, "cpu_seconds_per_token": cpu / num_tokens,
        "state_bytes": state_bytes, "threads": torch.get_num_threads(),
        "load_average": psutil.getloadavg()[0],
    }  # fmt: skip
