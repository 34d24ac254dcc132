"""What every filter of `FILTERS` promises: a known reason or none, each time the same."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import CleanConfig
from pipeline.data import FILTER_SETS, FILTERS
from pipeline.data.filters import TOO_LONG, build_cleaner, check_filters
from pipeline.data.split_reader import Cleaned, Cleaner
from pipeline.errors import ConfigError

pytestmark = pytest.mark.slow


@dataclass(frozen=True, kw_only=True)
class Case:
    """Texts on both sides of a filter."""

    kept: str
    dropped: str
    reason: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_file: bool = False
    """Whether it needs a file that nobody here downloads."""


def words(start: int, stop: int) -> str:
    """Give different words of five letters."""
    letters = "abcdefghij"
    return " ".join("w" + "".join(letters[int(d)] for d in f"{i:04d}") for i in range(start, stop))


PROSE = "So it is with the sea.\n" + "\n".join(f"{words(9 * i, 9 * i + 9)}." for i in range(12))
CASES = {
    "gopher_repetition": Case(
        kept=PROSE,
        dropped="\n".join(["the same line"] * 9),
        reason="gopher_repetition:dup_line_frac",
    ),
    "gopher_quality": Case(kept=PROSE, dropped="too short", reason="gopher_quality:short_doc"),
    "c4_quality": Case(
        kept=PROSE, dropped=f"{PROSE}\nSo {{ braces here.", reason="c4_quality:curly_bracket"
    ),
    "c4_bad_words": Case(
        kept=PROSE,
        dropped=f"{PROSE} dratted thing",
        reason="c4_bad_words:document_removed_with_badwords",
        needs_file=True,
    ),
    "fineweb_quality": Case(
        kept=PROSE,
        dropped=PROSE.replace(".", ""),
        reason="fineweb_quality:line_punct_ratio",
    ),
    "language": Case(kept=PROSE, dropped="", reason="language", needs_file=True),
    "regex": Case(
        kept=PROSE, dropped="a secret", reason="regex", options={"regex_exp": r"\bsecret\b"}
    ),
}
HERE = [name for name in CASES if name != "language"]
"""Those that can be had without a file; the list of bad words is written by the test."""
HUGE = {
    "prose": PROSE * 50,
    "one word": "x" * (1 << 18),
    "lines": "\n" * (1 << 15),
    "no words": "\u4f60\U0001f44d\u0000\ufffe" * (1 << 14),
}


def test_every_registered_filter_stands_here() -> None:
    assert set(CASES) == set(FILTERS)


def build(name: str, options: Mapping[str, Any]) -> Cleaner:
    cleaner = build_cleaner(CleanConfig(filters=(name,), options={name: dict(options)}))
    assert cleaner is not None
    return cleaner


@pytest.fixture
def bad_words() -> Iterator[None]:
    """Put a list of bad words where the refusal says that it belongs."""
    with pytest.raises(ConfigError, match="c4_badwords/") as error:
        check_filters(CleanConfig(filters=("c4_bad_words",)))
    place = Path(str(error.value).split("put it at ")[1].split(" and make")[0])
    mark = place.with_name(f"{place.name}.completed")
    place.write_text("dratted\n")
    mark.touch()
    yield
    place.unlink()
    mark.unlink()


@pytest.fixture(params=HERE)
def name(request: pytest.FixtureRequest, bad_words: None) -> str:
    """Each filter that can be had here."""
    return str(request.param)


def test_a_text_is_kept_or_has_the_filters_reason_each_time(name: str) -> None:
    case = CASES[name]
    cleaner = build(name, case.options)
    for _ in range(2):
        assert cleaner.clean(case.kept) == Cleaned(text=case.kept)
        assert cleaner.clean(case.dropped) == Cleaned(text=case.dropped, reason=case.reason)
    build("regex", {"regex_exp": "another is kept in between"})
    again = build(name, case.options)
    assert again is not cleaner
    assert again.clean(case.dropped) == Cleaned(text=case.dropped, reason=case.reason)


@pytest.mark.parametrize("text", ["", " ", "\n", "\0", "a", ".", "\ufeff", *HUGE])
def test_odd_and_huge_texts_are_kept_or_have_a_reason(name: str, text: str) -> None:
    text = HUGE.get(text, text)
    cleaner = build(name, CASES[name].options)
    cleaned = cleaner.clean(text)
    assert cleaned.reason is None or re.fullmatch(rf"{name}(:[a-z0-9_]+)?", cleaned.reason)
    assert cleaner.clean(text) == cleaned
    if cleaned.reason is not None:
        assert cleaned.text == text  # what is written aside is what stood in the source


def test_a_text_beyond_what_the_libraries_hold_is_dropped_unseen(name: str) -> None:
    cleaned = build(name, CASES[name].options).clean("word " * (1 << 20))
    assert cleaned.reason == TOO_LONG


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].needs_file])
def test_a_filter_that_needs_a_file_is_refused_and_names_it(name: str) -> None:
    if name == "language" and find_spec("fasttext") is None:
        match = "pip install"
    else:
        match = "needs https?://.*put it at"
    with pytest.raises(ConfigError, match=match):
        check_filters(CleanConfig(filters=(name,)))


@pytest.mark.parametrize("name", FILTER_SETS)
def test_a_set_does_what_its_members_do_in_their_order(name: str) -> None:
    members = FILTER_SETS[name]
    assert set(members) <= set(CASES)
    named = build_cleaner(CleanConfig(filters=(name,)))
    assert named is not None
    for text in (PROSE, *(CASES[member].dropped for member in HERE)):
        cleaned = named.clean(text)
        expected, spelled = text, None
        for member, options in members.items():
            step = build(member, options).clean(expected)
            expected, spelled = step.text, step.reason
            if spelled is not None:
                break
        assert cleaned == Cleaned(text=expected if spelled is None else text, reason=spelled)
