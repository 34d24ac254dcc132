"""Filters: published thresholds from both sides, real text, wrong names and options."""

import json
import subprocess
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import zstandard
from huggingface_hub import cached_assets_path

import pipeline
from pipeline.config.data import CleanConfig
from pipeline.data import FILTER_SETS, FILTERS
from pipeline.data.filters import (
    LONGEST_CHARACTERS,
    build_cleaner,
    check_filters,
    filter_versions,
)
from pipeline.data.split_reader import Cleaned
from pipeline.errors import ConfigError

CORPUS = Path(pipeline.__file__).parent / "data" / "corpus"


def clean(text: str, *filters: str, **options: Any) -> Cleaned:
    cleaner = build_cleaner(CleanConfig(filters=filters, options=options))
    assert cleaner is not None
    return cleaner.clean(text)


def numbered(start: int, stop: int) -> list[str]:
    """Give different words of five letters."""
    letters = "abcdefghij"
    return ["w" + "".join(letters[int(d)] for d in f"{i:04d}") for i in range(start, stop)]


def prose(num_words: int, *tail: str) -> str:
    """Give a text of so many different words of five letters, stop words among them."""
    return " ".join(["the", "with", *numbered(0, num_words - 2 - len(tail)), *tail])


def lines(num_lines: int, num_marked: int, mark: Callable[[str], str]) -> str:
    """Give lines of five different words, the first so many of them marked."""
    made = [" ".join(numbered(5 * i, 5 * i + 5)) for i in range(num_lines)]
    made[-1] += " the with"
    return "\n".join(mark(line) if i < num_marked else line for i, line in enumerate(made))


GOPHER_QUALITY = {
    # Rae et al. 2021, appendix A: 50 to 100,000 words of mean length 3 to 10, at most 0.1 hashes
    # or ellipses a word, at most 0.9 of lines bullets and 0.3 ended by an ellipsis, at least 0.8 of
    # words with a letter, at least 2 of 8 stop words.
    "short_doc": (prose(50), prose(49)),
    "below_avg_threshold": ("the with " + "abc " * 60, "the with " + "ab " * 60),
    "above_avg_threshold": ("the with " + "abcdefghij " * 60, "the with " + "abcdefghijk " * 60),
    # 90 words and 10 hashes are 100 tokens.
    "too_many_hashes": (prose(90) + " #" * 10, prose(90) + " #" * 11),
    "too_many_ellipsis": (prose(89) + " ..." * 10 + " end", prose(89) + " ..." * 11 + " end"),
    "too_many_bullets": (
        lines(20, 18, lambda line: f"- {line}"),
        lines(20, 19, lambda line: f"- {line}"),
    ),
    "too_many_end_ellipsis": (
        lines(20, 6, lambda line: f"{line}..."),
        lines(20, 7, lambda line: f"{line}..."),
    ),
    "below_alpha_threshold": (prose(80) + " 12345" * 20, prose(80) + " 12345" * 21),
    "enough_stop_words": (prose(60), prose(60).replace("with", "word")),
}


@pytest.mark.parametrize("reason", GOPHER_QUALITY)
def test_gopher_quality_keeps_at_the_threshold_and_drops_beyond(reason: str) -> None:
    kept, dropped = GOPHER_QUALITY[reason]
    assert clean(kept, "gopher_quality") == Cleaned(text=kept)
    assert clean(dropped, "gopher_quality").reason == f"gopher_quality:{reason}"


def test_the_longest_document_is_the_published_one_unless_an_option_says_otherwise() -> None:
    from datatrove.pipeline.filters import GopherQualityFilter

    assert GopherQualityFilter().max_doc_words == 100_000
    options = {"max_doc_words": 60}
    assert clean(prose(60), "gopher_quality", gopher_quality=options).reason is None
    dropped = clean(prose(61), "gopher_quality", gopher_quality=options)
    assert dropped.reason == "gopher_quality:long_doc"


def repeated(unit: list[str], num_repeats: int, num_words: int) -> str:
    """Spread repeats of some words among different ones, so that no longer run repeats."""
    filler = numbered(0, num_words)
    per_gap = len(filler) // num_repeats
    parts = [filler[i * per_gap : (i + 1) * per_gap] for i in range(num_repeats)]
    return " ".join(" ".join([*unit, *part]) for part in parts)


