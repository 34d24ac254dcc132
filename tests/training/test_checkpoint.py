import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
import torch

from pipeline.config.schema import RunConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.training.checkpoint import TrainState, split_evenly
from pipeline.training.checkpoint_files import (
    list_checkpoints,
    load_state,
    read_manifest,
    verify_checkpoint,
)
from pipeline.training.distributed import RankContext
from pipeline.training.engine import EngineState
from tests.training.cases import small_run
from tests.training.rank_pool import RankPool
from tests.training.stub_engine import SIZES, StubEngine, checkpointer, train_state

pytestmark = pytest.mark.slow


class DyingTensors(dict[str, torch.Tensor]):
    """Tensors at whose reading the process is killed, in the midst of a save."""

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:  # type: ignore[override]
        os.kill(os.getpid(), signal.SIGKILL)
        return iter(())


class DyingEngine(StubEngine):
    def __init__(self, kind: str) -> None:
        super().__init__(9.0)
        self.kind = kind

    def export_state(self, names: Collection[str] | None = None) -> EngineState:
        state = super().export_state(names)
        fields = {k: getattr(state, k) for k in ("parameters", "exp_avg", "exp_avg_sq")}
        fields[self.kind] = DyingTensors(fields[self.kind])
        return EngineState(**fields, step=3)


def save(ranks: RankContext, run_dir: Path, *steps: int) -> None:
    with checkpointer(ranks, run_dir) as writer:
        for step in steps:
            writer.save(StubEngine(float(step)), train_state(step), 1)  # type: ignore[arg-type]


def restore(
    ranks: RankContext, run_dir: Path, run: RunConfig | None = None, fingerprint: str = "data"
) -> tuple[TrainState | None, float | None, list[str]]:
    engine = StubEngine(0.0)
    messages: list[str] = []
    with checkpointer(ranks, run_dir, run, fingerprint) as reader:
        state = reader.restore(engine, messages.append)  # type: ignore[arg-type]
    if engine.imported is None:
        return state, None, messages
    return state, float(engine.imported.parameters["matrix"][1]), messages


