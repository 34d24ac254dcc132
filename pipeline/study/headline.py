"""From the numbers of a study to the sentences that state what was found, and what was not."""

from collections.abc import Sequence

from pipeline.study.fits import Estimate
from pipeline.study.outcome import Comparison, FamilyResult
from pipeline.study.records import StudyRecords
from pipeline.study.series import StateBytes, StepTimes
from pipeline.study.wording import (
    say_bytes,
    say_count,
    say_estimate,
    say_list,
    say_number,
    say_ranks,
    say_seconds,
)

NOISE_NATS = 0.05
"""Difference of two single runs, one seed each, that is not evidence.

Source: Kaplan et al. 2020, appendix D.6: losses of equal runs differ by about 0.05 nats.
"""

NOISE_TEXT = f"{NOISE_NATS} nats that equal runs differ by (Kaplan et al. 2020, appendix D.6)"


def write_headline(
    records: StudyRecords,
    families: Sequence[FamilyResult],
    comparisons: Sequence[Comparison],
    times: Sequence[StepTimes],
    states: Sequence[StateBytes],
) -> list[str]:
    """Write the findings, each a sentence or two with numbers, units, repeats and spread.

    What was not measured is not mentioned. `times` are those of one world size, by length.
    """
    names = {family.label: family.display_name for family in families}
    sentences = []
    for comparison in comparisons:
        pair = (_find(families, comparison.label), _find(families, comparison.reference))
        sentences.append(_say_loss(records, comparison, *pair))
        sentences += _say_throughput(records, comparison, *pair)
        sentences += _say_positions(comparison, *pair)
    sentences += _say_step_time(families, comparisons, times, names)
    sentences += _say_state(states, names)
    return sentences


def _find(families: Sequence[FamilyResult], label: str) -> FamilyResult:
    return next(family for family in families if family.label == label)


def _say_loss(
    records: StudyRecords, comparison: Comparison, own: FamilyResult, reference: FamilyResult
) -> str:
    assert own.loss is not None
    assert reference.loss is not None
    result = records.runs_of(own.label)[0].result
    num_seeds = comparison.loss_difference.num
    seeds = "one seed each" if num_seeds == 1 else f"{num_seeds} seeds each"
    sizes = (
        f"{say_count(reference.non_embedding_parameters)} and "
        f"{say_count(own.non_embedding_parameters)} non-embedding parameters"
    )
    losses = (
        f"{say_estimate(reference.loss, 3)} nats/token for the {reference.display_name} and "
        f"{say_estimate(own.loss, 3)} for the {own.display_name}"
    )
    better = own if comparison.loss_difference.value < 0 else reference
    return (
        f"Loss. After {say_count(result.tokens)} training tokens, at {sizes}, the validation loss "
        f"is {losses} ({seeds}). {_say_verdict(comparison, better.display_name)}"
    )


def _say_verdict(comparison: Comparison, better: str) -> str:
    difference = comparison.loss_difference
    if difference.num == 1 and comparison.is_tie:
        return (
            f"The difference of {say_estimate(difference, 3)} is within the noise, about "
            f"{NOISE_TEXT}: call it a tie."
        )
    if difference.num == 1:
        return (
            f"The {better} is better by {_say_abs(difference)} nats, more than the {NOISE_TEXT}; "
            f"one seed does not settle it."
        )
    if comparison.is_tie:
        return (
            f"The interval of the difference, {say_estimate(difference, 3)}, covers zero: call it "
            f"a tie."
        )
    return (
        f"The {better} is better by {_say_abs(difference)} nats, with the interval over the seeds."
    )


def _say_throughput(
    records: StudyRecords, comparison: Comparison, own: FamilyResult, reference: FamilyResult
) -> list[str]:
    speeds = (own.tokens_per_second, reference.tokens_per_second)
    if comparison.throughput_ratio is None or speeds[0] is None or speeds[1] is None:
        return []
    record = records.runs_of(own.label)[0]
    return [
        f"Speed. In training on {say_ranks(record.result.world_size)} at "
        f"{record.config.train.sequence_tokens} tokens a sequence, the {reference.display_name} "
        f"processes {say_count(speeds[1].value)} and the {own.display_name} "
        f"{say_count(speeds[0].value)} tokens/s (medians over the steps), "
        f"{comparison.throughput_ratio:.2f} times as many. The runs followed each other, so "
        f"whatever else the machine did is in this ratio."
    ]


