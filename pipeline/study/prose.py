"""The words of a report around its numbers: how to read them, and what they cannot show."""

from pipeline.study.differences import list_differences
from pipeline.study.headline import NOISE_TEXT
from pipeline.study.outcome import StudyResult, WallTime
from pipeline.study.records import StudyRecords
from pipeline.study.wording import QUANTITIES, say_count, say_list, say_ranks, say_seconds


def subtitle(result: StudyResult, records: StudyRecords) -> str:
    """Say in one line what was compared, on how much text and on which ranks."""
    names = say_list([family.display_name for family in result.families])
    runs = list(records.runs.values())
    if not runs:
        return f"{names}: no training run has finished."
    tokens = say_count(max(run.result.tokens for run in runs))
    world_size = max(run.result.world_size for run in runs)
    machine = runs[0].result.environment.get("device")
    if machine == "cpu":
        machine = runs[0].result.environment.get("cpu_model", "a CPU")
    where = say_ranks(world_size)
    seeds = len(records.study.seeds)
    return (
        f"{names}, {tokens} training tokens a run, {seeds} seed{'s' if seeds > 1 else ''}, "
        f"{where}{f' on {machine}' if machine else ''}."
    )


def say_wall_time(wall: WallTime) -> str:
    """Say which share of the time went into training and timed steps."""
    fraction = wall.step_fraction
    assert fraction is not None
    steps = wall.training_step_seconds + wall.timed_step_seconds
    return (
        f"{fraction:.0%} of {say_seconds(wall.total_seconds)} went into optimizer steps: "
        f"{say_seconds(wall.training_step_seconds)} into training and "
        f"{say_seconds(wall.timed_step_seconds)} into warm-up and timed steps of the probes, "
        f"together {say_seconds(steps)}. Every cell starts fresh processes, so that no state leaks "
        f"from one to the next; their start is part of the rest."
    )


def how_to_read(result: StudyResult, records: StudyRecords) -> list[str]:
    """Explain units, intervals and the comparison."""
    points = [
        "Losses are nats per token over all validation tokens, after the learning rate schedule "
        "has ended. Bits per byte take the loss of the text's tokens alone, without those that end "
        "a document, over the raw bytes of the text, so that runs with other tokenizers compare.",
        "A plus-minus is half of a 95% interval. Quartiles and interquartile ranges (IQR) describe "
        "the scatter of single measurements. Where neither stands, there was one measurement.",
        f"Between families with one seed each, a difference below the {NOISE_TEXT} is called a "
        "tie; with several seeds, one whose interval over the seeds covers zero.",
    ]
    match = records.study.match
    if match is not None:
        points.append(
            f"Families are matched in {QUANTITIES[match.quantity]} to the "
            f"{_name(records, match.reference)}, within {match.tolerance_fraction:.0%}."
        )
    if len(result.families) > 1:
        points.append(_say_differences(records))
    if any(family.step_time_slope for family in result.families):
        points.append(
            "The exponent of step time is the slope of its logarithm over that of the sequence "
            "length, at a fixed number of tokens a step: 0 means that longer sequences cost "
            "nothing extra, 1 that a step takes twice as long when the sequence doubles."
        )
    points.append(
        "The arms of the step-time probe take turns inside one group of processes, in an order "
        "that every round reverses. Timed is a whole optimizer step on real tokens, with all ranks "
        "waiting for each other on both sides; building, warm-up and reading are left out."
    )
    return points


def _say_differences(records: StudyRecords) -> str:
    """Say in which fields the runs of the families differ, so that nothing is claimed equal."""
    parts = []
    for field, values in list_differences(records.plan.families).items():
        own = [f"{value} for the {_name(records, label)}" for label, value in values.items()]
        parts.append(f"{field} ({say_list(own)})")
    if not parts:
        return (
            "The families differ in the model alone: every other field of their configs, and the "
            "training loop, are the same."
        )
    return (
        f"Besides the model, the families differ in {say_list(parts)}; every other field of their "
        f"configs, and the training loop, are the same."
    )


def _name(records: StudyRecords, label: str) -> str:
    return records.plan.display_name(label)


def limits(result: StudyResult, records: StudyRecords) -> list[str]:
    """State what the numbers do not support."""
    runs = list(records.runs.values())
    points = []
    if len(records.study.seeds) == 1:
        points.append(
            "One seed: the spread between runs was not measured here, only taken from the "
            "literature. Three or more seeds are needed before a loss difference is a finding."
        )
    if runs:
        size = say_count(runs[0].result.num_parameters.non_embedding)
        tokens = say_count(max(run.result.tokens for run in runs))
        points.append(
            f"One size ({size} non-embedding parameters) and one budget ({tokens} tokens): nothing "
            f"follows about how either family scales with parameters or data."
        )
    if any(run.result.environment.get("device") == "cpu" for run in runs):
        points.append(
            "Speeds are those of a few CPU cores. A CPU has no parallel units that stand idle "
            "while a recurrence waits, so these numbers say nothing about accelerators, where a "
            "step-by-step LSTM is expected to slow down as sequences grow."
        )
    if runs and result.baseline is not None:
        epochs = max(run.result.tokens for run in runs) / result.baseline.train_tokens
        length = max(run.config.train.sequence_tokens for run in runs)
        points.append(
            f"The training text has {say_count(result.baseline.train_tokens)} tokens, which a run "
            f"sees {epochs:.1f} times, in samples of {length}: use of long context needs more text "
            f"and longer samples."
        )
    points += [
        "Learning rates are those that the study states, not the outcome of a full search for each "
        "family; a search may change the order.",
        "Training throughput includes whatever else the machine did; the step-time probe is the "
        "measurement to quote.",
    ]
    return points
