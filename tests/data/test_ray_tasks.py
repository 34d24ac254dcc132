"""Tasks come back as they end, a lost worker's task is run again, a failure ends the rest."""

import os
import time
from functools import partial
from pathlib import Path

import pytest
import ray

from pipeline.data.ray_tasks import SUBMITTED_PER_CPU, explain_failure, run_each
from pipeline.errors import DataError

pytestmark = pytest.mark.usefixtures("local_ray")


def square(item: int) -> int:
    return item * item


def die_once(item: int, directory: Path) -> int:
    """Leave a mark and die; where the mark stands already, go through."""
    mark = directory / f"{item}"
    if not mark.exists():
        mark.touch()
        os._exit(1)
    return item


def fail_at_once(_item: int) -> int:
    raise DataError("item 0")


def fail_or_mark(item: int, directory: Path) -> int:
    """Fail on the first item; on any other, wait and leave a mark."""
    if item == 0:
        raise DataError(f"item {item} cannot be read")
    time.sleep(0.2)
    (directory / f"{item}").touch()
    return item


def test_more_items_than_are_submitted_at_a_time_all_come_back(tmp_path: Path) -> None:
    items = list(range(20 * SUBMITTED_PER_CPU + 1))
    results = run_each(square, items, partial(explain_failure, tmp_path))
    assert sorted(results) == [item * item for item in items]


def test_the_task_of_a_worker_that_died_is_run_again(tmp_path: Path) -> None:
    results = run_each(
        partial(die_once, directory=tmp_path), [1, 2], partial(explain_failure, tmp_path)
    )
    assert sorted(results) == [1, 2]


def test_a_failure_is_told_and_what_was_not_submitted_is_not_done(tmp_path: Path) -> None:
    task = partial(fail_or_mark, directory=tmp_path)
    with pytest.raises(DataError, match="item 0 cannot be read"):
        list(run_each(task, range(64), partial(explain_failure, tmp_path)))
    submitted = SUBMITTED_PER_CPU * int(ray.cluster_resources()["CPU"])
    # Behind those that were submitted: when it is through, they have begun.
    assert list(run_each(square, [3], partial(explain_failure, tmp_path))) == [9]
    assert len(list(tmp_path.iterdir())) < submitted < 64


def test_a_session_outlives_many_failures(tmp_path: Path) -> None:
    """Cancelling what was submitted ended this process within some 200 of them."""
    for _ in range(250):
        with pytest.raises(DataError, match="item 0"):
            list(run_each(fail_at_once, range(6), partial(explain_failure, tmp_path)))
    assert list(run_each(square, [3], partial(explain_failure, tmp_path))) == [9]
