"""The result of a study says what its records hold."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.errors import ConfigError
from pipeline.study.analyze import analyze
from pipeline.study.execute import report_study
from pipeline.study.records import entropy_nats, measure_unigram, read_records
from pipeline.study.series import bin_positions, by_world_size, loss_curve, step_times
from pipeline.tracking.metrics import METRICS
from tests.study.conftest import GAP_NATS, LENGTHS, NUM_STEPS, StudyOnDisk, loss_at

WriteStudy = Callable[..., StudyOnDisk]


def test_a_complete_study_finds_the_differences_that_were_put_in(write_study: WriteStudy) -> None:
    result = analyze(read_records(write_study().directory))
    assert result.status == "complete"
    assert result.missing == {}
    (comparison,) = result.comparisons
    assert (comparison.label, comparison.reference) == ("lstm_attention", "gpt")
    assert comparison.loss_difference.value == pytest.approx(GAP_NATS)
    assert not comparison.is_tie
    slopes = {f.label: f.step_time_slope for f in result.families}
    assert slopes["gpt"] is not None
    assert slopes["gpt"].value == pytest.approx(0.5)
    assert slopes["lstm_attention"] is not None
    assert slopes["lstm_attention"].value == pytest.approx(0.0, abs=1e-9)
    assert comparison.step_time_slope_difference is not None
    assert comparison.step_time_slope_difference.value == pytest.approx(-0.5)
    for family in result.families:
        assert family.position_slope is not None
        assert family.position_slope.value == pytest.approx(-0.1)


def test_families_compare_with_the_reference_of_the_match(write_study: WriteStudy) -> None:
    families = {
        "gpt": {"model": {"family": "gpt", "depth": 2}},
        "lstm_attention": {"model": {"family": "lstm_attention", "width": 32, "depth": 2}},
    }
    fields = {"families": families, "match": {"reference": "lstm_attention"}}
    directory = write_study(fields=fields).directory
    (comparison,) = report_study(directory).comparisons
    assert (comparison.label, comparison.reference) == ("gpt", "lstm_attention")
    assert comparison.loss_difference.value == pytest.approx(-GAP_NATS)
    assert (directory / "figures" / "position-gap-gpt.json").exists()


def test_a_difference_below_the_published_noise_is_a_tie(write_study: WriteStudy) -> None:
    result = analyze(read_records(write_study(gap_nats=0.03).directory))
    assert result.comparisons[0].is_tie
    assert "call it a tie" in result.headline[0]


def test_several_seeds_give_intervals_of_paired_differences(write_study: WriteStudy) -> None:
    result = analyze(read_records(write_study(gap_nats=0.3, seeds=(0, 1, 2)).directory))
    (comparison,) = result.comparisons
    # Differences 0.3, 0.4, 0.5: standard deviation 0.1, t(0.975, 2) = 4.3027.
    assert comparison.loss_difference.value == pytest.approx(0.4)
    assert comparison.loss_difference.half_width == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert not comparison.is_tie
    assert "(3 seeds each)" in result.headline[0]
    assert "one seed" not in result.headline[0]


def test_a_small_difference_whose_interval_excludes_zero_is_no_tie(
    write_study: WriteStudy,
) -> None:
    study = write_study(gap_nats=0.03, seed_nats=0.001, seeds=(0, 1, 2))
    result = analyze(read_records(study.directory))
    assert result.comparisons[0].loss_difference.value == pytest.approx(0.031)
    assert not result.comparisons[0].is_tie
    # t(0.975, 2) * 0.001 / sqrt(3) = 0.0025.
    assert "The Transformer is better by 0.031 ± 0.002 nats" in result.headline[0]
    assert "Kaplan" not in result.headline[0]


def test_a_slope_over_positions_has_its_interval_over_the_seeds(write_study: WriteStudy) -> None:
    result = analyze(read_records(write_study(seeds=(0, 1, 2)).directory))
    slopes = {family.label: family.position_slope for family in result.families}
    assert slopes["gpt"] is not None
    assert slopes["gpt"].half_width == pytest.approx(0.0, abs=1e-9)
    own, difference = slopes["lstm_attention"], result.comparisons[0].position_slope_difference
    assert own is not None
    assert difference is not None
    # Slopes -0.10, -0.11, -0.12: standard deviation 0.01, t(0.975, 2) = 4.3027.
    assert own.value == pytest.approx(-0.11)
    assert own.half_width == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert (difference.value, difference.num) == (pytest.approx(-0.01), 3)
    assert difference.half_width == pytest.approx(own.half_width)
    (finding,) = [line for line in result.headline if line.startswith("Context")]
    assert "the interval over 3 seeds covers zero" in finding


def test_one_seed_gives_no_verdict_about_context(write_study: WriteStudy) -> None:
    # Under seed 1 the positions lie exactly on lines of slopes -0.10 and -0.11.
    result = analyze(read_records(write_study(seeds=(1,)).directory))
    difference = result.comparisons[0].position_slope_difference
    assert difference is not None
    assert difference.excludes_zero
    (finding,) = [line for line in result.headline if line.startswith("Context")]
    assert "the scatter of the positions around the line, not that of runs" in finding
    assert "do not settle which family gains more" in finding


def test_families_on_samples_of_two_lengths_have_no_common_positions(
    write_study: WriteStudy,
) -> None:
    families = {
        "gpt": {"model": {"family": "gpt", "width": 32, "depth": 2}},
        "lstm_attention": {
            "model": {"family": "lstm_attention", "depth": 2},
            "train": {"sequence_tokens": 128, "micro_batch_samples": 1},
        },
    }
    directory = write_study(fields={"families": families}).directory
    assert report_study(directory).comparisons[0].position_slope_difference is None
    assert not (directory / "figures" / "position-gap-lstm_attention.json").exists()


def test_a_difference_whose_interval_covers_zero_is_a_tie(write_study: WriteStudy) -> None:
    result = analyze(read_records(write_study(gap_nats=0.0, seeds=(0, 1, 2)).directory))
    assert result.comparisons[0].loss_difference.value == pytest.approx(0.1)
    assert result.comparisons[0].is_tie
    assert "covers zero" in result.headline[0]


def test_a_family_that_left_the_study_leaves_its_results_too(write_study: WriteStudy) -> None:
    study = write_study()
    path = study.directory / "study.yaml"
    tree = yaml.safe_load(path.read_text())
    del tree["families"]["lstm_attention"]
    path.write_text(yaml.safe_dump(tree))
    result = analyze(read_records(study.directory))
    assert [family.label for family in result.families] == ["gpt"]
    assert result.status == "complete"
    assert result.comparisons == []
    assert result.wall_time.training_step_seconds == pytest.approx(20.0)


def test_a_missing_cell_makes_the_study_partial_and_is_named(write_study: WriteStudy) -> None:
    result = analyze(read_records(write_study(without=("lstm_attention-seed0",)).directory))
    assert result.status == "partial"
    assert result.missing == {"lstm_attention-seed0": "rank 1 was killed"}
    family = next(f for f in result.families if f.label == "lstm_attention")
    assert family.loss is None
    assert family.step_time_slope is not None
    assert result.comparisons == []


def test_a_study_without_any_result_is_partial_and_finds_nothing(write_study: WriteStudy) -> None:
    study = write_study()
    names = tuple(cell.name for cell in study.plan.cells)
    for name in names:
        (study.directory / "runs" / name / "result.json").unlink()
    result = analyze(read_records(study.directory))
    assert result.status == "partial"
    assert set(result.missing) == set(names)
    assert result.headline == []
    assert result.baseline is None


def test_a_family_above_the_unigram_entropy_fails_the_study(write_study: WriteStudy) -> None:
    study = write_study(gap_nats=5.0)
    result = analyze(read_records(study.directory))
    assert result.status == "failed"
    failed = [check for check in result.checks if not check.passed]
    assert [check.name for check in failed] == ["lstm_attention_beats_unigram"]
    assert "NOT below" in failed[0].text


def test_the_unigram_entropy_is_that_of_the_validation_tokens(write_study: WriteStudy) -> None:
    study = write_study()
    baseline = measure_unigram(study.manifest.directory, sequence_tokens=4)
    # The first token of the split is no label.
    raw = np.fromfile(study.manifest.directory / "validation-00000.bin", dtype="<u2")[1:]
    shares = [np.mean(raw == token) for token in set(raw.tolist())]
    expected = -sum(share * math.log(share) for share in shares)
    assert baseline.unigram_entropy_nats == pytest.approx(expected)
    assert baseline.validation_tokens == len(raw)


def test_the_entropy_of_equal_counts_is_the_logarithm_of_their_number() -> None:
    assert entropy_nats(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))


def test_the_wall_time_is_split_into_steps_and_the_rest(write_study: WriteStudy) -> None:
    wall = analyze(read_records(write_study().directory)).wall_time
    # Five cells of 30 s; two runs with 20 s of steps; 0.2 s of warm-up for each of the 8 arms.
    assert wall.total_seconds == pytest.approx(150.0)
    assert wall.training_step_seconds == pytest.approx(40.0)
    gpt = sum(0.1 * (1 + 0.01 * n) * (t / 32) ** 0.5 for n in range(6) for t in LENGTHS)
    lstm = sum(0.1 * (1 + 0.01 * n) for n in range(6) for _ in LENGTHS)
    assert wall.timed_step_seconds == pytest.approx(gpt + lstm + 8 * 0.2)
    assert wall.step_fraction == pytest.approx((40.0 + gpt + lstm + 1.6) / 150.0)


def test_summaries_use_known_metrics_and_their_own_axes(write_study: WriteStudy) -> None:
    result = analyze(read_records(write_study().directory))
    points = result.summaries["gpt"]
    assert {point.metric for point in points} <= METRICS.keys()
    times = {p.step: p.value for p in points if p.metric == "scaling/step_seconds"}
    assert sorted(times) == list(LENGTHS)
    assert times[128] == pytest.approx(2 * times[32])
    states = {p.step: p.value for p in points if p.metric == "scaling/model_state_bytes_zero3"}
    assert states == {1: 20_000.0, 2: 10_000.0}


def test_every_scaling_metric_has_points_in_the_summary(write_study: WriteStudy) -> None:
    study = write_study(timed_workers=(1, 2))
    points = analyze(read_records(study.directory)).summaries["lstm_attention"]
    assert {p.metric for p in points} == {name for name in METRICS if name.startswith("scaling/")}
    axes = [(point.metric, point.step) for point in points]
    assert len(axes) == len(set(axes))


def test_step_times_of_several_world_sizes_stay_apart(write_study: WriteStudy) -> None:
    both = analyze(read_records(write_study(timed_workers=(1, 2)).directory))
    points = both.summaries["gpt"]
    times = {p.step: p.value for p in points if p.metric == "scaling/step_seconds"}
    # On two ranks 0.1 s at 32 tokens, and the median of the rounds' 1 to 1.05 times that.
    assert times[32] == pytest.approx(0.1 * 1.025)
    # At 256 tokens the square root of 8 times as much; on one rank twice that.
    ranks = {p.step: p.value for p in points if p.metric == "scaling/step_seconds_by_ranks"}
    assert ranks == pytest.approx({1: 0.205 * 8**0.5, 2: 0.1025 * 8**0.5})
    rates = {p.step: p.value for p in points if p.metric == "scaling/tokens_per_second_by_ranks"}
    assert rates == pytest.approx({n: 512 / seconds for n, seconds in ranks.items()})


def test_the_finding_about_step_time_is_that_of_the_largest_world_size(
    write_study: WriteStudy,
) -> None:
    one = analyze(read_records(write_study(timed_workers=(2,)).directory))
    both = analyze(read_records(write_study(timed_workers=(1, 2)).directory))
    assert both.headline == one.headline
    (finding,) = [line for line in both.headline if line.startswith("Sequence length")]
    assert "on 2 ranks" in finding
    assert re.search(r"from 10[23] ms to 290 ms", finding)
    # What was spent counts at every world size.
    assert both.wall_time.timed_step_seconds > 2 * one.wall_time.timed_step_seconds


def test_world_sizes_compare_at_the_longest_common_length_with_equal_steps(
    write_study: WriteStudy,
) -> None:
    records = read_records(write_study(timed_workers=(1, 2)).directory)
    times = [t for t in step_times(records.probes.values()) if t.label == "gpt"]
    partly = [t for t in times if t.world_size == 2 or t.sequence_tokens <= 64]
    assert [(t.world_size, t.sequence_tokens) for t in by_world_size(partly)] == [(1, 64), (2, 64)]
    other = [replace(t, tokens_per_step=256) if t.world_size == 1 else t for t in times]
    assert [t.world_size for t in by_world_size(other)] == [2]
    assert by_world_size([]) == []


def test_validation_curves_have_tokens_and_seconds_though_events_state_none(
    write_study: WriteStudy,
) -> None:
    records = read_records(write_study().directory)
    curve = loss_curve(records.runs["gpt-seed0"], "eval")
    assert curve.steps == [10, 20, 30, 40]
    assert curve.tokens == [2560.0, 5120.0, 7680.0, 10240.0]
    assert curve.seconds == pytest.approx([5.0, 10.0, 15.0, 20.0], abs=0.2)
    assert curve.loss[-1] == pytest.approx(loss_at(NUM_STEPS, 0.0))


def test_bins_of_positions_cover_every_position_once() -> None:
    bins = bin_positions([float(t) for t in range(1, 101)])
    covered = [t for b in bins for t in range(b.first, b.last + 1)]
    assert covered == list(range(1, 101))
    first_bins = [(1, 1), (2, 2), (3, 3), (4, 5), (6, 7), (8, 11)]
    assert [(b.first, b.last) for b in bins[:6]] == first_bins
    assert bins[5].loss.value == pytest.approx(9.5)
    # Only bins of eight positions or more have an interval; a short rest joins the last bin.
    assert [b.last - b.first + 1 >= 8 for b in bins] == [
        b.loss.half_width is not None for b in bins
    ]
    assert (bins[-1].first, bins[-1].last) == (64, 100)


def test_a_directory_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no study\.yaml"):
        read_records(tmp_path)
