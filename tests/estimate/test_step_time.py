"""Step time: products, recurrences and goodput against numbers worked by hand, and its limits."""

import math
from pathlib import Path

import pytest

from pipeline.config.hardware import HardwareConfig
from pipeline.config.load import load_run
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.estimate.collectives import When
from pipeline.estimate.failures import predict_goodput, young_interval
from pipeline.estimate.products import MatrixProduct
from pipeline.estimate.roofline import (
    FUSED_BACKWARD,
    compute_seconds,
    product_seconds,
    rates_of,
    step_seconds,
)
from pipeline.estimate.step_time import hidden_seconds, step_time
from tests.estimate.published import hardware_of

RUNS = Path(__file__).resolve().parents[2] / "configs" / "run"
PARTS = ("products", "attention", "recurrence", "between", "dispatch", "update", "exposed")


def device(**update: object) -> HardwareConfig:
    """A device of 100 TFLOP/s and 1 TB/s that reaches all of both; calls take 5 us."""
    round_figures = {
        "peak_flops_per_second": {"bf16": 1e14}, "memory_bytes_per_second": 1e12,
        "product_fraction": 1.0, "attention_fraction": 0.5, "memory_fraction": 1.0,
        "call_seconds": 5e-6, "recurrent_step_seconds": 1e-5, "cache_bytes": 1e7,
    }  # fmt: skip
    tree = hardware_of("h100-8", 8).model_dump()
    return HardwareConfig.model_validate({**tree, **round_figures, **update})


def product(**update: object) -> MatrixProduct:
    fields = {
        "name": "x", "pass_": "forward", "batch": 1, "m": 1000, "n": 1000, "k": 1000, "times": 1,
        "sequential": False,
    }  # fmt: skip
    return MatrixProduct(**{**fields, **update})  # type: ignore[arg-type]


def lstm(**train: object) -> RunConfig:
    run = load_run(RUNS / "lstm_125m_fineweb10b.yaml")
    return run.model_copy(update={"train": run.train.model_copy(update=train)})


def test_a_large_product_takes_its_flops_and_a_start() -> None:
    """2e9 FLOPs at 1e14 a second: 20 us, and 5 us; its 6 MB would take 6 us."""
    assert product_seconds(product(), rates_of(device(), "bf16")) == pytest.approx(25e-6)


def test_a_thin_product_takes_its_bytes() -> None:
    """[1 x 1000] x [1000 x 1000]: 2.004 MB at 1 TB/s, against 0.02 us of FLOPs."""
    seconds = product_seconds(product(m=1), rates_of(device(), "bf16"))
    assert seconds == pytest.approx(2.004e-6 + 5e-6)


def test_a_recurrent_step_reads_its_matrix_from_the_cache_if_it_fits() -> None:
    thin = product(m=1, sequential=True)
    assert step_seconds(thin, rates_of(device(), "bf16")) == pytest.approx(2e-8 + 1e-5)
    small = rates_of(device(cache_bytes=1e6), "bf16")
    assert step_seconds(thin, small) == pytest.approx(2.004e-6 + 1e-5)


def test_fused_attention_skips_what_the_mask_removes_and_computes_scores_again() -> None:
    rates = rates_of(device(), "bf16")
    halves = [product(batch=8, needed_fraction=0.5, pass_=name) for name in ("forward", "backward")]
    seconds = compute_seconds(halves, rates, fused_attention=True).attention
    once = 8 * 2e9 * 0.5 / 5e13
    assert seconds == pytest.approx(once * (1 + FUSED_BACKWARD) + 2 * 5e-6)


def test_a_number_format_without_a_peak_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"peak_flops_per_second.fp32 is missing.*stated: bf16"):
        rates_of(device(), "fp32")


def test_parts_of_a_step_add_up_to_it() -> None:
    step = step_time(lstm(), 50304, 8, hardware_of("h100-8", 8))
    parts = sum(getattr(step, name) for name in PARTS) + step.data_wait
    assert step.seconds == pytest.approx(parts)
    assert 0 < step.exposed <= step.communication
    assert 0 < step.recurrence_floor < step.recurrence


def test_latency_of_a_recurrence_is_layers_times_tokens_times_passes() -> None:
    """8 layers of 1,024 tokens, forward and backward, for each of the accumulated micro-batches."""
    hardware = hardware_of("h100-8", 8)
    run = lstm(global_batch_tokens=8 * 8 * 1024 * 3)
    steps = 2 * 8 * 1024 * 3
    floor = step_time(run, 50304, 8, hardware).recurrence_floor
    assert floor == pytest.approx(steps * hardware.recurrent_step_seconds, rel=0.002)


def test_more_ranks_take_away_work_but_no_latency_of_a_recurrence() -> None:
    """One micro-batch a rank from 8 ranks on: halving its samples leaves the floor."""
    tokens = 64 * 1024
    eight = step_time(lstm(global_batch_tokens=tokens), 50304, 8, hardware_of("h100-8", 8))
    finer = lstm(global_batch_tokens=tokens, micro_batch_samples=1)
    many = step_time(finer, 50304, 64, hardware_of("h100-64", 64))
    assert many.products < eight.products / 4
    assert many.recurrence_floor == pytest.approx(eight.recurrence_floor)


