"""What is shown of preparing, from totals whose rates are known."""

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from launch.display import Display
from launch.prepare_view import (
    PrepareView,
    format_bytes,
    format_count,
    prepare_line,
    prepare_table,
    seconds_left,
)
from pipeline.data.progress import PrepareEvent, PrepareTotals

FIRST = PrepareTotals(num_splits=100, num_files=8, num_splits_done=20)
TOTALS = PrepareTotals(
    num_splits=100,
    num_files=8,
    num_splits_done=60,
    num_files_done=5,
    documents=1_234_567,
    text_bytes=5_000_000_000,
    tokens=1_200_000_000,
    text_bytes_before=1_000_000_000,
    tokens_before=200_000_000,
    dropped_documents=Counter({f"reason_{n}": 10 - n for n in range(9)}),
    quarantined=Counter(invalid_utf8=2, damaged_archive=1),
    seconds=80.0,
)


def shown(draw: Callable[[Console], None], width: int, *, is_terminal: bool = False) -> str:
    stream = io.StringIO()
    draw(Console(file=stream, width=width, force_terminal=is_terminal, highlight=False))
    return stream.getvalue()


def test_time_left_is_at_the_pace_of_this_attempt() -> None:
    # 40 splits in 80 s, 40 to go.
    assert seconds_left(FIRST, TOTALS) == 80.0
    assert seconds_left(FIRST, FIRST) is None


def test_a_line_tells_counts_and_the_rates_of_this_attempt() -> None:
    assert prepare_line(TOTALS, 80.0) == (
        "tokenized 60/100, 1,234,567 documents, 5,000.0 MB at 50.0 MB/s, "
        "1.2 G tokens at 12.5 M tokens/s, 54 documents dropped, "
        "3 documents and files quarantined, about 80 s left"
    )


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_has_every_reason(width: int) -> None:
    text = shown(lambda console: console.print(prepare_table(TOTALS, 80.0, 80.0)), width)
    lines = [line.split() for line in text.splitlines()]
    assert max(map(len, text.splitlines())) <= width
    assert ["files", "5/8"] in lines
    assert ["text", "5,000.0", "MB", "50.0", "MB/s"] in lines
    assert ["tokens", "1,200,000,000", "12.5", "M", "tokens/s"] in lines
    assert ["dropped", "54", "documents"] in lines
    assert ["quarantined", "3", "documents", "and", "files"] in lines
    assert [[str(10 - n), f"reason_{n}"] in lines for n in range(9)] == [True] * 9


def test_a_live_table_sums_the_small_reasons_up() -> None:
    text = shown(lambda console: console.print(prepare_table(TOTALS, 80.0, None, 6)), 80)
    lines = [line.split() for line in text.splitlines()]
    assert ["9", "3", "other", "reasons"] in lines
    assert "reason_6" not in text


def play(console: Console, *, is_whole: bool) -> None:
    display = Display(as_json=False)
    display.console = console
    with PrepareView(display, is_whole=is_whole) as view:
        view.take(PrepareEvent(message="starting Ray"))
        view.take(PrepareEvent(message="tokenizing the source, cut into 100", totals=FIRST))
        for number in range(21, 61):
            totals = replace(TOTALS, num_splits_done=number)
            view.take(PrepareEvent(message="one more split", totals=totals))


def test_without_a_terminal_there_are_few_lines_and_the_table_at_the_end() -> None:
    lines = shown(lambda console: play(console, is_whole=True), 80).splitlines()
    assert lines[:2] == ["starting Ray", "tokenizing the source, cut into 100"]
    assert [line.split()[0] for line in lines[2:4]] == ["splits", "files"]
    assert "one more split" not in lines


def test_on_a_terminal_the_table_stays_and_a_line_goes() -> None:
    whole = shown(lambda console: play(console, is_whole=True), 80, is_terminal=True)
    assert "60/100" in whole.rpartition("\x1b[2K")[2]
    within = shown(lambda console: play(console, is_whole=False), 120, is_terminal=True)
    assert "tokenized 60/100" in within
    assert "60/100" not in within.rpartition("\x1b[2K")[2]


@pytest.mark.parametrize(
    ("number", "text"),
    [(999_999, "999,999"), (1_460_000, "1.46 M"), (123_400_000, "123 M"), (2.5e9, "2.5 G")],
)
def test_large_counts_have_three_digits(number: float, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(999, "1.0 kB"), (1_500_000, "1.5 MB"), (12e9, "12.0 GB")]
)
def test_amounts_of_text_have_the_unit_of_their_size(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text