def test_save_and_restore_give_back_state_and_tensors(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(save, tmp_path, 5)
    replies = two_ranks.run(restore, tmp_path)
    assert replies == [(train_state(5), 5.0, [])] * 2
    manifest = verify_checkpoint(list_checkpoints(tmp_path)[0])
    assert manifest.tokens == 5 * 128
    assert (manifest.world_size, manifest.optimizer_step, len(manifest.files)) == (2, 3, 6)
    state = load_state(list_checkpoints(tmp_path)[0], manifest)
    assert set(state.parameters) == set(SIZES)
    assert torch.equal(state.exp_avg_sq["bias"], torch.arange(4) * 5.0 + 2)


def test_ranks_write_disjoint_shares_that_make_up_the_whole(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(save, tmp_path, 1)
    manifest = verify_checkpoint(list_checkpoints(tmp_path)[0])
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        shares = [file.tensors for file in manifest.files if file.kind == kind]
        assert sorted(sum(shares, [])) == sorted(SIZES)
        assert len(shares) == 2
    assert not list(tmp_path.rglob("*.pkl")) + list(tmp_path.rglob("*.pt"))


def test_only_the_newest_checkpoints_are_kept(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(save, tmp_path, 1, 2, 3, 10)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000003"]
    assert entries(tmp_path) == ["latest", "owner", "step-00000003", "step-00000010"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000010\n"


@pytest.mark.parametrize("kind", ["parameters", "exp_avg", "exp_avg_sq"])
def test_kill_between_files_leaves_the_earlier_checkpoint_in_force(
    one_rank: RankPool, tmp_path: Path, kind: str
) -> None:
    one_rank.run(save, tmp_path, 1)
    with pytest.raises(AssertionError, match="code -9"):
        one_rank.run(save_and_die, tmp_path, kind)
    # The fault fired in the midst of a save, and left part of it behind.
    assert entries(tmp_path) == [".tmp-step-00000002", "latest", "owner", "step-00000001"]
    state, value, messages = one_rank.run(restore, tmp_path)[0]
    assert (state, value, messages) == (train_state(1), 1.0, [])
    one_rank.run(save, tmp_path, 2)
    assert entries(tmp_path) == ["latest", "owner", "step-00000001", "step-00000002"]


def entries(run_dir: Path) -> list[str]:
    """Names in the directory of checkpoints, without the tokens in some of them."""
    token = re.compile(r"-\d{8}-[0-9a-f]{8}$")
    return sorted(token.sub("", p.name) for p in (run_dir / "checkpoints").iterdir())


def save_and_die(ranks: RankContext, run_dir: Path, kind: str) -> None:
    with checkpointer(ranks, run_dir) as writer:
        writer.save(DyingEngine(kind), train_state(2), 1)  # type: ignore[arg-type]


def test_whole_directory_that_was_not_renamed_is_no_checkpoint(
    one_rank: RankPool, tmp_path: Path
) -> None:
    one_rank.run(save, tmp_path, 1, 2)
    newest = list_checkpoints(tmp_path)[0]
    newest.rename(newest.with_name(f".tmp-{newest.name}-1"))
    assert one_rank.run(restore, tmp_path)[0][0] == train_state(1)


def test_every_flipped_byte_is_caught_and_the_older_checkpoint_takes_over(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(save, tmp_path / "good", 1, 2)
    names = sorted(p.name for p in list_checkpoints(tmp_path / "good")[0].iterdir())
    assert len(names) == 7
    for number, name in enumerate(names):
        run_dir = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", run_dir)
        damaged = list_checkpoints(run_dir)[0] / name
        data = bytearray(damaged.read_bytes())
        # A digit of the manifest, so that it stays valid JSON; else the last byte of a tensor.
        index = data.index(b'"step": 2') + 8 if name == "manifest.json" else len(data) - 1
        data[index] ^= 1
        damaged.write_bytes(data)
        for state, value, messages in two_ranks.run(restore, run_dir):
            assert (state, value) == (train_state(1), 1.0), name
            assert name in messages[0]


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest", "empty manifest"])
def test_incomplete_checkpoint_is_passed_over(
    two_ranks: RankPool, tmp_path: Path, damage: str
) -> None:
    two_ranks.run(save, tmp_path, 1, 2)
    newest = list_checkpoints(tmp_path)[0]
    tensors, manifest = sorted(newest.glob("weights-*"))[1], newest / "manifest.json"
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_bytes(b"")
    state, _, messages = two_ranks.run(restore, tmp_path)[0]
    assert state == train_state(1)
    assert "step-00000002 is passed over" in messages[0]


def test_damaged_checkpoint_of_a_step_is_replaced(one_rank: RankPool, tmp_path: Path) -> None:
    one_rank.run(save, tmp_path, 1, 2)
    next(list_checkpoints(tmp_path)[0].glob("weights-*")).unlink()
    one_rank.run(save, tmp_path, 2)
    verify_checkpoint(list_checkpoints(tmp_path)[0])
    assert one_rank.run(restore, tmp_path)[0][0] == train_state(2)


def test_run_without_checkpoints_starts_anew(one_rank: RankPool, tmp_path: Path) -> None:
    assert one_rank.run(restore, tmp_path) == [(None, None, [])]


def restore_error(ranks: RankContext, run_dir: Path, seed: int, fingerprint: str) -> str:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        restore(ranks, run_dir, small_run(seed=seed), fingerprint)
    return f"{caught.type.__name__}: {caught.value}"


def test_checkpoint_of_another_run_is_refused(one_rank: RankPool, tmp_path: Path) -> None:
    one_rank.run(save, tmp_path, 1)
    other_config = one_rank.run(restore_error, tmp_path, 1, "data")[0]
    assert other_config.startswith("ConfigError")
    assert "another config" in other_config
    other_data = one_rank.run(restore_error, tmp_path, 0, "other")[0]
    assert "trained on data data, this run reads other" in other_data


def test_all_damaged_is_an_error_and_no_silent_start(one_rank: RankPool, tmp_path: Path) -> None:
    one_rank.run(save, tmp_path, 1, 2)
    for checkpoint in list_checkpoints(tmp_path):
        (checkpoint / "manifest.json").write_text("{}")
    message = one_rank.run(restore_error, tmp_path, 0, "data")[0]
    assert message.startswith("CheckpointError")
    assert "2 checkpoints and none is intact" in message


def save_badly(ranks: RankContext, run_dir: Path, fault: str) -> str:
    engine = StubEngine(2.0)
    if ranks.rank == 1:
        if fault == "nan":
            engine = StubEngine(float("nan"))
        else:
            # Files of this process may not grow beyond 16 bytes, as on a full disk.
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with checkpointer(ranks, run_dir) as writer, pytest.raises(CheckpointError) as caught:
            writer.save(engine, train_state(2), 1)  # type: ignore[arg-type]
    finally:
        if ranks.rank == 1 and fault != "nan":
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return str(caught.value)


@pytest.mark.parametrize("fault", ["nan", "full disk"])
def test_rank_that_cannot_write_fails_the_save_on_all_and_harms_nothing(
    two_ranks: RankPool, tmp_path: Path, fault: str
) -> None:
    two_ranks.run(save, tmp_path, 1)
    messages = two_ranks.run(save_badly, tmp_path, fault)
    assert messages[0] == messages[1]
    assert "rank 1: " in messages[0]
    assert "step-00000001 stands" in messages[0]
    assert entries(tmp_path) == ["latest", "owner", "step-00000001"]
    assert two_ranks.run(restore, tmp_path)[0][0] == train_state(1)


def random_numbers(ranks: RankContext, run_dir: Path, is_resumed: bool) -> list[float]:
    if is_resumed:
        torch.manual_seed(99)
        restore(ranks, run_dir)
    else:
        torch.manual_seed(7 + ranks.rank)
        save(ranks, run_dir, 1)
    return torch.rand(3).tolist()


def test_generators_go_on_where_they_were(two_ranks: RankPool, tmp_path: Path) -> None:
    before = two_ranks.run(random_numbers, tmp_path, False)
    assert before[0] != before[1]
    assert two_ranks.run(random_numbers, tmp_path, True) == before


def test_manifest_is_plain_json(one_rank: RankPool, tmp_path: Path) -> None:
    one_rank.run(save, tmp_path, 1)
    checkpoint = list_checkpoints(tmp_path)[0]
    tree = json.loads((checkpoint / "manifest.json").read_text())
    assert tree["step"] == 1
    assert {f["name"] for f in tree["files"]} == {p.name for p in checkpoint.glob("*.safetensors")}
    assert read_manifest(checkpoint).skipped_total == 2


def test_shares_are_balanced_and_equal_on_every_rank() -> None:
    assert split_evenly(SIZES, 2) == [{"embedding", "gain"}, {"matrix", "bias"}] or split_evenly(
        SIZES, 2
    ) == [{"embedding"}, {"matrix", "bias", "gain"}]
    assert split_evenly({"a": 1}, 3) == [{"a"}, set(), set()]