def test_without_overlap_all_of_the_communication_shows() -> None:
    hardware = hardware_of("h100-8", 8).model_copy(update={"overlap_fraction": 0.0})
    step = step_time(lstm(), 50304, 8, hardware)
    assert step.exposed == pytest.approx(step.communication)


def test_youngs_interval_of_a_known_case() -> None:
    """sqrt(2 x 50 s x 10,000 s) = 1,000 s."""
    assert young_interval(50.0, 10_000.0) == pytest.approx(1000.0)


def test_goodput_counts_waits_lost_steps_and_restarts() -> None:
    """3,600 s between checkpoints, 1,024 ranks of 50,000 h: 48.8 h between failures."""
    run = lstm()
    policy = run.checkpoint.model_copy(update={"every_steps": None, "every_seconds": 3600.0})
    run = run.model_copy(update={"checkpoint": policy})
    goodput = predict_goodput(run, 125_000_000, 1024, hardware_of("h100-1024", 1024), 0.5)
    between = 50_000 * 3600 / 1024
    wait = 12 * 125e6 / 1024 / 2e10
    expected = 1 / (1 + wait / 3600 + (1800 + 300) / between)
    assert goodput.fraction == pytest.approx(expected)
    assert goodput.best_interval_seconds == pytest.approx(math.sqrt(2 * wait * between))


def test_without_checkpoints_every_failure_begins_anew() -> None:
    """As many hours as lie between two failures: (e - 1) times as long, and restarts on top."""
    run = lstm()
    policy = run.checkpoint.model_copy(update={"every_steps": None, "every_seconds": None})
    run = run.model_copy(update={"checkpoint": policy})
    hardware = hardware_of("h100-1024", 1024)
    assert hardware.failures is not None
    between = hardware.failures.mean_hours_between * 3600 / 1024
    goodput = predict_goodput(run, 10**8, 1024, hardware, between / run.train.total_steps)
    slower = (math.e - 1) * (between + hardware.failures.restart_seconds) / between
    assert goodput.fraction == pytest.approx(1 / slower)
    assert goodput.num_failures == pytest.approx(slower)
    assert "begins anew" in goodput.note
    for_ever = predict_goodput(run, 10**8, 1024, hardware, between)
    assert 0 < for_ever.fraction < 1e-100


@pytest.mark.parametrize(
    ("fields", "share"),
    [({}, (65 / 2) / 64), ({"positions": "alibi"}, 1.0), ({"window_tokens": 16}, 1.0),
     ({"window_tokens": 64}, (65 / 2) / 64)],
)  # fmt: skip
def test_a_mask_as_a_tensor_makes_attention_compute_every_pair(
    fields: dict[str, object], share: float
) -> None:
    """64 tokens see 32.5 on average; an explicit mask skips none of the pairs."""
    tree = {"family": "gpt", "width": 64, "depth": 1, "heads": 1, "max_positions": 64, **fields}
    run = RunConfig.model_validate(
        {"model": tree, "train": {"sequence_tokens": 64, "micro_batch_samples": 1,
                                  "global_batch_tokens": 64, "total_tokens": 64}}
    )  # fmt: skip
    hardware = device(peak_flops_per_second={"fp32": 1e14}, call_seconds=0.0)
    # Two products forward, and four backward at 1.25 times their FLOPs.
    whole = (2 + 4 * FUSED_BACKWARD) * 2.0 * 64 * 64 * 64 / 5e13
    assert step_time(run, 512, 1, hardware).attention == pytest.approx(share * whole)


def test_sums_hide_behind_nothing_at_stage_0_and_the_last_backward_at_stage_1() -> None:
    """One second of backward sums, three seconds of passes in 2 micro-batches: 1 s is backward."""
    sent: dict[When, float] = {"forward": 0.5, "backward": 1.5, "update": 1.0}
    assert hidden_seconds(0, sent, 3.0, 2) == 0.0
    assert hidden_seconds(1, sent, 3.0, 2) == pytest.approx(1.0)
    assert hidden_seconds(1, sent, 30.0, 2) == pytest.approx(1.5)
    assert hidden_seconds(3, sent, 3.0, 2) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"input_feeding": True}, {"attention": "additive"}, {"attention": "dot"},
        {"attention": "none"}, {"cell": "gru"}, {"cell": "min_lstm"}, {"hidden_width": 96},
        {"window_tokens": 16}, {"backbone": "vanilla", "feed_forward": False, "attention": "none"},
    ],
    ids=str,
)  # fmt: skip
def test_every_recurrent_model_has_a_step_whose_parts_are_there(fields: dict[str, object]) -> None:
    """A scan has no recurrent steps; feeding the input makes attention wait as well."""
    tree = {"family": "lstm_attention", "width": 64, "depth": 2, "max_positions": 64, **fields}
    run = RunConfig.model_validate(
        {"model": tree, "train": {"sequence_tokens": 64, "global_batch_tokens": 16384}}
    )
    step = step_time(run, 512, 2, hardware_of("cpu-2-cores", 2))
    assert step.products > 0
    assert step.between > 0
    assert (step.recurrence == 0) == (fields == {"cell": "min_lstm"})
    attends = fields.get("attention") != "none" and fields != {"input_feeding": True}
    assert (step.attention > 0) == attends
