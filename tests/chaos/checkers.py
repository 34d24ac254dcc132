"""From a history to the invariants that it must keep; each raises AssertionError where it does not.

They are numbered: I1 the loss curve, I3 the
ledger of samples, I4 the bound on lost steps, I5 the verdict, I7 the pointer.
"""

import math
import re
from pathlib import Path

import pytest

from pipeline.errors import CheckpointError
from pipeline.tracking.store import read_verdict
from pipeline.training.checkpoint_files import list_checkpoints, verify_checkpoint
from tests.chaos.harness import INTERVAL, NUM_STEPS, Ending, History

DETECTION_SECONDS = 15
RECOVERY_SECONDS = 60
"""What a lost rank may cost: until the launcher says so, and until the first new step."""


def check_all(seen: History, golden: History, *fault_ids: str) -> None:
    """Check everything that a run of the same world size must keep."""
    check_fired(seen, *fault_ids)
    check_curve(seen, golden)
    check_samples(seen, golden)
    check_lost_steps(seen)
    check_writer(seen)
    check_pointer(seen.run_dir)
    check_verdict(seen)
    check_tidy(seen.run_dir)


def check_fired(seen: History, *fault_ids: str) -> None:
    """Each planned fault struck, once, and no other."""
    assert sorted(line["id"] for line in seen.fired) == sorted(fault_ids)


def check_curve(seen: History, golden: History) -> None:
    """I1: every loss and the final state are those of the run without faults, bit for bit."""
    assert sorted(golden.losses) == list(range(1, NUM_STEPS + 1))
    assert seen.losses == golden.losses
    assert seen.weights == golden.weights


def check_samples(seen: History, golden: History) -> None:
    """I3: each step read the samples of the run without faults: none twice, none left out."""
    assert sorted(golden.samples) == list(range(1, NUM_STEPS + 1))
    assert seen.samples == golden.samples


def check_lost_steps(seen: History) -> None:
    """I4: each restart lost at most an interval and the step in progress.

    A checkpoint that is written beside training may stand one interval later than it was begun.
    """
    num_restarts = len(seen.endings) - 1
    assert seen.wasted_steps <= num_restarts * (2 * INTERVAL + 1)


def check_times(seen: History) -> None:
    """I6: a lost rank is noticed soon, and the next attempt trains soon after."""
    assert len(seen.detection_seconds) == len(seen.recovery_seconds) == len(seen.fired)
    assert max(seen.detection_seconds) < DETECTION_SECONDS
    assert max(seen.recovery_seconds) < RECOVERY_SECONDS


def check_writer(seen: History) -> None:
    """One attempt wrote at a time, each after the one before, and nobody holds the directory."""
    assert [e.seq for e in seen.events] == list(range(len(seen.events)))
    attempts = [e.attempt for e in seen.events]
    assert attempts == sorted(attempts)
    tokens = [path.name for path in (seen.run_dir / "checkpoints").glob("owner-*")]
    assert len(tokens) == 1, f"several claim the checkpoints: {tokens}"


def check_pointer(run_dir: Path) -> None:
    """I7: `latest` names a checkpoint, the newest, and all that stand verify."""
    found = list_checkpoints(run_dir)
    assert found, "no checkpoint stands"
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == found[0].name
    for checkpoint in found:
        try:
            verify_checkpoint(checkpoint)
        except CheckpointError as exc:
            raise AssertionError(str(exc)) from exc


def check_left_out(seen: History, golden: History, step: int) -> None:
    """A poisoned step was applied by nobody, and nothing else changed before or after it."""
    check_samples(seen, golden)
    check_verdict(seen)
    check_writer(seen)
    check_pointer(seen.run_dir)
    assert len(seen.endings) == 1
    assert [e.step for e in seen.events if e.kind == "skip"] == [step]
    # A loss is taken before its step's update, so the one that is left out shows a step later.
    before = range(1, step)
    assert {s: seen.losses[s] for s in before} == {s: golden.losses[s] for s in before}
    assert math.isnan(float.fromhex(seen.losses[step]))
    later = [float.fromhex(seen.losses[s]) for s in range(step + 1, NUM_STEPS + 1)]
    assert all(map(math.isfinite, later))
    assert seen.losses[step + 1] != golden.losses[step + 1]
    assert verify_checkpoint(list_checkpoints(seen.run_dir)[0]).skipped_total == 1


def check_moved(
    seen: History, golden: History, stages: tuple[int, int], worlds: tuple[int, int]
) -> None:
    """A run went on at another stage and world size, with the same global batches."""
    check_samples(seen, golden)
    check_verdict(seen)
    check_writer(seen)
    check_pointer(seen.run_dir)
    begins = [e.values for e in seen.events if e.kind in ("start", "resume")]
    assert tuple(values["zero_stage"] for values in begins) == stages
    assert tuple(values["world_size"] for values in begins) == worlds
    # Sums over other ranks round in another order.
    expected = {s: float.fromhex(x) for s, x in golden.losses.items()}
    found = {s: float.fromhex(x) for s, x in seen.losses.items()}
    assert found == pytest.approx(expected, rel=1e-4)


def check_refused(seen: History, refused: Ending, fault_id: str) -> None:
    """F24: three attempts met the same fault, and the fourth start was refused with the evidence.

    Args:
        seen: The run after all four.
        refused: The fourth.
        fault_id: What each of them met.
    """
    assert [line["id"] for line in seen.fired] == [fault_id] * 3
    told = str(refused.error)
    assert "3 attempts in a row began at step 0 and ended without a later checkpoint" in told
    for number in (1, 2, 3):
        assert re.search(rf"attempt {number}: reached step \d+, .*injected fault", told)
    assert refused.error is not None
    assert refused.error.exit_code == 1
    assert read_verdict(seen.run_dir) is None
    # The refused start has left no event.
    assert {event.attempt for event in seen.events} == {1, 2, 3}


def check_verdict(seen: History) -> None:
    """I5: only the last attempt is complete, it left its mark, and each other one named a cause."""
    *earlier, last = seen.endings
    assert last.verdict == "complete", last.error
    assert read_verdict(seen.run_dir) == "complete"
    for ending in earlier:
        assert ending.verdict == "stopped" or ending.error is not None
        assert ending.error is None or "rank" in str(ending.error)


def check_tidy(run_dir: Path) -> None:
    """No file of an unfinished write is left."""
    left = [path for path in run_dir.rglob("*") if ".tmp" in path.name]
    assert not left, f"unfinished writes are left: {left}"
