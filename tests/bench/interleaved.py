"""From arms that do one thing each to the seconds of each, taken in turns, and their ratios.

A round visits every arm once, and the next round in the other order (A B B A), so that a drift of
the machine falls on all arms alike. Ratios are taken within a round, then their median.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def time_rounds(
    arms: Mapping[str, Callable[[], object]],
    num_rounds: int,
    warmup_rounds: int = 2,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Time every arm once a round.

    Args:
        arms: Name to what is timed.
        num_rounds: Timed rounds.
        warmup_rounds: Rounds before them.
        before: What is done before an arm of that name, untimed.

    Returns:
        Seconds of each arm by round, and seconds of the processor in this process, which other
        processes disturb less.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(warmup_rounds + num_rounds):
        for name in arms if number % 2 == 0 else reversed(list(arms)):
            if before is not None and name in before:
                before[name]()
            begin, cpu_begin = time.perf_counter(), time.process_time()
            arms[name]()
            spent, cpu_spent = time.perf_counter() - begin, time.process_time() - cpu_begin
            if number >= warmup_rounds:
                seconds[name].append(spent)
                cpu_seconds[name].append(cpu_spent)
    return seconds, cpu_seconds


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """Give the median, the quartiles and the number of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "quartiles": [low, high], "num": len(values)}


def ratios(seconds: Mapping[str, Sequence[float]], name: str, base: str) -> dict[str, Any]:
    """Summarise how long one arm takes against another of the same round."""
    return summarise([a / b for a, b in zip(seconds[name], seconds[base], strict=True)])
