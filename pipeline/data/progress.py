"""What preparing tells while it works: lines for people, and counts for tables and trackers."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.ledger import SplitResult
from pipeline.data.sources import Split


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
    quarantined: Mapping[str, int] = field(default_factory=Counter)
    """Documents, and files left out whole, that could not be read, by reason."""
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


class ProgressCounter:
    """Adds up the results of splits, those of earlier attempts included."""

    def __init__(
        self, splits: Sequence[Split], done: Iterable[SplitResult], directory: Path
    ) -> None:
        """Count what the ledger has.

        Args:
            splits: All splits.
            done: Results of earlier attempts.
            directory: The prepared directory.
        """
        self._files = {
            split.index: {(split.source, piece.name) for piece in split.pieces} for split in splits
        }
        # Of each file, the splits that are not done.
        self._left = Counter(file for files in self._files.values() for file in files)
        self._results: dict[int, SplitResult] = {}
        self._sums, self._dropped, self._quarantined = (Counter[str]() for _ in range(3))
        self._directory = directory
        self._started: float | None = None
        for result in done:
            self.add(result)
        self._before = (self._sums["text_bytes"], self._sums["tokens"])

    def start(self) -> None:
        """Start the clock: tasks can run from now on."""
        self._started = time.perf_counter()

    def add(self, result: SplitResult) -> None:
        """Count a finished split."""
        self._results[result.index] = result
        self._count(result, 1)

    def remove(self, index: int) -> None:
        """Count a split no more, because it is made again."""
        self._count(self._results.pop(index), -1)

    def event(self, message: str) -> PrepareEvent:
        """Give the event that tells a line and the counts."""
        return PrepareEvent(message=message, totals=self.totals, directory=self._directory)

    @property
    def totals(self) -> PrepareTotals:
        """The counts so far."""
        text_bytes, tokens = self._before
        now = time.perf_counter()
        return PrepareTotals(
            num_splits=len(self._files),
            num_splits_done=len(self._results),
            num_files=len(self._left),
            num_files_done=sum(left == 0 for left in self._left.values()),
            documents=self._sums["documents"],
            text_bytes=self._sums["text_bytes"],
            tokens=self._sums["tokens"],
            dropped_documents=+self._dropped,
            quarantined=+self._quarantined,
            seconds=0.0 if self._started is None else now - self._started,
            text_bytes_before=text_bytes,
            tokens_before=tokens,
        )

    def _count(self, result: SplitResult, sign: int) -> None:
        for shard in result.shards.values():
            self._sums["documents"] += sign * shard.documents
            self._sums["text_bytes"] += sign * shard.text_bytes
            self._sums["tokens"] += sign * shard.tokens
        for file in self._files[result.index]:
            self._left[file] -= sign
        for reason, number in result.dropped_documents.items():
            self._dropped[reason] += sign * number
        for reason, number in result.quarantined_documents.items():
            self._quarantined[reason] += sign * number
        for entry in result.bad_files:
            self._quarantined[entry["reason"]] += sign


OnEvent = Callable[[PrepareEvent], None]


def say(on_event: OnEvent, message: str) -> None:
    """Report one line."""
    on_event(PrepareEvent(message=message))


def _rate(amount: int, seconds: float) -> float | None:
    return amount / seconds if amount and seconds > 0.0 else None
