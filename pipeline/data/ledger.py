"""What is done of a preparation: a file for each finished split, so that a killed one goes on.

The ledger stands in `work/` of the prepared directory, under the digest of the job it belongs to,
and goes when the manifest is written.
"""

import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.data.indexed import little_endian
from pipeline.data.shards import ShardRecord, SplitName, write_atomic
from pipeline.errors import DataError

WORK_DIR = "work"
"""Everything that is needed while preparing only."""
LEDGER_DIR = "ledger"
JOB_FILE = "job"


class SplitResult(BaseModel):
    """What became of one split of the source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    shards: dict[SplitName, ShardRecord]
    input_documents: int
    """Records read: those written, dropped and quarantined."""
    dropped_documents: dict[str, int]
    quarantined_documents: dict[str, int]
    bad_files: list[dict[str, str]]
    """Pieces left out whole: name, reason, message."""
    notes: list[str]
    """What people should know: why the reference encoder took over."""
    smallest_hash: float
    """Smallest hash of a document id, in [0, 1): the validation fraction that would reach it."""
    largest_hash: float
    seconds: float

    @property
    def is_clean(self) -> bool:
        """Whether every record could be read."""
        return not self.quarantined_documents and not self.bad_files


def open_ledger(directory: Path, job_digest: str) -> None:
    """Make the work directory of a job, or keep the one that the same job left.

    Args:
        directory: The prepared directory.
        job_digest: What decides every byte of every shard.
    """
    work = directory / WORK_DIR
    job_file = work / JOB_FILE
    if work.exists() and not (job_file.exists() and job_file.read_text() == job_digest):
        shutil.rmtree(work)
    (work / LEDGER_DIR).mkdir(parents=True, exist_ok=True)
    write_atomic(job_file, job_digest.encode())


def write_result(directory: Path, result: SplitResult) -> None:
    """Enter a finished split, after its shards are on disk."""
    path = _path(directory, result.index)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, result.model_dump_json().encode())


def read_results(
    directory: Path, num_splits: int, dtype: str, *, allow_bad: bool
) -> dict[int, SplitResult]:
    """Give the finished splits whose shards are all there.

    Args:
        directory: The prepared directory.
        num_splits: How many there are to be.
        dtype: Of the tokens on disk.
        allow_bad: Whether a split with bad input counts; else it is read again, to fail.
    """
    results = {}
    for index in range(num_splits):
        try:
            result = SplitResult.model_validate_json(_path(directory, index).read_bytes())
        except (FileNotFoundError, ValidationError):
            continue
        if (allow_bad or result.is_clean) and _is_whole(directory, result, dtype):
            results[index] = result
    return results


def forget(directory: Path, index: int) -> None:
    """Strike a split from the ledger before it is made again."""
    _path(directory, index).unlink(missing_ok=True)


def close_ledger(directory: Path) -> None:
    """Remove the work directory and what killed tasks left beside the shards.

    Raises:
        DataError: It cannot be removed.
    """
    try:
        if (directory / WORK_DIR).exists():
            shutil.rmtree(directory / WORK_DIR)
        for path in directory.rglob(".*"):
            path.unlink(missing_ok=True)
    except OSError as exc:
        raise DataError(f"cannot clear {directory}: {exc.strerror or exc}") from exc


def _path(directory: Path, index: int) -> Path:
    return directory / WORK_DIR / LEDGER_DIR / f"split-{index:05d}.json"


def _is_whole(directory: Path, result: SplitResult, dtype: str) -> bool:
    """Whether the shards have the sizes that the ledger says; `verify` looks at their hashes."""
    for shard in result.shards.values():
        tokens, index = directory / f"{shard.name}.bin", directory / f"{shard.name}.idx"
        if not (tokens.is_file() and index.is_file()):
            return False
        if tokens.stat().st_size != shard.tokens * little_endian(dtype).itemsize:
            return False
    return True
