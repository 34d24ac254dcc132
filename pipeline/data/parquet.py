"""The Parquet source: a document is a row; tasks read row groups."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipeline.config.data import SourceConfig
from pipeline.data.documents import BadFile, BadRecord, Piece, Place, Record, check_document
from pipeline.data.long_texts import LONG_BYTES, decode_parts
from pipeline.data.sources import SPLIT_BYTES, whole_piece
from pipeline.data.storage import SourceFile, describe_contents, find_all
from pipeline.data.streams import ByteStream, open_binary

SUFFIXES = (".parquet",)
BATCH_ROWS = 1024
BUFFER_BYTES = 1 << 20
"""Read of a column at once."""
TEXT_TYPES = ("string", "large_string", "string_view")


class ParquetSource:
    """Parquet files; a large one is cut between row groups."""

    def __init__(self, config: SourceConfig, max_document_bytes: int, field: str) -> None:
        self._config = config
        self._limit_bytes = max_document_bytes
        self._field = field

    def contents(self) -> list[dict[str, str]]:
        """Give what tells each file's contents."""
        return describe_contents(self._files())

    def pieces(self) -> list[Piece]:
        """Give runs of row groups."""
        return [piece for file in self._files() for piece in self._cut(file)]

    def read(self, piece: Piece) -> Iterator[Record]:
        """Yield a record for each row.

        Raises:
            BadFile: The file is damaged, or its text column is missing or holds no text.
        """
        import pyarrow as pa

        piece.check_readable()
        with open_binary(piece.path) as stream:
            try:
                file = _open_parquet(stream)
                self._check_columns(piece.path, file.schema_arrow)
                groups = list(range(piece.start, min(piece.stop, file.num_row_groups)))
                if len(groups) < piece.stop - piece.start:
                    raise BadFile("truncated_file", f"{piece.path} has lost row groups")
                row = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
                yield from self._rows(file, groups, piece, row)
            except (pa.ArrowException, OSError) as exc:
                # No failed read is among them: the stream raises those as DataError.
                raise _damaged(piece.path, exc) from exc

    def _rows(self, file: Any, groups: list[int], piece: Piece, row: int) -> Iterator[Record]:
        config = self._config
        names = [config.text_column]
        if config.id_column in file.schema_arrow.names:
            names.append(str(config.id_column))
        for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=names):
            # As bytes, because one text that is not UTF-8 would take the whole batch with it.
            texts = batch.column(0).cast("large_binary")
            ids = batch.column(1) if len(names) > 1 else None
            for i in range(batch.num_rows):
                given = None if ids is None else ids[i]
                yield self._record(texts[i].as_buffer(), given, piece, row + i)
            row += batch.num_rows

    def _record(self, data: Any, given: Any, piece: Piece, row: int) -> Record:
        field = f"column {self._config.text_column!r}"
        where = f"{piece.path}, row {row}"
        read = field
        try:
            text = None if data is None else _decode(memoryview(data))
            read = f"column {self._config.id_column!r}"
            given = None if given is None else given.as_py()
        except UnicodeDecodeError as exc:
            detail = f"{read} is not UTF-8 text: {exc.reason}"
            return BadRecord(reason="not_utf8", where=where, detail=detail)
        place = Place(source=piece.name, ordinal=row, where=lambda: where, field=field)
        return check_document(text, given, place, self._limit_bytes)

    def _check_columns(self, path: str, schema: Any) -> None:
        name = self._config.text_column
        if name not in schema.names:
            raise BadFile(
                "no_text_column",
                f"{path} has no column {name!r}; "
                f"set {self._field}.text_column to one of {schema.names}",
            )
        if (number := schema.names.count(name)) > 1:
            raise BadFile("no_text_column", f"{path} has {number} columns that are called {name!r}")
        kind = schema.field(name).type
        # Dictionaries of strings decode to strings; an extension type may mean anything.
        value_type = getattr(kind, "value_type", kind) if "dictionary" in str(kind) else kind
        if str(value_type) not in TEXT_TYPES:
            raise BadFile(
                "column_not_text",
                f"{path}: column {name!r} holds {kind}, not text; set {self._field}.text_column",
            )

    def _files(self) -> list[SourceFile]:
        return find_all(self._config.paths, SUFFIXES, f"{self._field}.path")

    def _cut(self, file: SourceFile) -> list[Piece]:
        """Cut a file at row groups; a damaged one is one piece with a flaw."""
        import pyarrow as pa

        if file.is_missing:
            return [whole_piece(file)]
        try:
            with open_binary(file.path) as stream:
                metadata = _open_parquet(stream).metadata
                sizes = [
                    _text_bytes(metadata.row_group(i), self._config.text_column)
                    for i in range(metadata.num_row_groups)
                ]
        except (pa.ArrowException, OSError) as exc:
            return [_flawed(file, _damaged(file.path, exc))]
        except BadFile as exc:
            return [_flawed(file, exc)]
        # A file without a row group has no documents, but must have the column.
        return gather_groups(file, sizes, SPLIT_BYTES) or [replace(whole_piece(file), stop=0)]


def _open_parquet(stream: ByteStream) -> Any:
    import pyarrow.parquet as pq

    # Read ahead, a row group is held whole: with one of 300 MiB a process took 399 MiB, so 101.
    return pq.ParquetFile(
        stream, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
    )


def _decode(data: memoryview) -> str | tuple[str, ...]:
    return str(data, "utf-8") if len(data) <= LONG_BYTES else tuple(decode_parts(data))


def _flawed(file: SourceFile, error: BadFile) -> Piece:
    return replace(whole_piece(file), flaw=(error.reason, str(error)))


def _text_bytes(row_group: Any, text_column: str) -> int:
    """Give the uncompressed size of the text column, of all columns where it is not found."""
    columns = [row_group.column(i) for i in range(row_group.num_columns)]
    texts = [c.total_uncompressed_size for c in columns if c.path_in_schema == text_column]
    return int(sum(texts) or row_group.total_byte_size)


def gather_groups(file: SourceFile, sizes: list[int], limit_bytes: int) -> list[Piece]:
    """Gather the row groups of a file to pieces of about `limit_bytes`.

    Args:
        file: The file.
        sizes: Bytes of text of each row group.
        limit_bytes: Size at which a piece is full.
    """
    pieces, start, weight = [], 0, 0
    for group, size in enumerate(sizes):
        weight += size
        if weight >= limit_bytes or group == len(sizes) - 1:
            stop = group + 1
            pieces.append(
                Piece(path=file.path, name=file.name, start=start, stop=stop, weight_bytes=weight)
            )
            start, weight = stop, 0
    return pieces


def _damaged(path: str, exc: Exception) -> BadFile:
    first = (str(exc).splitlines() or [type(exc).__name__])[0]
    return BadFile("damaged_file", f"{path} is not a whole Parquet file ({first}); copy it again")