def _say_positions(comparison: Comparison, own: FamilyResult, reference: FamilyResult) -> list[str]:
    slopes = (own.position_slope, reference.position_slope)
    difference = comparison.position_slope_difference
    if slopes[0] is None or slopes[1] is None or difference is None:
        return []
    num_seeds = comparison.loss_difference.num
    gains_more = own if difference.value < 0 else reference
    if num_seeds == 1:
        verdict = (
            "with one seed each, these intervals are the scatter of the positions around the line, "
            "not that of runs, and do not settle which family gains more from a longer context"
        )
    elif not difference.excludes_zero:
        verdict = (
            f"the interval over {num_seeds} seeds covers zero, so neither is seen to gain more "
            f"from a longer context"
        )
    else:
        verdict = (
            f"over {num_seeds} seeds, the {gains_more.display_name} gains more from a longer "
            f"context"
        )
    return [
        f"Context. From position 16 on, each doubling of the context changes the loss by "
        f"{say_estimate(slopes[1], 3)} nats for the {reference.display_name} and "
        f"{say_estimate(slopes[0], 3)} for the {own.display_name}. On the same validation tokens "
        f"the slopes differ by {say_estimate(difference, 3)}: {verdict}."
    ]


def _say_step_time(
    families: Sequence[FamilyResult],
    comparisons: Sequence[Comparison],
    times: Sequence[StepTimes],
    names: dict[str, str],
) -> list[str]:
    parts = []
    for family in families:
        own = [t for t in times if t.label == family.label]
        if family.step_time_slope is None:
            continue
        first, last = own[0], own[-1]
        parts.append(
            f"from {say_seconds(first.quartiles.median)} to {say_seconds(last.quartiles.median)} "
            f"for the {family.display_name} (exponent {say_estimate(family.step_time_slope, 3)})"
        )
    if not parts:
        return []
    shortest, longest = times[0], times[-1]
    sentence = (
        f"Sequence length. At {say_count(shortest.tokens_per_step)} tokens a step on "
        f"{say_ranks(shortest.world_size)}, going from {shortest.sequence_tokens} to "
        f"{longest.sequence_tokens} tokens a sequence takes the step {say_list(parts)}, medians of "
        f"{len(shortest.step_seconds)} interleaved rounds."
    )
    return [" ".join([sentence, *_say_slope_differences(comparisons, names)])]


def _say_slope_differences(comparisons: Sequence[Comparison], names: dict[str, str]) -> list[str]:
    sentences = []
    for comparison in comparisons:
        difference = comparison.step_time_slope_difference
        if difference is None:
            continue
        if not difference.excludes_zero:
            sentences.append("The exponents do not differ beyond their interval.")
            continue
        steeper = comparison.label if difference.value > 0 else comparison.reference
        sentences.append(
            f"The {names[steeper]} slows down more, by {_say_abs(difference)} in the exponent."
        )
    return sentences


def _say_state(states: Sequence[StateBytes], names: dict[str, str]) -> list[str]:
    if not states:
        return []
    world_size = max(state.world_size for state in states)
    label = states[0].label
    own = {s.zero_stage: s for s in states if s.label == label and s.world_size == world_size}
    if not {0, 3} <= own.keys() or world_size == 1:
        return []
    saved = 1.0 - own[3].total / own[0].total
    largest = max(states, key=lambda s: abs(s.excess_fraction))
    percent = say_number(abs(100 * largest.excess_fraction), 1)
    ranks = say_ranks(largest.world_size)
    where = f" (largest difference: stage {largest.zero_stage} on {ranks})"
    return [
        f"Memory. With {world_size} ranks, ZeRO stage 3 holds {say_bytes(own[3].total)} of model "
        f"state a rank where stage 0 holds {say_bytes(own[0].total)} ({names[label]}), "
        f"{saved:.0%} less. The closed form, which counts DeepSpeed's master weights, is met "
        f"within {percent}%{where if percent != '0.0' else ''}."
    ]


def _say_abs(estimate: Estimate) -> str:
    reach = estimate.half_width
    text = say_number(abs(estimate.value), 3)
    return text if reach is None else f"{text} \N{PLUS-MINUS SIGN} {reach:.3f}"
