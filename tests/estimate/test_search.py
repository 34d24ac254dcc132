"""Search, advice and sweeps: layouts that fit, what to change, where a recurrence bites."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.batching import plan_batches
from pipeline.config.load import load_run
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.estimate.forecast import Machines, forecast, predict_fit
from pipeline.estimate.search import (
    EQUAL_FRACTION,
    advise,
    layout_of,
    layouts,
    search,
    with_layout,
)
from pipeline.estimate.step_time import step_time
from pipeline.estimate.sweep import CHAIN_BITES_FRACTION, parse_range, sweep
from tests.estimate.published import LLAMA_8B, MPT, MPT_SHAPES, gpt, hardware_of

RUNS = Path(__file__).resolve().parents[2] / "configs" / "run"
VOCABULARY = 50304


def machines(cluster: str, num_ranks: int) -> Machines:
    return Machines(hardware=hardware_of(cluster, num_ranks), num_ranks=num_ranks)


def recipe(family: str, global_batch_tokens: int = 512 * 1024) -> RunConfig:
    run = load_run(RUNS / f"{family}_125m_fineweb10b.yaml")
    train = run.train.model_copy(update={"global_batch_tokens": global_batch_tokens})
    return run.model_copy(update={"train": train})


def test_layouts_change_nothing_that_is_trained() -> None:
    run = recipe("gpt")
    found = list(layouts(run, 8))
    assert len(found) == len({*found}) == 7 * 4 * 2
    for layout in found:
        changed = with_layout(run, layout)
        plan = plan_batches(changed.train, 8)
        assert plan.global_batch_tokens == run.train.global_batch_tokens
        assert changed.model == run.model


@pytest.mark.parametrize("family", ["gpt", "lstm"])
def test_the_layout_found_is_as_fast_as_any_that_fits(family: str) -> None:
    """Against all of them, timed one by one."""
    run, where = recipe(family), machines("h100-8", 8)
    best = search(run, VOCABULARY, where)
    assert best is not None
    assert best.fit.is_enough
    seconds = [
        step_time(changed, VOCABULARY, 8, where.hardware).seconds
        for layout in layouts(run, 8)
        if predict_fit(changed := with_layout(run, layout), VOCABULARY, where).is_enough
    ]
    assert best.step.seconds <= min(seconds) * (1 + EQUAL_FRACTION)


def test_a_stage_that_a_run_states_for_one_rank_is_tried_as_well() -> None:
    run = with_layout(recipe("gpt"), replace(layout_of(recipe("gpt")), zero_stage=3))
    assert {layout.zero_stage for layout in layouts(run, 1)} == {0, 1, 3}


def test_a_recurrence_wants_the_largest_micro_batch() -> None:
    """Latency of its steps is shared by the samples of a micro-batch."""
    best = search(recipe("lstm"), VOCABULARY, machines("h100-8", 8))
    assert best is not None
    assert best.accumulation_steps == 1


def test_a_layout_that_is_as_good_stays_as_stated() -> None:
    where = machines("h100-8", 8)
    best = search(recipe("gpt"), VOCABULARY, where)
    assert best is not None
    again = search(with_layout(recipe("gpt"), best.layout), VOCABULARY, where)
    assert again is not None
    assert again.layout == best.layout


def test_what_a_large_model_needs_to_fit_is_said() -> None:
    """MPT 7B unsharded: 16 bytes a parameter are 107 GB, above the 85.5 GB of an H100."""
    run = gpt(MPT_SHAPES["7b"], 2048, (6, 1, 8), stage=0, **MPT)
    where = machines("h100-8", 8)
    found = forecast(run, 50368, where)
    assert not found.fit.is_enough
    advice = advise(run, 50368, where, search(run, 50368, where))
    assert advice.best is not None
    assert advice.best.layout.zero_stage > 0
    singles = dict(advice.single)
    # One sample or checkpointing alone leave the 107 GB, a stage takes 7/8 of most of them away.
    assert [override[:-1] for override in singles] == ["zero.stage="]
    assert all(fit.needed_bytes < 85.5e9 for fit in singles.values())


def test_a_run_that_fits_on_more_ranks_only_says_on_how_many() -> None:
    """Llama 8B on one 24 GB GPU: 16 bytes a parameter are 128 GB."""
    run = gpt((4096, 32, 32), 2048, (1, 64, 1), **LLAMA_8B)
    where = machines("gpu-24gb", 1)
    advice = advise(run, 128256, where, search(run, 128256, where))
    assert advice.single == []
    assert advice.best is None
    assert advice.least_bytes > where.memory_bytes
    assert advice.num_ranks in (8, 16, 32)
    enough = replace(where, num_ranks=advice.num_ranks)
    smallest = replace(
        layout_of(run), micro_batch_samples=1, zero_stage=3, activation_checkpointing=True
    )
    assert predict_fit(with_layout(run, smallest), 128256, enough).is_enough


def test_a_run_that_fits_nowhere_has_no_number_of_ranks() -> None:
    """One sample in the global batch cannot be cut over ranks."""
    run = gpt((4096, 32, 32), 2048, (1, 1, 1), **LLAMA_8B)
    where = machines("gpu-24gb", 1)
    advice = advise(run, 128256, where, search(run, 128256, where))
    assert (advice.single, advice.best, advice.num_ranks) == ([], None, None)


def test_more_ranks_than_devices_are_refused() -> None:
    where = Machines(hardware=hardware_of("h100-8", 8), num_ranks=16)
    with pytest.raises(ConfigError, match="nearest: 8 ranks"):
        forecast(recipe("gpt"), VOCABULARY, where)


def test_a_batch_that_does_not_divide_names_the_nearest_ranks() -> None:
    run = recipe("gpt", 12 * 1024)
    with pytest.raises(ConfigError, match="do not divide over 8 ranks; nearest: 6 ranks"):
        search(run, VOCABULARY, machines("h100-8", 8))


def test_cost_is_hours_times_devices_times_price() -> None:
    """24 USD an hour for 8 H100; none where no price is stated."""
    run = recipe("gpt")
    found = forecast(run, VOCABULARY, machines("h100-8", 8))
    assert found.cost is not None
    assert found.cost.amount == pytest.approx(24.0 * found.seconds / 3600)
    assert forecast(run, VOCABULARY, machines("a100-8", 8)).cost is None


@pytest.mark.parametrize(
    ("text", "counts"),
    [("nodes=1..128", [1, 2, 4, 8, 16, 32, 64, 128]), ("nodes=3..7", [3, 6, 7]),
     ("nodes=8,1,2", [1, 2, 8]), ("nodes=4..4", [4])],
)  # fmt: skip
def test_a_range_doubles_from_its_first_to_its_last(text: str, counts: list[int]) -> None:
    assert parse_range(text) == counts


@pytest.mark.parametrize("text", ["1..8", "nodes=8..1", "nodes=0..4", "nodes=", "gpus=1..2"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--sweep"):
        parse_range(text)


def test_a_sweep_to_1024_gpus_shows_where_the_chain_bites_in_under_two_seconds() -> None:
    """Strong scaling: the recurrence stops at its latency, the Transformer does not."""
    runs = {"gpt": recipe("gpt", 2**22), "lstm": recipe("lstm", 2**22)}
    started = time.process_time()
    sizes = dict.fromkeys(runs, VOCABULARY)
    found = sweep(runs, sizes, hardware_of("h100-1024", 1024), parse_range("nodes=1..128"))
    assert time.process_time() - started < 2.0
    assert len(found.points) == 2 * 2 * 8
    assert not found.gaps
    assert found.of("gpt", "strong")[-1].num_ranks == 1024
    bite = found.bites_at("lstm")
    assert bite is not None
    assert bite.accumulation_steps == 1
    assert bite.least_seconds > CHAIN_BITES_FRACTION * bite.step.seconds
    assert found.bites_at("gpt") is None
    for label in runs:
        weak, strong = found.of(label, "weak"), found.of(label, "strong")
        assert weak[-1].efficiency_fraction > strong[-1].efficiency_fraction
        assert all(point.efficiency_fraction <= 1.001 for point in (*weak, *strong))


def test_hosts_over_which_a_batch_does_not_divide_are_gaps_with_a_reason() -> None:
    found = sweep(
        {"gpt": recipe("gpt", 8 * 1024)}, {"gpt": VOCABULARY}, hardware_of("h100-64", 64), [1, 2, 4]
    )
    assert [point.num_nodes for point in found.of("gpt", "weak")] == [1, 2, 4]
    assert [point.num_nodes for point in found.of("gpt", "strong")] == [1]
    assert [gap.num_nodes for gap in found.gaps] == [2, 4]
    assert "do not divide over 16 ranks" in found.gaps[0].reason
