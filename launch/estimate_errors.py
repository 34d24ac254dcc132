"""From errors of finished runs, or of published ones, to what `estimate` says of its own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.estimate.forecast import Machines
    from pipeline.tracking.expectation import TypicalError

SAID = {"step": "time of a step", "peak": "peak memory", "state": "model state"}
"""What a person reads for each quantity that finished runs compare."""


def error_lines(machines: "Machines", family: str, errors: "Sequence[TypicalError]") -> list[str]:
    """Say what the marks mean and how far off the model has been.

    Args:
        machines: Where the run is to be.
        family: Of its model.
        errors: Of finished runs of this family on such a device; without any, what the page says.
    """
    from pipeline.estimate import forecast

    lines = ["= counted, ~ modelled (docs/estimate.md)"]
    told = [
        f"{SAID[error.quantity]} {error.median_fraction:.1%} (largest {error.largest_fraction:.0%}"
        f", {error.num_runs} runs)"
        for error in errors
    ]
    if told:
        return [*lines, f"{family} runs here were off, at the median: {', '.join(told)}"]
    if machines.hardware.kind == "cpu":
        off = f"{forecast.MEASURED_ERROR_FRACTION:.0%} off at the median of runs on such a CPU"
    elif family == "gpt":
        off = (
            f"{forecast.PUBLISHED_ERROR_FRACTION:.0%} off at the median of published runs, "
            f"{forecast.FOREIGN_ERROR_FRACTION:.0%} of new systems"
        )
    else:
        return [*lines, "speed of this family was compared with no run on a GPU: none is published"]
    return [*lines, f"speed was {off}"]


def error_facts(errors: "Sequence[TypicalError]") -> dict[str, Any]:
    """Give the errors of finished runs as plain values."""
    return {
        error.quantity: {
            "median_fraction": error.median_fraction,
            "largest_fraction": error.largest_fraction,
            "num_runs": error.num_runs,
        }
        for error in errors
    }
