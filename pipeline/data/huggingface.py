"""The Hugging Face source: a hub name, a directory of data files, or one made by `save_to_disk`.

Hub datasets and directories of data files are streamed: nothing is downloaded but what is read, and
tasks read the dataset's own shards. A saved dataset is mapped, and tasks read ranges of its rows.
"""

import gzip
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import zstandard

from pipeline.config.data import SourceConfig
from pipeline.data.documents import BadFile, Piece, Place, Record, check_document
from pipeline.data.sources import SPLIT_BYTES
from pipeline.data.storage import describe_contents, find_files
from pipeline.errors import DataError

SPLIT_ROWS = 10_000
"""Rows of a saved dataset in one task."""
SAVED_MARKS = ("state.json", "dataset_dict.json")
"""Files that tell a directory made by `save_to_disk`."""


class HuggingFaceSource:
    """One split of a Hugging Face dataset."""

    def __init__(self, config: SourceConfig, max_document_bytes: int, field: str) -> None:
        (self._location,) = config.paths
        self._config = config
        self._limit_bytes = max_document_bytes
        self._field = field
        self._directory = Path(self._location).expanduser()

    def contents(self) -> list[dict[str, str]]:
        """Give the files of a local dataset; of one from the hub its name and commit."""
        if self._directory.is_dir():
            return describe_contents(find_files(self._location, ("",), f"{self._field}.path"))
        return [{"name": self._location, "version": self._commit()}]

    def pieces(self) -> list[Piece]:
        """Give ranges of rows, or the shards of a streamed dataset."""
        dataset = self._load()
        if not self._is_saved:
            return self._cut(dataset.num_shards, 1)
        if len(dataset) == 0:
            raise DataError(f"split {self._config.split!r} of dataset {self._location} has no rows")
        return self._cut(len(dataset), SPLIT_ROWS)

    def read(self, piece: Piece) -> Iterator[Record]:
        """Yield a record for each row.

        Raises:
            BadFile: The dataset has no such column, or a file of it is damaged.
            DataError: It cannot be read for a reason that lies outside of it.
        """
        piece.check_readable()
        dataset = self._load()
        if self._is_saved:
            rows = dataset.select(range(piece.start, piece.stop))
            place, first = f"dataset {self._location}, row", piece.start
        else:
            rows = dataset.shard(num_shards=dataset.num_shards, index=piece.start)
            place, first = f"dataset {self._location}, shard {piece.start}, row", 0
        try:
            if (names := self._checked_columns(rows)) is None:
                return
            for number, row in enumerate(rows.select_columns(names), first):
                yield self._record(row, f"{place} {number}", piece, number)
        except DataError:
            raise
        except Exception as exc:
            # Below `datasets` stand the drivers of stores, each with types of its own.
            first_line = (str(exc).splitlines() or [type(exc).__name__])[0]
            if _is_damage(exc):
                raise BadFile("damaged_file", f"{place} unknown: {first_line}") from exc
            raise DataError(f"cannot read {place} unknown: {first_line}") from exc

    def _record(self, row: Mapping[str, Any], where: str, piece: Piece, number: int) -> Record:
        config = self._config
        given = None if config.id_column is None else row.get(config.id_column)
        place = Place(
            # Rows of a streamed shard are counted from 0 in each.
            source=piece.name if self._is_saved else f"{piece.name}/{piece.start}",
            ordinal=number,
            where=lambda: where,
            field=f"column {config.text_column!r}",
        )
        return check_document(row[config.text_column], given, place, self._limit_bytes)

    def _checked_columns(self, rows: Any) -> list[str] | None:
        """Give the columns to read; None where there is no row to tell them from."""
        config = self._config
        columns: list[str] = rows.column_names or list(next(iter(rows), {}))
        if not columns:
            return None
        if config.text_column not in columns:
            raise BadFile(
                "no_text_column",
                f"dataset {self._location} has no column {config.text_column!r}; "
                f"set {self._field}.text_column to one of {columns}",
            )
        wanted = (config.text_column, config.id_column)
        return [name for name in columns if name in wanted]

    def _cut(self, total: int, step: int) -> list[Piece]:
        # A local dataset may be moved, and keeps its ids.
        name = self._config.split if self._directory.is_dir() else Path(self._location).name
        return [
            Piece(
                path=self._location,
                name=name,
                start=start,
                stop=min(start + step, total),
                weight_bytes=SPLIT_BYTES,
            )
            for start in range(0, total, step)
        ]

    @property
    def _is_saved(self) -> bool:
        return any((self._directory / mark).is_file() for mark in SAVED_MARKS)

    def _commit(self) -> str:
        """Ask the hub which commit the dataset stands at; streams read the same one."""
        from huggingface_hub import HfApi

        try:
            info = HfApi().dataset_info(self._location, revision=self._config.revision)
        except Exception as exc:
            # The hub's client raises its transport's own types, which change between releases.
            raise self._unloadable(exc) from exc
        return str(info.sha)

    def _load(self) -> Any:
        import datasets

        config = self._config
        was_disabled = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            if not self._is_saved:
                local = self._directory.is_dir()
                return datasets.load_dataset(
                    str(self._directory) if local else self._location,
                    name=config.subset,
                    split=config.split,
                    revision=None if local else config.revision,
                    streaming=True,
                )
            loaded = datasets.load_from_disk(str(self._directory))
        except Exception as exc:
            # The first file is looked into here, and its reader and store have types of their own.
            raise self._unloadable(exc) from exc
        finally:
            if not was_disabled:
                datasets.enable_progress_bars()
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if config.split not in loaded:
            raise DataError(
                f"dataset {self._location} has no split {config.split!r}; "
                f"set {self._field}.split to one of {list(loaded)}"
            )
        return loaded[config.split]

    def _unloadable(self, exc: Exception) -> DataError:
        return DataError(
            f"cannot load split {self._config.split!r} of dataset {self._location} "
            f"({self._field}.path): {exc}"
        )


def _is_damage(exc: Exception) -> bool:
    """Tell what readers below `datasets` raise at damaged files from a store that fails."""
    import datasets
    import pyarrow

    # Arrow's own read errors are bare and have no number; those of files and networks do, or are
    # of a class below.
    if isinstance(exc, OSError) and not isinstance(exc, gzip.BadGzipFile):
        return type(exc) is OSError and exc.errno is None
    kinds = (
        datasets.exceptions.DatasetsError, pyarrow.ArrowException, EOFError, ValueError,
        zlib.error, zstandard.ZstdError,
    )  # fmt: skip
    return isinstance(exc, kinds)
