import time
import tracemalloc

import psutil
import pytest

from pipeline.training.meters import (
    WARMUP_STEPS,
    HostMonitor,
    StepMeter,
    StepTiming,
    WallClock,
    median_and_spread,
)


def timing(step_seconds: float) -> StepTiming:
    return StepTiming(
        step_seconds=step_seconds, data_wait_seconds=0.1, forward_seconds=0.2,
        backward_seconds=0.3, optimizer_seconds=0.05, slowest_rank_ratio=1.5, num_tokens=100,
    )  # fmt: skip


def test_warmup_steps_stay_out_of_the_summary_and_the_number_is_stated() -> None:
    meter = StepMeter(2, 1e6, None)
    for seconds in [50.0] * WARMUP_STEPS + [1.0, 2.0, 4.0]:
        meter.add(timing(seconds))
    summary = meter.summary()
    assert summary["perf/step_seconds"].value == 2.0
    assert summary["perf/step_seconds"].num == 3
    assert summary["perf/step_seconds"].spread == pytest.approx(3.0 - 1.5)
    assert summary["perf/tokens_per_second"].value == 50.0
    assert summary["perf/tokens_per_second_per_worker"].value == 25.0
    assert meter.total_seconds("step_seconds") == 3 * 50.0 + 7.0


def test_traced_steps_count_in_totals_and_not_in_medians() -> None:
    meter = StepMeter(1, 1e6, None)
    for seconds in [9.0] * WARMUP_STEPS + [1.0, 2.0, 3.0]:
        meter.add(timing(seconds))
    meter.add(timing(50.0), is_traced=True)
    assert meter.window()["perf/step_seconds"] == 2.0
    assert meter.summary()["perf/step_seconds"].num == 3
    assert meter.total_seconds("step_seconds") == 3 * 9.0 + 6.0 + 50.0
    meter.add(timing(50.0), is_traced=True)
    assert meter.window() == {}


def test_unknown_hardware_gives_no_utilisation() -> None:
    meter = StepMeter(1, 1e6, None)
    for _ in range(WARMUP_STEPS + 1):
        meter.add(timing(1.0))
    assert "perf/mfu_fraction" not in meter.summary()


def test_utilisation_is_flops_over_the_peak_of_all_ranks() -> None:
    meter = StepMeter(2, 1e6, 1e9)
    for _ in range(WARMUP_STEPS + 1):
        meter.add(timing(1.0))
    assert meter.summary()["perf/mfu_fraction"].value == pytest.approx(100 * 1e6 / 2e9)


def test_window_covers_the_steps_since_the_last_one() -> None:
    meter = StepMeter(1, 1e6, None)
    meter.add(timing(9.0))
    assert meter.window()["perf/step_seconds"] == 9.0
    for seconds in (8.0, 7.0, 1.0, 3.0, 2.0):
        meter.add(timing(seconds))
    assert meter.window()["perf/step_seconds"] == 2.0
    meter.add(timing(5.0))
    assert meter.window()["perf/step_seconds"] == 5.0


def test_a_long_run_keeps_a_few_numbers_a_step() -> None:
    meter = StepMeter(1, 1e6, None)
    tracemalloc.start()
    for _ in range(10_000):
        meter.add(timing(1.0))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Seven doubles, and the room that a growing array keeps.
    assert held / 10_000 < 80


def test_seconds_of_steps_are_split_by_what_they_went_into() -> None:
    meter = StepMeter(1, 1e6, None)
    for seconds in [9.1, 1.1, 2.1, 4.1]:
        meter.add(timing(seconds))
    meter.add(timing(3.1), is_applied=False)
    meter.lose(0.5)
    spent = meter.spent()
    # Of 19.5 s, 0.1 s a step were spent waiting; the median of the steps after the first is 2.5 s.
    assert spent == pytest.approx(
        {"data_wait": 0.5, "first_step": 6.5, "skipped": 3.0, "lost": 0.5, "train": 9.0}
    )
    assert sum(spent.values()) == pytest.approx(meter.total_seconds("step_seconds"))


def test_first_step_alone_has_no_excess() -> None:
    meter = StepMeter(1, 1e6, None)
    assert sum(meter.spent().values()) == 0.0
    meter.add(timing(9.1))
    assert meter.spent()["first_step"] == 0.0


def test_attempt_of_warmup_steps_only_has_no_summary() -> None:
    meter = StepMeter(1, 1e6, None)
    meter.add(timing(1.0))
    assert meter.summary() == {}


def test_single_measurement_has_no_spread() -> None:
    spread = median_and_spread([3.0])
    assert (spread.value, spread.num, spread.spread) == (3.0, 1, None)


def test_wall_clock_adds_up_to_the_wall_time() -> None:
    clock = WallClock()
    with clock.phase("eval"):
        time.sleep(0.02)
    clock.mark_start()
    with clock.phase("eval"):
        time.sleep(0.01)
    spent = clock.spent()
    assert spent["eval"] >= 0.03
    assert 0.0 < spent["init"] < spent["wall"] - 0.03
    assert sum(v for k, v in spent.items() if k != "wall") == pytest.approx(spent["wall"])


def test_host_monitor_measures_this_host() -> None:
    values = HostMonitor().values()
    assert 0.0 <= values["system/cpu_fraction"] <= 1.0
    assert 0 < values["system/memory_available_bytes"] < psutil.virtual_memory().total
