"""Random schedules of faults, each of which a seed repeats: `-m long -k 'schedule[7]'`."""

import random
from typing import Any

import pytest

from tests.chaos.checkers import check_all
from tests.chaos.conftest import Golden
from tests.chaos.harness import INTERVAL, NUM_STEPS, Chaos, chaos_run

pytestmark = [pytest.mark.slow, pytest.mark.long]

IN_STEP = ("data.next", "forward", "allreduce", "backward", "optimizer", "agree")
IN_CHECKPOINT = ("checkpoint.write", "checkpoint.rename", "checkpoint.commit")
ENDS = ("kill", "exit", "raise", "stop", "terminate")
WATCHDOG_SECONDS = 5.0
NUM_SEEDS = 30


def draw(seed: int) -> tuple[str, int, list[dict[str, Any]]]:
    """Draw a family, a stage and one or two faults, the second in the attempt after the first."""
    rng = random.Random(seed)
    family, stage = rng.choice(("gpt", "lstm_attention")), rng.choice((0, 1, 2, 3))
    # The second attempt starts at or before the first fault's step, so it reaches a later one.
    steps = sorted(rng.sample(range(2, NUM_STEPS), rng.choice((1, 2))))
    faults = []
    for number, step in enumerate(steps, 1):
        saves = step % INTERVAL == 0 and rng.random() < 0.7
        phase = rng.choice(IN_CHECKPOINT if saves else IN_STEP)
        action = rng.choice(ENDS)
        faults.append(
            {
                "id": f"{number}-{action}-{phase}-{step}", "attempt": number, "step": step,
                "phase": phase, "action": action,
                # Renames and pointers are rank 0's alone.
                "rank": 0 if saves else rng.choice((0, 1)),
                "args": {"code": 3} if action == "exit" else {},
            }
        )  # fmt: skip
    return family, stage, faults


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_schedule(chaos: Chaos, golden: Golden, seed: int) -> None:
    family, stage, faults = draw(seed)
    run = chaos_run(family, stage, guard={"watchdog_seconds": WATCHDOG_SECONDS})
    seen = chaos.survive(chaos.make("run", run), *faults)
    check_all(seen, golden(family, stage), *(fault["id"] for fault in faults))
    assert len(seen.endings) == len(faults) + 1
