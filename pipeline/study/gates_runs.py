"""What the checks of gates share: a case, its finding, and tests of one fact over runs."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.config.claims import ArmConfig
from pipeline.study.evidence import Measurement, RunFacts

MAX_NAMED_RUNS = 6
"""Runs that a sentence names before it counts the rest; the result lists all."""

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement before its gates."""

    measurement: Measurement
    runs: Sequence[RunFacts]
    """Facts of its runs."""
    arms: Mapping[str, ArmConfig]
    """The arms that the hypothesis needs."""
    known: frozenset[str]
    """Names of all runs whose facts are there."""

    def by_cell(self) -> dict[str, list[RunFacts]]:
        """Group the runs by cell: those that differ in their seed alone."""
        return group(self.runs, lambda run: f"{run.arm}/{run.cell}")

    def by_arm(self) -> dict[str, list[RunFacts]]:
        """Group the runs by arm."""
        return group(self.runs, lambda run: run.arm)

    def by_match(self) -> dict[str, list[RunFacts]]:
        """Group the runs that were matched with each other."""
        return group(self.runs, lambda run: run.match_group)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is wrong; empty where nothing is."""

    text: str = ""
    runs: tuple[str, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Whether the gate passes."""
        return not self.text

    @property
    def sentence(self) -> str:
        """The text with the runs that it is about."""
        if self.is_clean:
            return "passed"
        named = list(self.runs[:MAX_NAMED_RUNS])
        rest = len(self.runs) - len(named)
        if rest:
            named.append(f"{rest} more")
        return f"{self.text} ({', '.join(named)})" if named else self.text


def group(runs: Iterable[RunFacts], key: Callable[[RunFacts], str]) -> dict[str, list[RunFacts]]:
    """Group runs by a key, in the order of their first appearance."""
    groups: dict[str, list[RunFacts]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return dict(groups)


def check_each(
    runs: Sequence[RunFacts],
    wanted: str,
    read: Callable[[RunFacts], Value | None],
    passes: Callable[[Value], bool],
) -> Finding:
    """Require a fact of every run.

    Args:
        runs: The runs that it is asked of.
        wanted: What is required, for people.
        read: Gives the fact, None where it was not recorded.
        passes: Whether its value is in order.
    """
    if not runs:
        return Finding(text=f"needs {wanted}; no run records it")
    found = [(run.run, read(run)) for run in runs]
    wrong = [(name, value) for name, value in found if value is None or not passes(value)]
    if not wrong:
        return Finding()
    values = sorted({"not recorded" if value is None else show(value) for _, value in wrong})
    return Finding(
        text=f"needs {wanted}; got {', '.join(values)}", runs=tuple(name for name, _ in wrong)
    )


def check_equal(
    runs: Sequence[RunFacts], what: str, read: Callable[[RunFacts], Any | None]
) -> Finding:
    """Require that all runs record one and the same value, naming each that they have instead."""
    found = group(runs, lambda run: "not recorded" if (v := read(run)) is None else show(v))
    if len(found) == 1 and "not recorded" not in found:
        return Finding()
    if not found:
        return Finding(text=f"needs one {what}; no run records it")
    texts = [f"{value} in {len(own)} runs" for value, own in found.items()]
    rare = min(found.values(), key=len)
    return Finding(
        text=f"needs one {what}; got {', '.join(texts)}", runs=tuple(r.run for r in rare)
    )


def show(value: object) -> str:
    """Give a value for people: numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
