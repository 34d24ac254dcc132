"""Saves beside training: what they hold, when they are known to stand, and how they fail."""

import errno
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.training.checkpoint import Checkpointer
from pipeline.training.checkpoint_commit import check_owner, claim, read_pointer
from pipeline.training.checkpoint_files import (
    DIRECTORY,
    list_checkpoints,
    load_state,
    read_manifest,
    verify_checkpoint,
)
from pipeline.training.checkpoint_store import Buffer, Disk, LocalStore
from pipeline.training.checkpoint_tensors import write_tensors
from pipeline.training.distributed import RankContext
from pipeline.training.engine import EngineState
from tests.training.cases import my_batches, small_engine, small_run
from tests.training.rank_pool import RankPool
from tests.training.stub_engine import StubEngine, checkpointer, train_state

pytestmark = pytest.mark.slow
KINDS = ("parameters", "exp_avg", "exp_avg_sq")
EVERY_STEP: dict[str, Any] = {"every_steps": 1}


class GatedDisk(Disk):
    """Writes tensor files only while its gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def write(self, path: Path, chunks: Iterable[Buffer]) -> None:
        if path.suffix == ".safetensors":
            assert self.gate.wait(60.0)
        super().write(path, chunks)


class TurnedDisk(Disk):
    """Forces its first file to disk only once it is asked to write a second."""

    def __init__(self) -> None:
        self.second = threading.Event()
        self.synced: list[str] = []

    def write(self, path: Path, chunks: Iterable[Buffer]) -> None:
        if path.name == "second":
            self.second.set()
        super().write(path, chunks)

    def sync(self, path: Path) -> None:
        if path.name == "first":
            assert self.second.wait(60.0)
        super().sync(path)
        self.synced.append(path.name)


class UnsyncableDisk(Disk):
    """Takes what is written, and fails to keep it."""

    def sync(self, path: Path) -> None:
        if path.name == "first":
            raise OSError(errno.EIO, "lost", str(path))
        super().sync(path)


class FullDisk(Disk):
    """Has no room for tensor files."""

    def write(self, path: Path, chunks: Iterable[Buffer]) -> None:
        if path.suffix == ".safetensors":
            raise OSError(errno.ENOSPC, "no space left", str(path))
        super().write(path, chunks)


def store_on(run_dir: Path, disk: Disk) -> LocalStore:
    return LocalStore(run_dir / DIRECTORY, disk)


def tensors(state: EngineState) -> dict[str, torch.Tensor]:
    return {f"{k}/{n}": t.clone() for k in KINDS for n, t in getattr(state, k).items()}


def test_files_are_synced_while_the_next_are_written_and_all_before_the_write_ends(
    tmp_path: Path,
) -> None:
    disk = TurnedDisk()
    LocalStore(tmp_path, disk).write({"in/first": [b"1"], "in/second": [b"2", b"3"]})
    assert sorted(disk.synced) == ["first", "second"]
    assert (tmp_path / "in" / "second").read_bytes() == b"23"


def test_file_that_the_disk_loses_fails_the_write(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="lost"):
        LocalStore(tmp_path, UnsyncableDisk()).write({"in/first": [b"1"], "in/second": [b"2"]})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_number_that_is_not_finite_is_refused_and_the_largest_that_is_are_not(
    tmp_path: Path, number: float
) -> None:
    most = torch.finfo(torch.float32).max
    tensors = {"ends": torch.tensor([most, most, -most]), "none": torch.empty(0)}
    store = LocalStore(tmp_path)
    assert write_tensors(store, {"in/good": ("exp_avg", tensors)})[0].tensors == ["ends", "none"]
    for place in (0, 70):
        bad = torch.ones(71)
        bad[place] = number
        with pytest.raises(CheckpointError, match="exp_avg of bad is not finite"):
            write_tensors(store, {"in/bad": ("exp_avg", {**tensors, "bad": bad})})


def train_beside_a_save(ranks: RankContext, run_dir: Path) -> tuple[list[int], float, float, bool]:
    """Begin a save after two steps, hold its files back during two more, then let them go."""
    run = small_run(checkpoint={"every_steps": 2})
    engine, _ = small_engine(ranks, run, "torch")
    disk = GatedDisk()
    model = StubModel(engine.export_state().parameters)
    saver = Checkpointer(run_dir, run, "data", model, ranks, store_on(run_dir, disk))
    steps_of_commits: list[int] = []
    with saver:
        for step in (1, 2, 3):
            engine.train_step(my_batches(ranks, step), 3e-3)
            if step == 2:
                expected = tensors(engine.export_state())
            commits = saver.advance(engine, train_state(step), 1, dict)
            steps_of_commits += [commit.step for commit in commits]
        changed = tensors(engine.export_state())
        assert not torch.equal(changed["exp_avg/embedding_VD"], expected["exp_avg/embedding_VD"])
        assert not list_checkpoints(run_dir)
        disk.gate.set()
        commit = saver.save(engine, train_state(3), 1)[0]
    checkpoint = run_dir / DIRECTORY / "step-00000002"
    found = tensors(load_state(checkpoint, verify_checkpoint(checkpoint)))
    is_same = all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    blocked, seconds = commit.values["blocked_seconds"], commit.values["seconds"]
    return [*steps_of_commits, commit.step], blocked, seconds, is_same and len(found) > 0


class StubModel(torch.nn.Module):
    """Names and sizes of parameters, dots included."""

    def __init__(self, parameters: Any) -> None:
        super().__init__()
        self._named = {name: torch.nn.Parameter(tensor) for name, tensor in parameters.items()}

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self._named.items())


def test_training_goes_on_while_the_state_of_the_step_is_written(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    for commits, blocked, seconds, is_same in two_ranks.run(train_beside_a_save, tmp_path):
        assert commits == [2]
        assert is_same
        assert 0.0 < blocked < seconds


def two_saves(ranks: RankContext, run_dir: Path) -> tuple[list[int], list[int], list[str]]:
    """Begin a save at one step and the next at the following."""
    with checkpointer(ranks, run_dir, small_run(checkpoint=EVERY_STEP)) as saver:
        first = saver.advance(StubEngine(1.0), train_state(1), 1, dict)  # type: ignore[arg-type]
        second = saver.advance(StubEngine(2.0), train_state(2), 1, dict)  # type: ignore[arg-type]
        standing = [p.name for p in list_checkpoints(run_dir)]
        # No further save is due at this step: only what is under way is waited for.
        last = saver.save(StubEngine(9.0), train_state(2), 1)  # type: ignore[arg-type]
    return [c.step for c in first + second], [c.step for c in last], standing


def test_next_save_begins_when_the_one_before_stands(two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(two_saves, tmp_path) == [([1], [2], ["step-00000001"])] * 2
    checkpoint = list_checkpoints(tmp_path)[0]
    state = load_state(checkpoint, verify_checkpoint(checkpoint))
    assert torch.equal(state.parameters["bias"], torch.arange(4) * 2.0)


def fail_on_rank_1(ranks: RankContext, run_dir: Path) -> tuple[int, str]:
    """Save where rank 1 has no room; give the step at which the error came, and the error."""
    run = small_run(checkpoint={"every_steps": 2})
    store = store_on(run_dir, FullDisk() if ranks.rank == 1 else Disk())
    with checkpointer(ranks, run_dir, run, store=store) as saver:
        for step in range(2, 100_000):
            try:
                saver.advance(StubEngine(1.0), train_state(step), 1, dict)  # type: ignore[arg-type]
            except CheckpointError as exc:
                return step, str(exc)
    raise AssertionError("the fault did not come up")


def test_failure_of_one_writer_comes_up_at_one_step_on_all_ranks(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    first, second = two_ranks.run(fail_on_rank_1, tmp_path)
    assert first == second
    # Another save is due at step 4 and would wait for it.
    assert first[0] in (3, 4)
    assert "step-00000002 failed: rank 1: " in first[1]
    assert "no space left" in first[1]
    # Three numbers of four bytes for each of 28 parameters.
    assert "a checkpoint needs 336 bytes" in first[1]
    assert first[1].endswith("no checkpoint stands")
    assert [p.name for p in (tmp_path / DIRECTORY).glob("*step-*")] == []


def advance_at(ranks: RankContext, run_dir: Path, seconds_by_rank: list[float]) -> list[int]:
    """Give the steps of five that are saved, where ranks differ in what their clocks say."""
    run = small_run(checkpoint={"every_seconds": seconds_by_rank[ranks.rank]})
    commits = []
    with checkpointer(ranks, run_dir, run) as saver:
        for step in range(1, 6):
            commits += saver.advance(StubEngine(1.0), train_state(step), 1, dict)  # type: ignore[arg-type]
        commits += saver.save(StubEngine(1.0), train_state(5), 1)  # type: ignore[arg-type]
    return [commit.step for commit in commits]


@pytest.mark.parametrize(
    ("seconds_by_rank", "saved"), [([1e-6, 3600.0], [1, 2, 3, 4, 5]), ([3600.0, 1e-6], [5])]
)
def test_clock_of_the_first_rank_decides_on_saves_by_time(
    two_ranks: RankPool, tmp_path: Path, seconds_by_rank: list[float], saved: list[int]
) -> None:
    assert two_ranks.run(advance_at, tmp_path, seconds_by_rank) == [saved] * 2


def save_as_two_owners(ranks: RankContext, run_dir: Path) -> tuple[str, str | None, str]:
    """Let an attempt stall with a save due, another take the run over, and the first wake up."""
    nothing: list[str] = []
    with checkpointer(ranks, run_dir) as stalled, checkpointer(ranks, run_dir) as owner:
        stalled.restore(StubEngine(0.0), nothing.append)  # type: ignore[arg-type]
        stalled.save(StubEngine(1.0), train_state(1), 1)  # type: ignore[arg-type]
        owner.restore(StubEngine(0.0), nothing.append)  # type: ignore[arg-type]
        owner.save(StubEngine(2.0), train_state(2), 2)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError) as caught:
            stalled.save(StubEngine(3.0), train_state(3), 1)  # type: ignore[arg-type]
        named = read_pointer(LocalStore(run_dir / DIRECTORY))
        owner.save(StubEngine(4.0), train_state(4), 2)  # type: ignore[arg-type]
    return str(caught.value), named, list_checkpoints(run_dir)[0].name


def test_owner_that_wakes_up_after_a_takeover_commits_no_more(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    for message, named, newest in two_ranks.run(save_as_two_owners, tmp_path):
        assert "took the run over" in message
        assert (named, newest) == ("step-00000002", "step-00000004")
    owners = [read_manifest(checkpoint).owner for checkpoint in list_checkpoints(tmp_path)]
    assert [owner.partition("-")[0] for owner in owners] == ["00000002", "00000002"]


def test_of_many_that_claim_at_once_one_is_the_owner(tmp_path: Path) -> None:
    def owns(store: LocalStore, token: str) -> bool:
        try:
            check_owner(store, token)
        except CheckpointError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        for number in range(20):
            store = LocalStore(tmp_path / str(number))
            tokens = list(pool.map(claim, [store] * 4))
            assert [owns(store, token) for token in tokens].count(True) == 1


def save_after_damage(ranks: RankContext, run_dir: Path) -> tuple[list[str], list[str]]:
    """Damage the second of two while a third is saved, and go on to a fourth."""
    with checkpointer(ranks, run_dir) as saver:
        for step in (1, 2):
            saver.save(StubEngine(float(step)), train_state(step), 1)  # type: ignore[arg-type]
        for checkpoint in list_checkpoints(run_dir):
            next(checkpoint.glob("weights-*")).write_bytes(b"")
        saver.save(StubEngine(3.0), train_state(3), 1)  # type: ignore[arg-type]
        after_third = [p.name for p in list_checkpoints(run_dir)]
        saver.save(StubEngine(4.0), train_state(4), 1)  # type: ignore[arg-type]
    return after_third, [p.name for p in list_checkpoints(run_dir)]


def test_nothing_is_removed_while_fewer_than_two_verify(one_rank: RankPool, tmp_path: Path) -> None:
    after_third, after_fourth = one_rank.run(save_after_damage, tmp_path)[0]
    assert after_third == ["step-00000003", "step-00000002", "step-00000001"]
    assert after_fourth == ["step-00000004", "step-00000003"]
