"""Every point at which a save can be cut off, by a kill or by a power loss."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.training.checkpoint_commit import read_pointer
from pipeline.training.checkpoint_files import DIRECTORY, sorted_names, verify_stored
from pipeline.training.checkpoint_store import LocalStore
from pipeline.training.distributed import RankContext
from tests.training.crashing_disk import CRASHED, CrashingDisk, Mutant
from tests.training.rank_pool import call_in_process
from tests.training.stub_engine import StubEngine, checkpointer, train_state

pytestmark = pytest.mark.slow
ALONE = RankContext(
    rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu")
)
LAST, NEXT = 2, 3
"""Step of the newest checkpoint before the save that is cut off, and of that save."""


def save_next(run_dir: Path, disk: CrashingDisk) -> None:
    """What an attempt does with checkpoints: take the run over, restore, save, prune."""
    with checkpointer(ALONE, run_dir, store=LocalStore(run_dir / DIRECTORY, disk)) as saver:
        saver.restore(StubEngine(0.0), [].append)  # type: ignore[arg-type]
        saver.save(StubEngine(float(NEXT)), train_state(NEXT), 2)  # type: ignore[arg-type]


def unsynced(run_dir: Path) -> LocalStore:
    return LocalStore(run_dir / DIRECTORY, CrashingDisk())


def find_violations(run_dir: Path) -> list[str]:
    """Give what is wrong with what a crash left, by the invariants of reliable checkpoints."""
    store = LocalStore(run_dir / DIRECTORY)
    verified = [name for name in sorted_names(store.entries()) if verifies(store, name)]
    problems = [] if len(verified) >= 2 else [f"only {verified} verify"]
    if (named := read_pointer(store)) not in verified:
        problems.append(f"latest names {named}, which does not verify")
    engine = StubEngine(0.0)
    said: list[str] = []
    with checkpointer(ALONE, run_dir, store=unsynced(run_dir)) as saver:
        try:
            state = saver.restore(engine, said.append)  # type: ignore[arg-type]
            saver.save(StubEngine(4.0), train_state(4), 3)  # type: ignore[arg-type]
        except CheckpointError as exc:
            return [*problems, str(exc)]
    problems += said
    if state not in (train_state(LAST), train_state(NEXT)) or engine.imported is None:
        return [*problems, f"resumed at {state}"]
    expected = StubEngine(float(state.step)).export_state()
    for kind in ("parameters", "exp_avg", "exp_avg_sq"):
        for name, tensor in getattr(expected, kind).items():
            if not torch.equal(getattr(engine.imported, kind)[name], tensor):
                problems.append(f"{kind} of {name} are not those of step {state.step}")
    left = [name for name in store.entries() if name.startswith(".tmp-")]
    return problems + [f"the next save left {name} behind" for name in left]


def verifies(store: LocalStore, name: str) -> bool:
    try:
        verify_stored(store, name)
    except CheckpointError:
        return False
    return True


def cut_off_everywhere(
    root: Path, loses_unsynced: bool, mutant: Mutant, since: str = ""
) -> tuple[list[str], dict[str, list[str]]]:
    """Cut the save off after each operation; give the operations, and violations by operation.

    `since` names the first operation of interest.
    """
    good = root / "good"
    for step in (1, LAST):
        with checkpointer(ALONE, good, store=unsynced(good)) as saver:
            saver.save(StubEngine(float(step)), train_state(step), 1)  # type: ignore[arg-type]
    whole = CrashingDisk(mutant=mutant)
    save_next(Path(shutil.copytree(good, root / "whole")), whole)
    violations = {}
    first = next(i for i, done in enumerate(whole.operations) if done.startswith(since))
    for number, operation in list(enumerate(whole.operations, 1))[first:]:
        run_dir = Path(shutil.copytree(good, root / f"{number}"))
        child = os.fork()
        if child == 0:
            disk = CrashingDisk(number, loses_unsynced=loses_unsynced, mutant=mutant)
            save_next(run_dir, disk)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == CRASHED, f"the crash after {operation} did not fire: exit code {code}"
        if problems := find_violations(run_dir):
            violations[f"{number}: {operation}"] = problems
        shutil.rmtree(run_dir)
    return whole.operations, violations


@pytest.mark.parametrize("loses_unsynced", [False, True], ids=["killed", "power lost"])
def test_save_cut_off_after_any_operation_leaves_a_whole_checkpoint(
    tmp_path: Path, loses_unsynced: bool
) -> None:
    answer = call_in_process(cut_off_everywhere, {}, tmp_path, loses_unsynced, "none")
    assert isinstance(answer, tuple), answer
    operations, violations = answer
    assert violations == {}
    # Each step of the protocol was cut off: files, manifest, move, pointer, removal of the oldest.
    for last in ("sync weights-", "sync manifest", "rename step-", "rename latest", "remove .tmp-"):
        assert any(operation.startswith(last) for operation in operations), last


@pytest.mark.parametrize(
    ("mutant", "loses_unsynced"),
    [("no file sync", True), ("no directory sync", True), ("pointer first", False)],
)
def test_broken_protocol_is_seen(tmp_path: Path, mutant: Mutant, loses_unsynced: bool) -> None:
    since = "create manifest"
    answer = call_in_process(cut_off_everywhere, {}, tmp_path, loses_unsynced, mutant, since)
    assert isinstance(answer, tuple), answer
    assert answer[1]
