"""Disks that are full, or would be: real ones, of a size that only root can give them."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import CheckpointError
from pipeline.training.checkpoint_files import list_checkpoints, verify_checkpoint
from pipeline.training.distributed import RankContext
from tests.training.cases import small_run, write_run
from tests.training.rank_pool import RankPool
from tests.training.runs import every_step, train_rank
from tests.training.stub_engine import SIZES, StubEngine, checkpointer, train_state

pytestmark = [pytest.mark.slow, pytest.mark.mounts, pytest.mark.needs_program("mount")]
CHECKPOINT_BYTES = 12 * sum(SIZES.values())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, num_left_bytes: int) -> Path:
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - num_left_bytes))
    assert shutil.disk_usage(disk).free == num_left_bytes
    return ballast


def save(ranks: RankContext, run_dir: Path, step: int) -> str | None:
    with checkpointer(ranks, run_dir) as saver:
        try:
            saver.save(StubEngine(float(step)), train_state(step), 1)  # type: ignore[arg-type]
        except CheckpointError as exc:
            return str(exc)
    return None


def test_save_on_a_full_disk_says_what_is_needed_free_and_left_and_works_once_there_is_room(
    two_ranks: RankPool, small_disk: Path
) -> None:
    run_dir = small_disk / "run"
    assert two_ranks.run(save, run_dir, 1) == [None, None]
    ballast = fill(small_disk, 4096)
    message, same = two_ranks.run(save, run_dir, 2)
    assert message is not None
    assert message == same
    assert "saving step-00000002 failed: rank " in message
    assert "No space left on device" in message
    found = re.search(r"needs ([\d,]+) bytes and \S+ has ([\d,]+) free", message)
    assert found is not None, message
    needed, free = (int(number.replace(",", "")) for number in found.groups())
    assert (needed, free) == (CHECKPOINT_BYTES, shutil.disk_usage(small_disk).free)
    assert "step-00000001 stands" in message
    assert [verify_checkpoint(path).step for path in list_checkpoints(run_dir)] == [1]
    ballast.unlink()
    assert two_ranks.run(save, run_dir, 2) == [None, None]
    assert [verify_checkpoint(path).step for path in list_checkpoints(run_dir)] == [2, 1]


def find_no_room(ranks: RankContext, run_dir: Path, **checkpoint: float) -> str | None:
    run = small_run(checkpoint={"keep": 40, **checkpoint})
    assert run.train.total_steps == 20
    with checkpointer(ranks, run_dir, run) as saver:
        try:
            saver.check_space()
        except CheckpointError as exc:
            return str(exc)
    return None


def test_room_is_wanted_for_all_that_are_to_stand_and_do_not_yet(
    one_rank: RankPool, small_disk: Path
) -> None:
    def no_room(**checkpoint: float) -> str | None:
        return one_rank.run(find_no_room, small_disk, **checkpoint)[0]

    # 336 bytes each: 12 in a page, and 41 at once do not fit into 3 pages.
    ballast = fill(small_disk, 3 * 4096)
    message = no_room(every_seconds=1.0)
    assert message is not None
    assert "12,288 bytes free, and 41 checkpoints of 336 bytes need 13,776" in message
    # The 20 that a run of 20 steps writes at most do.
    assert no_room(every_steps=1) is None
    ballast.unlink()
    ballast = fill(small_disk, 4096)
    message = no_room(every_steps=1)
    assert message is not None
    assert "20 checkpoints of 336 bytes need 6,720" in message
    assert "this attempt writes up to 20" in message
    # One at each third step and at the end, or the last alone.
    assert no_room(every_steps=3) is None
    assert no_room() is None
    ballast.unlink()
    for step in range(1, 6):
        assert one_rank.run(save, small_disk, step) == [None]
    num_standing = len(list_checkpoints(small_disk))
    assert num_standing == 2
    fill(small_disk, 4096)
    message = no_room(every_seconds=1.0)
    assert message is not None
    assert "39 checkpoints of 336 bytes need 13,104" in message


def test_run_whose_checkpoints_find_no_room_does_not_begin(
    one_rank: RankPool, small_disk: Path, prepared_dir: Path
) -> None:
    run_dir = write_run(small_disk / "run", prepared_dir, every_step("gpt", 0))
    answer = one_rank.run(train_rank, run_dir)[0]
    assert isinstance(answer, CheckpointError)
    assert "this attempt writes up to 1." in str(answer)
    assert [path.name for path in run_dir.iterdir()] == ["run.yaml"]
