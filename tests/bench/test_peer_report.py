"""The benchmark's verdicts: a missed target, a differing id or an absent peer is never passed."""

from dataclasses import replace

import pytest

from tests.bench.peer_report import Result, judge
from tests.bench.timing import Spread


def result(megabytes_per_second: float, differing_documents: int | None = None) -> Result:
    one = Spread.of([1.0])
    return Result(
        text_bytes=int(megabytes_per_second * 1e6),
        seconds=one,
        start_seconds=one,
        differing_documents=differing_documents,
    )


GOOD = {
    "datasets": result(2.0, differing_documents=0),
    "datatrove": result(4.0, differing_documents=0),
    "bare/plain": result(120.0),
    "tandem/plain": result(60.0, differing_documents=0),
}


def missed(results: dict[str, Result], absent: dict[str, str], unequal: list[str]) -> list[str]:
    return [v.claim for v in judge(results, absent, unequal) if not v.is_met]


def test_targets_that_are_just_reached_are_met() -> None:
    assert missed(GOOD, {}, []) == []


@pytest.mark.parametrize(
    ("name", "rate", "claim"),
    [
        ("datatrove", 4.1, "tandem/plain at least 15 times the fastest peer"),
        ("bare/plain", 121.0, "tandem/plain at least 0.5 times bare"),
    ],
)
def test_a_target_that_is_not_reached_is_missed(name: str, rate: float, claim: str) -> None:
    assert missed(GOOD | {name: result(rate)}, {}, []) == [claim]


def test_a_differing_document_a_differing_shard_and_an_absent_peer_are_missed() -> None:
    differing = GOOD | {"tandem/plain": replace(GOOD["tandem/plain"], differing_documents=1)}
    assert missed(differing, {"ray_rows": "pip install ray"}, ["train-00000.idx"]) == [
        "ids equal those of tokenizers on every document",
        "shards equal Megatron's byte for byte",
        "every peer ran",
    ]


def test_the_spread_is_median_smallest_and_largest() -> None:
    assert Spread.of([3.0, 1.0, 2.5]) == Spread(median=2.5, min=1.0, max=3.0)
