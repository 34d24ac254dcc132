"""The page of `inspect`, drawn from facts that are known, at the narrowest usual width."""

import io
from typing import Any

from rich.console import Console

from launch.inspect_page import draw_bar, escape_controls, inspect_page

SIZES = {"num_shards": 2, "documents": 40, "tokens": 1040, "text_bytes": 4000}
FACTS: dict[str, Any] = {
    "directory": "/data/0123456789abcdef",
    "fingerprint": "0123456789abcdef",
    "encoder": "fastokens 0.3.5",
    "vocab_size": 50257,
    "dtype": "uint16",
    "end_of_document": "<|endoftext|>",
    "end_of_document_id": 50256,
    "input_documents": 50,
    "dropped_documents": {"empty": 4, "[too short]": 5},
    "quarantined_documents": {"invalid_utf8": 1},
    "bad_files": [{"name": "a.gz", "reason": "truncated", "message": "at byte 7"}],
    "splits": {
        "train": {
            **SIZES,
            "bytes_per_token": 4.0,
            "lengths": {
                "smallest": 2,
                "median": 3,
                "percentile_95": 8,
                "largest": 9,
                "histogram": {2: 30, 4: 0, 8: 10},
            },
        },
        "validation": {**dict.fromkeys(SIZES, 0), "bytes_per_token": None, "lengths": None},
    },
    "sources": {
        "train": {"web": {**SIZES, "bytes_per_token": 4.0, "tokens_fraction": 0.25}},
        "validation": {},
    },
    "samples": [
        {"source": "web", "shard": "train-00000", "document": 3, "tokens": 9, "text": "a\x1b[2Jb\n"}
    ],
}


def lines_of(facts: dict[str, Any]) -> list[str]:
    stream = io.StringIO()
    console = Console(file=stream, width=80, highlight=False)
    for part in inspect_page(facts):
        console.print(part)
    return stream.getvalue().splitlines()


def test_the_page_shows_every_number_within_eighty_columns() -> None:
    lines = lines_of(FACTS)
    assert max(map(len, lines)) <= 80
    words = [line.split() for line in lines]
    assert ["train", "2", "40", "1,040", "4.0", "kB", "4.000"] in words
    assert ["web", "train", "40", "1,040", "4.0", "kB", "4.000", "25.0%"] in words
    assert ["2", "to", "3", "30", "\u2588" * 40] in words
    assert ["4", "to", "7", "0"] in words
    assert ["dropped:", "empty", "4", "8.00%"] in words
    assert ["quarantined:", "invalid_utf8", "1", "2.00%"] in words
    assert any("median 3, p95 8, max 9" in line for line in lines)


def test_text_and_reasons_of_a_corpus_cannot_draw_on_the_terminal() -> None:
    lines = lines_of(FACTS)
    assert "\x1b" not in "".join(lines)
    assert any(line.endswith("a\\x1b[2Jb\\n") for line in lines)
    assert any("dropped: [too short]" in line for line in lines)
    assert escape_controls("caf\u00e9 \u202eabc\t\udc80") == "caf\u00e9 \\u202eabc\\t?"


def test_files_left_out_whole_are_named_up_to_a_number() -> None:
    assert any(line.split() == ["a.gz:", "truncated"] for line in lines_of(FACTS))
    many = [{"name": f"\x1b{i}.gz", "reason": "truncated", "message": ""} for i in range(12)]
    lines = lines_of(FACTS | {"bad_files": many})
    assert sum(".gz: truncated" in line for line in lines) == 10
    assert any("\\x1b9.gz" in line for line in lines)
    assert any("stand in manifest.json" in line for line in lines)


def test_nothing_left_out_and_no_samples_leave_no_tables() -> None:
    empty = dict.fromkeys(("dropped_documents", "quarantined_documents", "bad_files", "samples"))
    text = "\n".join(lines_of(FACTS | empty))
    assert "left out" not in text
    assert "samples" not in text


def test_a_bar_is_as_exact_as_an_eighth_of_a_character() -> None:
    assert draw_bar(1.0, width=4) == "\u2588" * 4
    assert draw_bar(0.5, width=4) == "\u2588" * 2
    assert draw_bar(3 / 32, width=4) == "\u258d"
    assert draw_bar(1e-9, width=4) == "\u258f"
    assert draw_bar(0.0, width=4) == ""
