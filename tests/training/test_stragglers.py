"""A rank that all wait for is named with its cause, once, and no other is."""

from pipeline.training.stragglers import (
    MIN_STEPS,
    WINDOW_STEPS,
    RankTimes,
    StragglerWatch,
)


def times(data: float = 0.0, forward: float = 0.2) -> RankTimes:
    return RankTimes(data_seconds=data, forward_seconds=forward)


def test_a_slow_rank_is_told_once_within_five_steps_and_again_after_it_was_well() -> None:
    watch = StragglerWatch()
    even, slow = [times(), times(), times()], [times(), times(), times(forward=0.5)]
    assert [watch.note(even) for _ in range(WINDOW_STEPS)] == [None] * WINDOW_STEPS
    told = [watch.note(slow) for _ in range(WINDOW_STEPS)]
    # Half of the window is not yet more than the other half.
    assert [number for number, found in enumerate(told, 1) if found] == [MIN_STEPS]
    found = told[MIN_STEPS - 1]
    assert found is not None
    assert (found.rank, found.cause) == (2, "compute")
    assert (found.busy_seconds, found.others_seconds) == (0.5, 0.2)
    assert found.describe() == (
        "rank 2 is a straggler by compute: 0.500 s a step where the others take 0.200 s and then "
        "wait for it"
    )
    assert [watch.note(even) for _ in range(WINDOW_STEPS)] == [None] * WINDOW_STEPS
    assert sum(watch.note(slow) is not None for _ in range(WINDOW_STEPS)) == 1


def test_a_slow_loader_is_told_from_a_slow_device() -> None:
    watch = StragglerWatch()
    told = [watch.note([times(data=0.3), times()]) for _ in range(MIN_STEPS)]
    assert told[-1] is not None
    assert (told[-1].rank, told[-1].cause) == (0, "data")


def test_single_slow_steps_small_ones_and_a_rank_alone_are_none() -> None:
    watch = StragglerWatch()
    hiccups = [[times(), times(forward=0.2 + 3.0 * (number % 3 == 0))] for number in range(30)]
    assert [watch.note(step) for step in hiccups] == [None] * 30
    tiny = StragglerWatch()
    assert [tiny.note([times(forward=0.01), times(forward=0.09)]) for _ in range(9)] == [None] * 9
    alone = StragglerWatch()
    assert [alone.note([times()]) for _ in range(9)] == [None] * 9
