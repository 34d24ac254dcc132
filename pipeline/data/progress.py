"""What preparing tells while it works: lines for people, and counts for tables and trackers."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class PrepareTotals:
    """What has been prepared so far, over all attempts."""

    num_splits: int
    """Parts that the source was cut into; one task makes the shards of each."""
    num_splits_done: int = 0
    num_files: int
    """Files or datasets of the source."""
    num_files_done: int = 0
    documents: int = 0
    """Documents written."""
    text_bytes: int = 0
    """UTF-8 bytes of the documents written."""
    tokens: int = 0
    """Tokens written, end-of-document tokens included."""
    dropped_documents: Mapping[str, int] = field(default_factory=Counter)
    """Documents left out, by reason."""
    quarantined_documents: Mapping[str, int] = field(default_factory=Counter)
    """Documents and files that could not be read, by reason."""
    seconds: float = 0.0
    """Since the first task of this attempt could start: Ray was up."""
    text_bytes_before: int = 0
    """Of `text_bytes`, what an earlier attempt had written."""
    tokens_before: int = 0

    @property
    def text_bytes_per_second(self) -> float | None:
        """Text of this attempt over its time; None before there is any."""
        return _rate(self.text_bytes - self.text_bytes_before, self.seconds)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of this attempt over its time; None before there are any."""
        return _rate(self.tokens - self.tokens_before, self.seconds)


@dataclass(frozen=True, kw_only=True)
class PrepareEvent:
    """One thing that preparing reports."""

    message: str
    """A line for people."""
    totals: PrepareTotals | None = None
    """Given after every finished split, and once before the first."""
    directory: Path | None = None
    """The prepared directory, given with `totals`; it exists."""
    is_finished: bool = False
    """Whether the manifest stands."""


OnEvent = Callable[[PrepareEvent], None]


def say(on_event: OnEvent, message: str) -> None:
    """Report one line."""
    on_event(PrepareEvent(message=message))


def _rate(amount: int, seconds: float) -> float | None:
    return amount / seconds if amount and seconds > 0.0 else None
