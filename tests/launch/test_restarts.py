"""A lost run begins again while it gets on, and ends where it does not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.rank_record import RankFailure
from launch.restarts import FILE, run_with_restarts
from pipeline.errors import LaunchError
from pipeline.tracking.store import Verdict


class Attempts:
    """Attempts that fail after given checkpoints, and then complete."""

    def __init__(self, *steps: int | None, is_final: bool = False) -> None:
        self.number = 0
        self._steps = steps
        self._is_final = is_final

    def __call__(self) -> Verdict:
        self.number += 1
        if self.number > len(self._steps):
            return "complete"
        step = self._steps[self.number - 1]
        raise RankFailure(f"rank 1 was lost ({self.number})", step=step, is_final=self._is_final)


def run(
    attempts: Attempts, run_dir: Path, max_failures: int = 3, is_stopping: bool = False
) -> tuple[Verdict, list[str]]:
    said: list[str] = []
    may_restart: Callable[[], bool] = lambda: not is_stopping  # noqa: E731
    verdict = run_with_restarts(
        attempts, run_dir, max_failures=max_failures, may_restart=may_restart, on_event=said.append
    )
    return verdict, said


def test_every_failure_is_told_and_written_and_the_run_goes_on(tmp_path: Path) -> None:
    attempts = Attempts(None, 20)
    verdict, said = run(attempts, tmp_path)
    assert verdict == "complete"
    assert attempts.number == 3
    assert said == [
        "rank 1 was lost (1)\nattempting again from its start; failure 1 in a row",
        "rank 1 was lost (2)\nattempting again from step 20; failure 1 in a row",
    ]
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line["message"] for line in lines] == ["rank 1 was lost (1)", "rank 1 was lost (2)"]
    assert [line["checkpoint_step"] for line in lines] == [None, 20]


def test_failures_without_a_new_checkpoint_end_the_run(tmp_path: Path) -> None:
    attempts = Attempts(10, 20, 20, 20, 20)
    with pytest.raises(LaunchError, match=r"^3 failures in a row without .*rank 1 was lost \(4\)"):
        run(attempts, tmp_path)
    assert attempts.number == 4


def test_a_run_that_gains_checkpoints_may_fail_more_often(tmp_path: Path) -> None:
    attempts = Attempts(10, 20, 30, 40, 50)
    assert run(attempts, tmp_path, max_failures=2)[0] == "complete"
    assert attempts.number == 6


def test_one_failure_may_be_the_last(tmp_path: Path) -> None:
    attempts = Attempts(10)
    with pytest.raises(LaunchError, match=r"max_failures=1"):
        run(attempts, tmp_path, max_failures=1)
    assert attempts.number == 1


@pytest.mark.parametrize(("is_final", "is_stopping"), [(True, False), (False, True)])
def test_what_would_repeat_itself_or_is_to_stop_is_not_attempted_again(
    is_final: bool, is_stopping: bool, tmp_path: Path
) -> None:
    attempts = Attempts(10, is_final=is_final)
    with pytest.raises(RankFailure, match=r"^rank 1 was lost \(1\)$"):
        run(attempts, tmp_path, is_stopping=is_stopping)
    assert attempts.number == 1