# Table A1 of Rae et al. 2021. Lengths are in characters, in which all words are five letters long:
# of a text of r repeats of n words among w others, 6 (n r + w) - 1 characters. The most frequent
# n-gram counts with its n - 1 spaces, r (6 n - 1); longer repeats count without, 5 n (r - 1).
TOP_GRAMS = {2: (0.20, 10), 3: (0.18, 10), 4: (0.16, 10)}
LONG_GRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


@pytest.mark.parametrize("n", [*TOP_GRAMS, *LONG_GRAMS])
def test_an_n_gram_may_take_its_published_share(n: int) -> None:
    is_top = n in TOP_GRAMS
    num_repeats = TOP_GRAMS[n][1] if is_top else 2
    limit = TOP_GRAMS[n][0] if is_top else LONG_GRAMS[n]
    taken = num_repeats * (6 * n - 1) if is_top else 5 * n
    # One rule at a time: texts that break one mostly break its neighbours as well.
    options: dict[str, Any] = {"top_n_grams": [], "dup_n_grams": []}
    options["top_n_grams" if is_top else "dup_n_grams"] = [[n, limit]]
    reason = f"gopher_repetition:top_{n}_gram"
    if not is_top:
        reason = f"gopher_repetition:duplicated_{n}_n_grams"
    outcomes: Counter[str | None] = Counter()
    for num_others in range(16 * n * num_repeats, 0, -num_repeats * max(n // 2, 1)):
        text = repeated(numbered(9000, 9000 + n), num_repeats, num_others)
        expected = reason if taken / len(text) > limit else None
        assert clean(text, "gopher_repetition", gopher_repetition=options).reason == expected
        outcomes[expected] += 1
    assert min(outcomes[None], outcomes[reason]) >= 2


def test_the_shares_of_n_grams_are_the_published_ones() -> None:
    from datatrove.pipeline.filters import GopherRepetitionFilter

    built = GopherRepetitionFilter()
    assert dict(built.top_n_grams) == {n: limit for n, (limit, _) in TOP_GRAMS.items()}
    assert dict(built.dup_n_grams) == LONG_GRAMS


@pytest.mark.parametrize(("separator", "name"), [("\n\n", "para"), ("\n", "line")])
def test_three_tenths_of_lines_or_paragraphs_may_be_repeats(separator: str, name: str) -> None:
    different = [" ".join(numbered(20 * i, 20 * i + 20)) for i in range(8)]
    kept = separator.join([*different[:7], *["short line"] * 4])
    dropped = separator.join([*different[:5], *["short line"] * 4])
    assert 3 / 11 < 0.3 < 3 / 9
    assert clean(kept, "gopher_repetition").reason is None
    assert clean(dropped, "gopher_repetition").reason == f"gopher_repetition:dup_{name}_frac"
    long = " ".join(numbered(5000, 5040))
    dropped = separator.join([*different[:5], long, long])
    assert len(long) / len(dropped) > 0.2 > 1 / 7
    options: dict[str, Any] = {"dup_n_grams": []}
    reason = clean(dropped, "gopher_repetition", gopher_repetition=options).reason
    assert reason == f"gopher_repetition:dup_{name}_char_frac"


def sentences(num: int) -> str:
    return "\n".join(f"{' '.join(numbered(6 * i, 6 * i + 6))}." for i in range(num))


def test_c4_takes_lines_out_and_drops_documents_by_its_published_rules() -> None:
    kept = clean(sentences(5), "c4_quality")
    assert kept == Cleaned(text=sentences(5))
    assert clean(sentences(4), "c4_quality").reason == "c4_quality:too_few_sentences"
    for line in (
        "no full stop",
        "Two words.",
        "Enable Javascript now.",
        "Our cookie policy is new.",
    ):
        assert clean(f"{sentences(5)}\n{line}", "c4_quality") == kept
    long_word = f"One {'x' * 1001} here."
    assert clean(f"{sentences(5)}\n{long_word}", "c4_quality") == kept
    just_right = f"{sentences(5)}\n{long_word.replace('xx', 'x', 1)}"
    assert clean(just_right, "c4_quality").text == just_right
    cited = clean(sentences(5).replace(".", "[12].", 1), "c4_quality")
    assert cited == kept
    for line, reason in (
        ("So {braces here.", "curly_bracket"),
        ("Lorem ipsum it is.", "lorem_ipsum"),
    ):
        dropped = clean(f"{sentences(5)}\n{line}", "c4_quality")
        assert dropped.reason == f"c4_quality:{reason}"
        assert dropped.text.endswith(line)


def test_fineweb_leaves_the_rule_of_terminal_punctuation_out() -> None:
    text = sentences(12) + "\n" + " ".join(["the", "with", *numbered(200, 270)])
    assert clean(text, "c4").text == sentences(12)
    assert clean(text, "fineweb") == Cleaned(text=text)


def ended(num_lines: int, num_ended: int) -> str:
    """Give long lines of different words, the first so many of them ended by a full stop."""
    made = [" ".join(numbered(9 * i, 9 * i + 9)) for i in range(num_lines)]
    return "\n".join(f"{line}." if i < num_ended else line for i, line in enumerate(made))


FINEWEB_QUALITY = {
    # Penedo et al. 2024, section 3.6: at least 0.12 of lines end in punctuation, at most 0.67 are
    # of 30 characters or fewer, at most 0.01 of characters stand in repeated lines; at most 0.3
    # line breaks a word.
    "line_punct_ratio": (ended(25, 3), ended(26, 3)),
    "short_line_ratio": (
        "\n".join(
            ["five words in a line, yes."]
            + [f"a {w} b c d." for w in numbered(0, 1)]
            + ["quite a long line of more than thirty characters."]
        ),
        "\n".join(
            [f"a {w} b c d." for w in numbered(0, 3)]
            + ["quite a long line of more than thirty characters."]
        ),
    ),
    "list_ratio": (
        "\n".join(f"{word} {word[::-1]}{'x' * 30}." for word in numbered(0, 9)),
        "\n".join(f"{word}{'x' * 40}." for word in numbered(0, 9)),
    ),
}


@pytest.mark.parametrize("reason", FINEWEB_QUALITY)
def test_fineweb_quality_keeps_at_the_threshold_and_drops_beyond(reason: str) -> None:
    kept, dropped = FINEWEB_QUALITY[reason]
    assert clean(kept, "fineweb_quality") == Cleaned(text=kept)
    assert clean(dropped, "fineweb_quality").reason == f"fineweb_quality:{reason}"


def test_a_hundredth_of_characters_may_stand_in_repeated_lines() -> None:
    long = [" ".join(numbered(i, i + 100)) + "." for i in (0, 100, 200, 300, 400)]
    line = "x" * 29 + "."
    assert 30 / (5 * 600 + 60) < 0.01 < 31 / (5 * 600 + 62)
    assert clean("\n".join([*long, line, line]), "fineweb_quality").reason is None
    line = "x" + line
    reason = clean("\n".join([*long, line, line]), "fineweb_quality").reason
    assert reason == "fineweb_quality:char_dup_ratio"


def test_a_regex_and_a_list_of_bad_words_drop_what_they_match() -> None:
    options = {"regex_exp": r"\bsecret\b"}
    assert clean("a secret here", "regex", regex=options).reason == "regex"
    assert clean("a secretary here", "regex", regex=options).reason is None
    with pytest.raises(ConfigError, match="needs https://raw.*put it at /.*c4_badwords/") as error:
        check_filters(CleanConfig(filters=("c4_bad_words",)))
    place = Path(str(error.value).split("put it at ")[1].split(" and make")[0])
    place.write_text("dratted\n")
    place.with_name(f"{place.name}.completed").touch()
    try:
        assert clean("this dratted thing", "c4_bad_words").reason == (
            "c4_bad_words:document_removed_with_badwords"
        )
        assert clean("this other thing", "c4_bad_words").reason is None
    finally:
        place.unlink()
        place.with_name(f"{place.name}.completed").unlink()
    assert place.is_relative_to(cached_assets_path("datatrove", "filters", "c4_badwords"))


def test_a_text_without_any_line_left_is_dropped() -> None:
    options = {"min_num_sentences": -1}
    assert clean("no stop", "c4_quality", c4_quality=options).reason == "c4_quality:nothing_left"


def test_a_text_too_long_to_filter_is_dropped_whatever_the_filter() -> None:
    options = {"regex_exp": "b"}
    assert clean("a" * LONGEST_CHARACTERS, "regex", regex=options).reason is None
    assert (
        clean("a" * (LONGEST_CHARACTERS + 1), "regex", regex=options).reason == "filters:too_long"
    )


def test_the_embedded_corpus_loses_what_the_rules_say() -> None:
    """Counted once by datatrove's own classes in a loop of their own, below."""
    from datatrove.data import Document
    from datatrove.pipeline import filters

    with zstandard.open(CORPUS / "classics.jsonl.zst", "rt", encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line in list(stream)[:3]]
    shakespeare = (CORPUS / "tinyshakespeare.txt").read_text()
    texts += [shakespeare[i : i + 4096] for i in range(0, 40 * 1024, 4096)]
    stages = [
        ("gopher_repetition", filters.GopherRepetitionFilter()),
        ("gopher_quality", filters.GopherQualityFilter()),
        ("c4_quality", filters.C4QualityFilter(filter_no_terminal_punct=False)),
        ("fineweb_quality", filters.FineWebQualityFilter()),
    ]
    expected: Counter[str] = Counter()
    for text in texts:
        documents = [Document(text=text, id="")]
        for name, stage in stages:
            before = len(documents)
            documents = list(stage.run(documents))
            if len(documents) < before:
                expected[name] += 1
    found = Counter(
        reason.split(":")[0] for text in texts if (reason := clean(text, "fineweb").reason)
    )
    assert found == expected
    assert found["gopher_quality"] > 0


def test_sets_name_filters_that_exist_and_all_but_those_with_needs_can_be_had() -> None:
    for name, members in FILTER_SETS.items():
        assert name not in FILTERS
        assert set(members) <= set(FILTERS)
        check_filters(CleanConfig(filters=(name,)))
    assert list(FILTER_SETS["fineweb"]) == [
        "gopher_repetition",
        "gopher_quality",
        "c4_quality",
        "fineweb_quality",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"filters": ["gofer"]}, r"names 'gofer'; nearest: gopher$"),
        ({"filters": ["zzz"]}, r"names 'zzz'; known: gopher, c4, fineweb, gopher_repetition"),
        ({"filters": ["gopher", "fineweb"]}, r"gopher_repetition twice, by 'gopher' and by 'fine"),
        ({"options": {"c4_quality": {}}}, "for 'c4_quality', which is not on; no filter is on"),
        (
            {"filters": ["gopher_quality"], "options": {"gopher_quality": {"max_doc_word": 9}}},
            "max_doc_word=9: there is no such option; nearest: max_doc_words",
        ),
        (
            {"filters": ["gopher_quality"], "options": {"gopher_quality": {"max_doc_words": "9"}}},
            "max_doc_words='9' is not of the type of its default, 100000",
        ),
        (
            {"filters": ["c4_quality"], "options": {"c4_quality": {"min_num_sentences": True}}},
            "min_num_sentences=True is not of the type of its default, 5",
        ),
        (
            {"filters": ["c4_bad_words"], "options": {"c4_bad_words": {"keep_fraction": 0.1}}},
            "there is no such option",
        ),
        ({"filters": ["regex"]}, r"filter regex needs data\.clean\.options\.regex\.regex_exp"),
        ({"filters": ["regex"], "options": {"regex": {"regex_exp": "("}}}, "no regular expression"),
        (
            {"filters": ["fineweb"], "options": {"fineweb_quality": {"language": "qqq"}}},
            r"fineweb_quality\.language: Language 'qqq'",
        ),
        ({"filters": ["language"]}, "lid.176.bin|pip install fasttext-numpy2-wheel"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_way_out(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_filters(CleanConfig(**fields))


def test_without_the_extra_a_filter_names_the_install_line_and_nothing_else_needs_it(
    run_without_clean: Callable[[str], subprocess.CompletedProcess[str]],
) -> None:
    script = (
        "from pipeline.config.data import CleanConfig\n"
        "from pipeline.data.filters import build_cleaner, check_filters\n"
        "from pipeline.errors import ConfigError\n"
        "check_filters(CleanConfig(deduplicate='exact'))\n"
        "assert build_cleaner(CleanConfig()) is None\n"
        "for on in ({'filters': ['c4']}, {'deduplicate': 'minhash'}):\n"
        "    try: check_filters(CleanConfig(**on))\n"
        "    except ConfigError as exc: print(exc)\n"
    )
    result = run_without_clean(script)
    assert result.stdout.splitlines() == [
        "data.clean.filters=['c4'] needs the package datatrove, which is missing: "
        "pip install 'tandem-pretraining[clean]'",
        "data.clean.deduplicate=minhash needs the package rensa, which is missing: "
        "pip install 'tandem-pretraining[clean]'",
    ], result.stderr


def test_versions_stand_for_what_is_on() -> None:
    assert filter_versions(CleanConfig()) == {}
    on = CleanConfig(filters=("c4",), deduplicate="minhash")
    assert filter_versions(on) == {n: version(n) for n in ("datatrove", "spacy", "rensa")}
