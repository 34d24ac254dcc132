"""What a person sees while data is prepared: a table that lives on a terminal, lines elsewhere."""

import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from launch.display import Display, format_seconds
from pipeline.data.progress import PrepareEvent, PrepareTotals

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

LINE_SECONDS = 5.0
"""Least time between two lines where there is no terminal."""
REFRESHES_PER_SECOND = 4
MAX_REASONS = 6
"""Reasons shown while it goes on; the table at the end has all."""
BAR_CHARACTERS = 30
KILO, MEGA, GIGA = 1e3, 1e6, 1e9


class PrepareView:
    """Shows one preparation; use it as a context manager around `prepare`."""

    def __init__(self, display: Display, *, is_whole: bool, indent: str = "") -> None:
        """Begin with nothing shown.

        Args:
            display: The command's display.
            is_whole: Whether preparing is all that the command does: then there is a table, which
                stays. Else one line is enough, which goes.
            indent: Before every line.
        """
        self._display = display
        self._is_whole = is_whole
        self._indent = indent
        self._live: Live | None = None
        self._first: PrepareTotals | None = None
        self._latest: PrepareTotals | None = None
        self._came_at = 0.0
        self._shown_at = 0.0

    @property
    def totals(self) -> PrepareTotals | None:
        """The latest totals; None as long as nothing was tokenized."""
        return self._latest

    def take(self, event: PrepareEvent) -> None:
        """Show an event."""
        if event.totals is None or (event.is_finished and self._latest is None):
            self._display.say(f"{self._indent}{event.message}")
            return
        self._latest, self._came_at = event.totals, time.monotonic()
        if self._first is None:
            self._first = event.totals
            self._begin(event.message)
        elif self._live is None and self._came_at - self._shown_at >= LINE_SECONDS:
            self._shown_at = self._came_at
            self._display.say(f"{self._indent}{self._line()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the table, or take the line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._latest is not None and (self._is_whole or error is not None):
            self._display.show(prepare_table(self._latest, self._latest.seconds, None))

    def _begin(self, message: str) -> None:
        self._display.say(f"{self._indent}{message}")
        self._shown_at = self._came_at
        if self._display.console.is_terminal:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._render,
                console=self._display.console,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
            )
            self._live.start()

    def _render(self) -> "RenderableType":
        from rich.text import Text

        if self._latest is None or not self._is_whole:
            return Text(f"{self._indent}{self._line()}")
        left = self._seconds_left()
        return prepare_table(self._latest, self._elapsed_seconds(), left, MAX_REASONS)

    def _line(self) -> str:
        return "" if self._latest is None else prepare_line(self._latest, self._seconds_left())

    def _elapsed_seconds(self) -> float:
        since = time.monotonic() - self._came_at
        return since if self._latest is None else self._latest.seconds + since

    def _seconds_left(self) -> float | None:
        return None if self._latest is None else seconds_left(self._first, self._latest)


def seconds_left(first: PrepareTotals | None, latest: PrepareTotals) -> float | None:
    """Give the time that is left at the pace of this attempt; None before a split is done.

    Args:
        first: What this attempt found done.
        latest: What is done now.
    """
    num_done = latest.num_splits_done - (first.num_splits_done if first else 0)
    if num_done <= 0 or latest.seconds <= 0:
        return None
    return latest.seconds / num_done * (latest.num_splits - latest.num_splits_done)


def prepare_line(totals: PrepareTotals, left_seconds: float | None) -> str:
    """Give totals as one line of text."""
    parts = [
        f"tokenized {totals.num_splits_done}/{totals.num_splits}",
        f"{totals.documents:,} documents",
        f"{format_bytes(totals.text_bytes)}{_at(totals.text_bytes_per_second, 'B/s')}",
        f"{format_count(totals.tokens)} tokens{_at(totals.tokens_per_second, 'tokens/s')}",
    ]
    for what, units, counts in _left_out(totals):
        if counts:
            parts.append(f"{sum(counts.values()):,} {units} {what}")
    if left_seconds:
        parts.append(f"about {format_seconds(left_seconds)} left")
    return ", ".join(parts)


def prepare_table(
    totals: PrepareTotals,
    elapsed_seconds: float,
    left_seconds: float | None,
    max_reasons: int | None = None,
) -> "RenderableType":
    """Give totals as a table of at most 80 columns.

    Args:
        totals: The totals.
        elapsed_seconds: Since the first task of this attempt could start.
        left_seconds: Until the end, as far as it can be told.
        max_reasons: Most reasons shown; None shows all.
    """
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 1))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(overflow="ellipsis")
    bar = ProgressBar(totals.num_splits, totals.num_splits_done, width=BAR_CHARACTERS)
    table.add_row("splits", f"{totals.num_splits_done:,}/{totals.num_splits:,}", bar)
    table.add_row("files", f"{totals.num_files_done:,}/{totals.num_files:,}", "")
    table.add_row("documents", f"{totals.documents:,}", "")
    speed = _rate(totals.text_bytes_per_second, "B/s")
    table.add_row("text", format_bytes(totals.text_bytes), speed)
    speed = _rate(totals.tokens_per_second, "tokens/s")
    table.add_row("tokens", f"{totals.tokens:,}", speed)
    for what, units, counts in _left_out(totals):
        table.add_row(what, f"{sum(counts.values()):,}", units)
        for reason, number in _reasons(counts, max_reasons):
            table.add_row("", f"{number:,}", Text(reason), style="dim")
    left = "" if left_seconds is None else f"about {format_seconds(left_seconds)} left"
    table.add_row("time", format_seconds(elapsed_seconds), left)
    return table


def format_bytes(num_bytes: float) -> str:
    """Print an amount of text the way a person reads it."""
    if num_bytes >= 10 * GIGA:
        return f"{num_bytes / GIGA:,.1f} GB"
    return f"{num_bytes / MEGA:,.1f} MB" if num_bytes >= MEGA else f"{num_bytes / KILO:,.1f} kB"


def format_count(number: float) -> str:
    """Print a large count with three digits."""
    for unit, name in ((KILO * GIGA, "T"), (GIGA, "G"), (MEGA, "M")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,.0f}"


def _rate(rate: float | None, unit: str) -> str:
    if rate is None:
        return ""
    return f"{rate / MEGA:,.1f} M{unit}" if unit == "B/s" else f"{format_count(rate)} {unit}"


def _at(rate: float | None, unit: str) -> str:
    return f" at {_rate(rate, unit)}" if rate is not None else ""


def _left_out(totals: PrepareTotals) -> list[tuple[str, str, Mapping[str, int]]]:
    """Give what happened to what, and the counts by reason."""
    return [
        ("dropped", "documents", totals.dropped_documents),
        ("quarantined", "documents and files", totals.quarantined),
    ]


def _reasons(counts: Mapping[str, int], max_reasons: int | None) -> Iterator[tuple[str, int]]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    yield from ordered[:max_reasons]
    rest = ordered[len(ordered) if max_reasons is None else max_reasons :]
    if rest:
        yield f"{len(rest)} other reasons", sum(number for _, number in rest)
