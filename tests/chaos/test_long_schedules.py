"""Random schedules of one to three faults, each of which its seed repeats."""

import json
import random
from typing import Any

import pytest

from tests.chaos.checkers import check_all
from tests.chaos.conftest import Golden, Note
from tests.chaos.harness import INTERVAL, NUM_STEPS, Chaos, chaos_run

pytestmark = [pytest.mark.slow, pytest.mark.long]

IN_STEP = ("data.next", "forward", "allreduce", "backward", "optimizer", "agree")
IN_CHECKPOINT = ("checkpoint.write", "checkpoint.rename", "checkpoint.commit")
ENDS = ("kill", "kill", "exit", "raise", "stop", "terminate")
"""A killed rank is the commonest of losses."""
WATCHDOG_SECONDS = 5.0
NUM_SEEDS = 32


def draw(seed: int) -> tuple[str, int, list[dict[str, Any]]]:
    """Draw a family, a ZeRO stage and faults, each of the attempt that the one before it left."""
    rng = random.Random(seed)
    family, stage = rng.choice(("gpt", "lstm_attention")), rng.choice((0, 1, 2, 3))
    faults: list[dict[str, Any]] = []
    number = 1
    # An attempt begins at or before the step of the last fault, so it comes to a later one.
    for step in sorted(rng.sample(range(2, NUM_STEPS), rng.choice((1, 2, 3)))):
        saves = step % INTERVAL == 0 and rng.random() < 0.7
        phase = rng.choice(IN_CHECKPOINT if saves else IN_STEP)
        # A signal while a checkpoint is written beside training may come after the last step.
        action = rng.choice([a for a in ENDS if not saves or a != "terminate"] + ["sleep"])
        faults.append(
            {
                "id": f"{number}-{action}-{phase}-{step}", "attempt": number, "step": step,
                "phase": phase, "action": action,
                # Renames and pointers are rank 0's alone.
                "rank": 0 if saves else rng.choice((0, 1)),
                "args": {"exit": {"code": 3}, "sleep": {"seconds": 0.2}}.get(action, {}),
            }
        )  # fmt: skip
        number += action != "sleep"
    return family, stage, faults


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_schedule(chaos: Chaos, golden: Golden, note: Note, seed: int) -> None:
    family, stage, faults = draw(seed)
    print(f"repeat: pytest -m long 'tests/chaos/test_long_schedules.py::test_schedule[{seed}]'")
    print(f"{family}, ZeRO {stage}: {json.dumps(faults)}")
    # As many attempts as faults may come to nothing before the first checkpoint.
    guard = {"watchdog_seconds": WATCHDOG_SECONDS, "max_attempts_without_progress": 4}
    run = chaos_run(family, stage, guard=guard)
    seen = chaos.survive(chaos.make("run", run), *faults)
    check_all(seen, golden(family, stage), *(fault["id"] for fault in faults))
    ends = [fault for fault in faults if fault["action"] != "sleep"]
    assert len(seen.endings) == len(ends) + 1
    note("random", seen)
