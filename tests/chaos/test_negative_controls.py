"""Broken runs must turn the checkers red; a suite that passes them proves nothing.

Each control is a real run that is spoiled the way a bug would spoil it, and resumed.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.training.checkpoint_files import list_checkpoints
from tests.chaos.checkers import (
    check_curve,
    check_fired,
    check_lost_steps,
    check_pointer,
    check_samples,
)
from tests.chaos.conftest import Golden
from tests.chaos.harness import (
    INTERVAL,
    Chaos,
    History,
    attempt,
    chaos_run,
    history,
)
from tests.training.cases import GLOBAL_BATCH_SAMPLES

pytestmark = pytest.mark.slow

STOP_STEP = 2 * INTERVAL + 2


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, prepared_dir: Path) -> History:
    """A run that was stopped late, under a plan whose fault never strikes."""
    with pytest.MonkeyPatch.context() as patch:
        chaos = Chaos(tmp_path_factory.mktemp("stopped"), prepared_dir, patch)
        run_dir = chaos.make("run", chaos_run())
        chaos.plan(run_dir, {"id": "never", "phase": "forward", "action": "kill", "step": 999})
        seen = history(run_dir, [attempt(run_dir, stop_after_steps=STOP_STEP)])
        assert seen.endings[0].verdict == "stopped"
        return seen


def copied(chaos: Chaos, stopped: History) -> Path:
    """Copy a run with what the harness noted of it."""
    shutil.copytree(stopped.run_dir.parent, chaos.root, dirs_exist_ok=True)
    return chaos.root / stopped.run_dir.name


def spoiled(chaos: Chaos, stopped: History, spoil: Callable[[Path], None]) -> History:
    """Spoil what a stopped run has left, and let it go on to its end."""
    run_dir = copied(chaos, stopped)
    chaos.plan(run_dir)
    spoil(run_dir)
    last = attempt(run_dir)
    assert last.verdict == "complete"
    return history(run_dir, [*stopped.endings, last])


def rewind_loader(run_dir: Path) -> None:
    """Let the newest checkpoint name the batch before its own, under a digest that is right."""
    path = list_checkpoints(run_dir)[0] / "manifest.json"
    tree: dict[str, Any] = json.loads(path.read_text())
    del tree["digest"]
    tree["samples"] -= GLOBAL_BATCH_SAMPLES
    tree["digest"] = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(tree))


def test_a_replayed_batch_turns_curve_and_ledger_red(
    chaos: Chaos, golden: Golden, stopped: History
) -> None:
    seen = spoiled(chaos, stopped, rewind_loader)
    assert seen.samples[STOP_STEP + 1] == golden().samples[STOP_STEP]
    with pytest.raises(AssertionError):
        check_samples(seen, golden())
    with pytest.raises(AssertionError):
        check_curve(seen, golden())


def test_a_resume_from_the_start_turns_the_bound_red_though_the_curve_is_right(
    chaos: Chaos, golden: Golden, stopped: History
) -> None:
    seen = spoiled(chaos, stopped, lambda run_dir: shutil.rmtree(run_dir / "checkpoints"))
    check_curve(seen, golden())
    check_samples(seen, golden())
    assert seen.wasted_steps == STOP_STEP
    with pytest.raises(AssertionError):
        check_lost_steps(seen)


def test_a_pointer_before_its_files_and_a_fault_that_never_struck_turn_red(
    chaos: Chaos, stopped: History
) -> None:
    run_dir = copied(chaos, stopped)
    with pytest.raises(AssertionError):
        check_fired(history(run_dir, []), "never")
    check_pointer(run_dir)
    newest = list_checkpoints(run_dir)[0]
    # As if rank 1 had not finished when rank 0 let `latest` name the checkpoint.
    late = next(newest.glob("*-00001-of-*"))
    late.write_bytes(late.read_bytes()[:-1])
    with pytest.raises(AssertionError, match=late.name):
        check_pointer(run_dir)
    (run_dir / "checkpoints" / "latest").write_text("step-00000999\n")
    late.unlink()
    with pytest.raises(AssertionError):
        check_pointer(run_dir)
