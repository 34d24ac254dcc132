"""From splits to the documents whose text stood earlier, as three stages of Ray tasks.

One task a split writes signatures to a file; one task a band pairs the documents that agree in it;
the calling process joins pairs to groups. Of a group the first document in the order of the splits
stays, so nothing depends on the number of workers or on who finishes first. As in the published
pipelines, documents that agree in one band are duplicates, and so are those linked by a third:
texts are not compared again. Source: Penedo et al. 2024 (FineWeb), section 3.4.

No text travels through Ray. A split's task holds one text and 32 to 144 bytes a document of its
split; a band's task and the calling process some 60 bytes a document of all splits, and 16 more for
each that has a duplicate.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.config.data import CleanConfig
from pipeline.data.assembly import npy_bytes
from pipeline.data.progress import OnEvent, say
from pipeline.data.ray_tasks import explain_failure, run_each
from pipeline.data.shards import write_atomic
from pipeline.data.signatures import (
    FIRST_BAND_ROW,
    KEY_ROWS,
    TEXT_ROWS,
    Int64Array,
    count_documents,
    find_equal,
    join_pairs,
    read_rows,
    write_signatures,
)
from pipeline.data.sources import Split
from pipeline.data.split_reader import RecordKey
from pipeline.errors import DataError

SAME = "duplicate_text"
"""Reason of a document whose very text stands earlier."""
NEARLY_SAME = "near_duplicate"
"""Reason of one that only resembles an earlier one, or one linked to an earlier one by others."""

SIGNATURE_NAME = "signatures-{:05d}.npy"

ReadTexts = Callable[[Split], Iterator[tuple[RecordKey, str]]]
"""Gives key and text of each document of a split, in order; pickled, called in a worker."""


def find_duplicates(
    splits: Sequence[Split],
    read: ReadTexts,
    config: CleanConfig,
    work_dir: Path,
    on_event: OnEvent = lambda event: None,
) -> dict[int, dict[RecordKey, str]]:
    """Find the documents whose text, or nearly the same, stood earlier.

    Args:
        splits: All splits to compare; their order by index says which document is earlier.
        read: Reads one.
        config: What counts as the same.
        work_dir: Holds the signatures, on a disk that every worker reaches. It belongs to one
            config and one state of the sources: a split whose file stands is not read again.
        on_event: Takes one line of progress at a time.

    Returns:
        The reason of each duplicate by its key, by the index of its split; splits without one are
        left out.

    Raises:
        DataError: A split cannot be read, or the work directory not be written.
    """
    splits = sorted(splits, key=lambda split: split.index)
    if config.deduplicate == "none" or not splits:
        return {}
    paths = [_signature_path(work_dir, split) for split in splits]
    _sign_all(splits, read, config, work_dir, on_event)
    same, linked = _pair_all(paths, config, work_dir, on_event)
    found = _by_split(splits, paths, same, linked)
    say(on_event, f"{len(linked):,} documents stood earlier, {len(same):,} with the same text")
    return found


def forget_signatures(work_dir: Path, index: int) -> None:
    """Remove the signatures of a split, so that it is read again."""
    (work_dir / SIGNATURE_NAME.format(index)).unlink(missing_ok=True)


def _sign_all(
    splits: list[Split], read: ReadTexts, config: CleanConfig, work_dir: Path, on_event: OnEvent
) -> None:
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise DataError(explain_failure(work_dir, exc)) from exc
    missing = [split for split in splits if not _signature_path(work_dir, split).exists()]
    sign = partial(_sign, read=read, config=config, work_dir=work_dir)
    num_done = len(splits) - len(missing)
    for num_documents in run_each(sign, missing, partial(explain_failure, work_dir)):
        num_done += 1
        say(on_event, f"compared {num_done}/{len(splits)} splits: {num_documents:,} documents")


def _sign(split: Split, read: ReadTexts, config: CleanConfig, work_dir: Path) -> int:
    return write_signatures(read(split), config, _signature_path(work_dir, split))


def _pair_all(
    paths: list[Path], config: CleanConfig, work_dir: Path, on_event: OnEvent
) -> tuple[Int64Array, Int64Array]:
    """Give the numbers of documents whose text stood earlier, and of these and all near ones."""
    fields = [TEXT_ROWS]
    if config.deduplicate == "minhash":
        bands = range(FIRST_BAND_ROW, FIRST_BAND_ROW + config.minhash.num_bands)
        fields += [slice(row, row + 1) for row in bands]
    pair = partial(_pair, paths=paths, work_dir=work_dir)
    same = joined = join_pairs(np.empty((0, 2), dtype=np.int64))
    for path in run_each(pair, fields, partial(explain_failure, work_dir)):
        pairs = np.load(path)
        path.unlink()
        if path == _pair_path(work_dir, TEXT_ROWS):
            same = pairs
        # Joined at once, so that memory is by duplicates, not by duplicates times bands.
        joined = join_pairs(np.concatenate([joined, pairs]))
    say(on_event, f"joined the pairs of {len(fields)} comparisons")
    return np.sort(same[:, 1]), joined[:, 1]


def _pair(rows: slice, paths: list[Path], work_dir: Path) -> Path:
    path = _pair_path(work_dir, rows)
    write_atomic(path, npy_bytes(find_equal(paths, rows)))
    return path


def _by_split(
    splits: list[Split], paths: list[Path], same: Int64Array, linked: Int64Array
) -> dict[int, dict[RecordKey, str]]:
    found = {}
    is_same = np.isin(linked, same)
    start = 0
    for split, path in zip(splits, paths, strict=True):
        stop = start + count_documents(path)
        first, last = np.searchsorted(linked, [start, stop])
        if first < last:
            keys = read_rows([path], KEY_ROWS)[:, linked[first:last] - start].T.tolist()
            reasons = [SAME if is_text else NEARLY_SAME for is_text in is_same[first:last]]
            found[split.index] = {
                (piece, ordinal): reason
                for (piece, ordinal), reason in zip(keys, reasons, strict=True)
            }
        start = stop
    return found


def _signature_path(work_dir: Path, split: Split) -> Path:
    return work_dir / SIGNATURE_NAME.format(split.index)


def _pair_path(work_dir: Path, rows: slice) -> Path:
    return work_dir / f"pairs-{rows.start:02d}.npy"
