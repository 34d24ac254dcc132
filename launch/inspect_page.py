"""From a prepared directory to what `inspect` answers: plain values, and a page for people."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from launch.prepare_view import format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from pipeline.data.shards import ShardManifest

SAMPLE_CHARACTERS = 160
SAMPLE_TOKENS = 4 * SAMPLE_CHARACTERS
"""A character takes at most four tokens, one for each of its UTF-8 bytes."""
MAX_BAD_FILES = 10
"""Files left out whole that are named."""
BAR_CHARACTERS = 40
EIGHTHS = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589\u2588"
"""Blocks that are 0 to 8 eighths of a character wide."""


def inspect_facts(prepared_dir: Path, num_samples: int, seed: int) -> dict[str, Any]:
    """Give everything about prepared shards as plain values.

    Args:
        prepared_dir: The prepared directory.
        num_samples: Training documents whose beginning is shown.
        seed: Draws them.

    Raises:
        DataError: The directory is not prepared, or a file of it is missing or damaged.
    """
    from pipeline.data.shards import SplitName, describe_prepared, load_manifest
    from pipeline.data.statistics import describe_split

    manifest = load_manifest(prepared_dir)
    splits = {name: describe_split(manifest, name) for name in get_args(SplitName)}
    return {
        **describe_prepared(prepared_dir),
        "splits": {
            name: {**_sizes(split.sizes), "lengths": split.lengths and asdict(split.lengths)}
            for name, split in splits.items()
        },
        "sources": {
            name: {
                source: {**_sizes(sizes), "tokens_fraction": sizes.tokens / split.sizes.tokens}
                for source, sizes in split.sources.items()
            }
            for name, split in splits.items()
        },
        "samples": _samples(manifest, num_samples, seed),
    }


def inspect_page(facts: Mapping[str, Any]) -> "list[RenderableType]":
    """Give the facts as things to show one below the other, at most 80 columns wide."""
    lengths = facts["splits"]["train"]["lengths"]
    parts: list[RenderableType] = [
        _header(facts),
        _splits_table(facts["splits"]),
        _sources_table(facts["sources"]),
        *([] if lengths is None else [_histogram(lengths)]),
    ]
    if facts["dropped_documents"] or facts["quarantined_documents"] or facts["bad_files"]:
        parts.append(_left_out_table(facts))
    if facts["samples"]:
        parts.append(_samples_table(facts["samples"]))
    return [item for part in parts for item in (part, "")][:-1]


def escape_controls(text: str) -> str:
    """Give the text on one line, with everything that would not be seen, or move, spelt out."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text.encode("utf-8", "replace").decode()
    )


def draw_bar(fraction: float, width: int = BAR_CHARACTERS) -> str:
    """Draw a bar of block characters, as exact as an eighth of a character allows.

    Args:
        fraction: Length, from 0 to 1; one above 0 leaves at least a trace.
        width: Characters of a full bar.
    """
    num_eighths = round(fraction * width * 8)
    if fraction > 0:
        num_eighths = max(num_eighths, 1)
    whole, rest = divmod(num_eighths, 8)
    return EIGHTHS[8] * whole + (EIGHTHS[rest] if rest else "")


def _sizes(sizes: Any) -> dict[str, Any]:
    return {**asdict(sizes), "bytes_per_token": sizes.bytes_per_token}


def _samples(manifest: "ShardManifest", num_samples: int, seed: int) -> list[dict[str, Any]]:
    from pipeline.data.shards import TOKENIZER_NAME
    from pipeline.data.statistics import sample_documents
    from pipeline.data.tokenizer import decode

    drawn = sample_documents(manifest, "train", num_samples, seed, SAMPLE_TOKENS)
    if not drawn:
        return []
    tokenizer_json = (manifest.directory / TOKENIZER_NAME).read_text(encoding="utf-8")
    return [
        {
            "source": sample.source,
            "shard": sample.shard,
            "document": sample.document,
            "tokens": sample.tokens,
            "text": decode(tokenizer_json, sample.first_ids)[:SAMPLE_CHARACTERS],
        }
        for sample in drawn
    ]


def _new_table(title: str, *columns: str) -> "Table":
    """A table whose first column is text and whose others are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="ellipsis")
    return table


def _header(facts: Mapping[str, Any]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    encoder = f"{facts['encoder']}, vocabulary {facts['vocab_size']:,}, {facts['dtype']}"
    rows = {
        "directory": facts["directory"],
        "fingerprint": facts["fingerprint"],
        "encoder": encoder,
        "document end": f"{facts['end_of_document']} = {facts['end_of_document_id']}",
        "input": f"{facts['input_documents']:,} documents",
    }
    table = Table.grid(padding=(0, 2, 0, 1))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    return table


def _splits_table(splits: Mapping[str, Any]) -> "Table":
    table = _new_table("splits", "", "shards", "documents", "tokens", "text", "bytes/token")
    for name, split in splits.items():
        table.add_row(name, *_size_cells(split))
    return table


def _sources_table(sources: Mapping[str, Any]) -> "Table":
    columns = ("split", "documents", "tokens", "text", "bytes/token", "share")
    table = _new_table("sources", "", *columns)
    for split, by_name in sources.items():
        for name, source in by_name.items():
            share = f"{100 * source['tokens_fraction']:.1f}%"
            table.add_row(name, split, *_size_cells(source)[1:], share)
    return table


def _size_cells(sizes: Mapping[str, Any]) -> list[str]:
    per_token = sizes["bytes_per_token"]
    return [
        f"{sizes['num_shards']:,}",
        f"{sizes['documents']:,}",
        f"{sizes['tokens']:,}",
        format_bytes(sizes["text_bytes"]),
        "" if per_token is None else f"{per_token:.3f}",
    ]


def _histogram(lengths: Mapping[str, Any]) -> "Table":
    title = (
        f"training documents by tokens: min {lengths['smallest']:,}, "
        f"median {lengths['median']:,}, p95 {lengths['percentile_95']:,}, "
        f"max {lengths['largest']:,}"
    )
    table = _new_table(title, "tokens", "documents")
    table.add_column("", justify="left", width=BAR_CHARACTERS, no_wrap=True)
    most = max(lengths["histogram"].values())
    for start, number in lengths["histogram"].items():
        span = f"{start:,} to {2 * start - 1:,}" if start > 1 else "1"
        table.add_row(span, f"{number:,}", draw_bar(number / most))
    return table


def _left_out_table(facts: Mapping[str, Any]) -> "Table":
    from rich.text import Text

    table = _new_table("left out", "reason", "documents", "of input")
    total = max(facts["input_documents"], 1)
    for what in ("dropped", "quarantined"):
        counts = facts[f"{what}_documents"]
        for reason, number in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            table.add_row(Text(f"{what}: {reason}"), f"{number:,}", f"{100 * number / total:.2f}%")
    if facts["bad_files"]:
        table.add_row(f"files left out whole: {len(facts['bad_files']):,}", "", "")
    for file in facts["bad_files"][:MAX_BAD_FILES]:
        table.add_row(Text(f"  {escape_controls(file['name'])}: {file['reason']}"), "", "")
    if len(facts["bad_files"]) > MAX_BAD_FILES:
        table.add_row("  all of them stand in manifest.json", "", "")
    return table


def _samples_table(samples: list[dict[str, Any]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 1))
    table.title, table.title_justify, table.title_style = "samples", "left", "bold"
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for sample in samples:
        label = Text(f"{sample['source']}\n{sample['tokens']:,} tokens")
        table.add_row(label, Text(escape_controls(sample["text"])))
    return table
