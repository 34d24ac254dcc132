"""The table of memory: its exact parts against the state, its sum against real ranks."""

from typing import Any

import numpy as np
import pytest

from pipeline.config.batching import plan_batches
from pipeline.config.schema import RunConfig, ZeroConfig
from pipeline.data.loader import TokenBatch
from pipeline.errors import ConfigError
from pipeline.estimate.memory import memory_table, peak_bytes
from pipeline.estimate.state import state_bytes
from pipeline.models import build_model
from pipeline.training.device import peak_memory, reset_peak_memory
from pipeline.training.distributed import RankContext
from pipeline.training.engine import build_engine
from tests.training.rank_pool import RankPool

VOCAB = 8192
SIZES: dict[str, dict[str, Any]] = {
    # About 30 million parameters each, so that tensors and not the libraries fill the memory.
    "gpt": {"family": "gpt", "width": 512, "depth": 8, "heads": 8},
    "lstm_attention": {"family": "lstm_attention", "width": 512, "depth": 6, "heads": 8},
}


def run_of(family: str, stage: int, **train: Any) -> RunConfig:
    fields = {"sequence_tokens": 32, "micro_batch_samples": 1} | train
    tokens = 2 * 64 * fields["sequence_tokens"] * fields["micro_batch_samples"]
    fields = {"global_batch_tokens": tokens, "total_tokens": tokens} | fields
    return RunConfig.model_validate(
        {"model": SIZES[family], "train": fields, "zero": {"stage": stage}}
    )


def measure_peak(ranks: RankContext, run: RunConfig) -> float:
    reset_peak_memory(ranks.device)
    plan = plan_batches(run.train, ranks.world_size)
    engine = build_engine(build_model(run.model, VOCAB, 0), run, plan, ranks)
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, plan.sequence_tokens + 1))
    batch = TokenBatch(
        inputs=ids[:1, :-1].copy(), labels=ids[:1, 1:].copy(),
        text_bytes=np.ones_like(ids[:1, 1:]), sample_ids=np.arange(1),
    )  # fmt: skip
    for _ in range(3):
        engine.train_step([batch, batch], 1e-4)
    return peak_memory(ranks.device)["memory/peak_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "stage"),
    [
        ("gpt", 3),
        pytest.param(
            "lstm_attention", 1,
            marks=pytest.mark.xfail(reason="10.5% too high once, see docs/estimate.md"),
        ),
    ],
)  # fmt: skip
def test_the_sum_is_within_a_tenth_of_a_ranks_peak(family: str, stage: int) -> None:
    run = run_of(family, stage, global_batch_tokens=64)
    pool = RankPool(1)  # a process that held another engine keeps its blocks
    try:
        measured = pool.run(measure_peak, run)[0]
    finally:
        pool.stop()
    assert peak_bytes(memory_table(run, VOCAB, 1)) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("world_size", [1, 2, 128])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("family", ["gpt", "lstm_attention"])
def test_exact_components_are_the_model_state(family: str, stage: int, world_size: int) -> None:
    run = run_of(family, stage)
    exact = {c.name: c.bytes for c in memory_table(run, VOCAB, world_size) if c.exact}
    state = state_bytes(run, VOCAB, world_size)
    expected = {
        "parameters": state.parameters,
        "moments": state.moments,
        "master weights": state.master_weights,
        "gradients": state.gradients,
    }
    if stage == 0:
        del expected["master weights"]
    if stage == 2:
        del expected["gradients"]
    assert exact == expected


def test_each_stage_needs_less_on_many_ranks() -> None:
    small_buckets = {"bucket_elements": 10**6}
    runs = [
        run_of("gpt", stage).model_copy(
            update={"zero": ZeroConfig.model_validate({"stage": stage, **small_buckets})}
        )
        for stage in range(4)
    ]
    peaks = [peak_bytes(memory_table(run, VOCAB, 128, "cuda")) for run in runs]
    assert peaks[0] > peaks[1] > peaks[2] > peaks[3]


@pytest.mark.parametrize("family", ["gpt", "lstm_attention"])
def test_activations_grow_with_the_micro_batch_and_checkpointing_lowers_them(family: str) -> None:
    def activations(**train: Any) -> float:
        run = run_of(family, 1, sequence_tokens=512, **train)
        names = ("activations", "LSTM workspace")
        return sum(c.bytes for c in memory_table(run, VOCAB, 1) if c.name in names)

    few, many = activations(micro_batch_samples=16), activations(micro_batch_samples=32)
    assert many == pytest.approx(2 * few, rel=0.03)  # all but the head's gradient
    again = activations(micro_batch_samples=32, activation_checkpointing=True)
    assert again < many / 3


def test_offloaded_state_lies_in_the_hosts_memory() -> None:
    run = run_of("gpt", 3)
    state = state_bytes(run, VOCAB, 4)
    tables = {
        offload: memory_table(run, VOCAB, 4, "cuda", offload)
        for offload in ("none", "optimizer", "optimizer_and_parameters")
    }
    hosts = {offload: peak_bytes(table, "host") for offload, table in tables.items()}
    assert hosts["none"] == 0
    assert hosts["optimizer"] >= state.moments + state.master_weights
    assert hosts["optimizer_and_parameters"] == hosts["optimizer"] + state.parameters
    devices = [peak_bytes(table) for table in tables.values()]
    assert devices == sorted(devices, reverse=True)
    assert devices[0] > devices[1] > devices[2]


@pytest.mark.parametrize(
    ("stage", "accelerator", "offload", "words"),
    [
        (1, "cpu", "optimizer", "legal: none"),
        (0, "cuda", "optimizer", "zero.stage >= 1, got 0"),
        (2, "cuda", "optimizer_and_parameters", "nearest: zero.stage=3"),
    ],
)
def test_offload_that_does_not_exist_is_refused(
    stage: int, accelerator: Any, offload: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        memory_table(run_of("gpt", stage), VOCAB, 1, accelerator, offload)
