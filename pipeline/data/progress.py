"""What preparing tells while it works: lines for people, and counts for tables and trackers."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
            split.index: {(split.source, p.name) for p in split.pieces} for split in splits
        }
        self._results = {result.index: result for result in done}
        self._directory = directory
        self._started: float | None = None
        before = self._sum()
        self._before = (before.text_bytes, before.tokens)

    def start(self) -> None:
        """Start the clock: tasks can run from now on."""
        self._started = time.perf_counter()

    def add(self, result: SplitResult) -> None:
        """Count a finished split."""
        self._results[result.index] = result

    def remove(self, index: int) -> None:
        """Count a split no more, because it is made again."""
        del self._results[index]

    def event(self, message: str) -> PrepareEvent:
        """Give the event that tells a line and the counts."""
        return PrepareEvent(message=message, totals=self.totals, directory=self._directory)

    @property
    def totals(self) -> PrepareTotals:
        """The counts so far."""
        text_bytes, tokens = self._before
        return replace(self._sum(), text_bytes_before=text_bytes, tokens_before=tokens)

    def _sum(self) -> PrepareTotals:
        results = self._results.values()
        shards = [shard for result in results for shard in result.shards.values()]
        dropped, quarantined = Counter[str](), Counter[str]()
        for result in results:
            dropped.update(result.dropped_documents)
            quarantined.update(result.quarantined_documents)
            quarantined.update(entry["reason"] for entry in result.bad_files)
        undone = set().union(*(f for i, f in self._files.items() if i not in self._results))
        files = set().union(*self._files.values())
        now = time.perf_counter()
        return PrepareTotals(
            num_splits=len(self._files),
            num_splits_done=len(self._results),
            num_files=len(files),
            num_files_done=len(files - undone),
            documents=sum(shard.documents for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            dropped_documents=dropped,
            quarantined_documents=quarantined,
            seconds=0.0 if self._started is None else now - self._started,
        )


OnEvent = Callable[[PrepareEvent], None]


def say(on_event: OnEvent, message: str) -> None:
    """Report one line."""
    on_event(PrepareEvent(message=message))


def _rate(amount: int, seconds: float) -> float | None:
    return amount / seconds if amount and seconds > 0.0 else None
