"""Checkpoints in an object store: a real S3 server on loopback."""

from pathlib import Path
from typing import Any

import boto3
import pytest

from pipeline.data.ray_surroundings import environment_set
from pipeline.errors import CheckpointError
from pipeline.tracking.store import RunResult
from pipeline.training.checkpoint import TrainState
from pipeline.training.checkpoint_commit import read_pointer
from pipeline.training.checkpoint_objects import ObjectStore
from pipeline.training.distributed import RankContext
from tests.training.cases import small_run
from tests.training.rank_pool import RankPool
from tests.training.runs import HALF, Runs, every_step, losses, train_rank
from tests.training.stub_engine import StubEngine, checkpointer, train_state

pytestmark = pytest.mark.slow
Variables = dict[str, str]


@pytest.fixture
def bucket(s3_variables: Variables, request: pytest.FixtureRequest) -> str:
    """Make a bucket of the test's own and give its URL."""
    name = request.node.originalname.replace("_", "-")[:60].strip("-")
    with environment_set(s3_variables):
        boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


def save_remote(ranks: RankContext, variables: Variables, url: str, *steps: int) -> None:
    run = small_run(checkpoint={"store": url})
    with environment_set(variables), checkpointer(ranks, Path("/nowhere"), run) as saver:
        saver.restore(StubEngine(0.0), [].append)  # type: ignore[arg-type]
        for step in steps:
            saver.save(StubEngine(float(step)), train_state(step), 1)  # type: ignore[arg-type]


def restore_remote(
    ranks: RankContext, variables: Variables, url: str
) -> tuple[TrainState | None, float | None, list[str]]:
    run = small_run(checkpoint={"store": url})
    engine, said = StubEngine(0.0), list[str]()
    with environment_set(variables), checkpointer(ranks, Path("/nowhere"), run) as saver:
        state = saver.restore(engine, said.append)  # type: ignore[arg-type]
    matrix = None if engine.imported is None else float(engine.imported.parameters["matrix"][1])
    return state, matrix, said


def test_store_keeps_the_newest_and_gives_them_back(
    two_ranks: RankPool, s3_variables: Variables, bucket: str
) -> None:
    two_ranks.run(save_remote, s3_variables, f"{bucket}/run", 1, 2, 3)
    replies = two_ranks.run(restore_remote, s3_variables, f"{bucket}/run")
    assert replies == [(train_state(3), 3.0, [])] * 2
    with environment_set(s3_variables):
        store = ObjectStore(f"{bucket}/run")
        names = [name for name in store.entries() if not name.startswith("owner-")]
        assert sorted(names) == ["latest", "step-00000002", "step-00000003"]
        assert read_pointer(store) == "step-00000003"
        # Two ranks, three kinds, a manifest.
        assert len(store.entries("step-00000003")) == 7


def test_damaged_object_is_passed_over(
    two_ranks: RankPool, s3_variables: Variables, bucket: str
) -> None:
    url = f"{bucket}/run"
    two_ranks.run(save_remote, s3_variables, url, 1, 2)
    with environment_set(s3_variables):
        store = ObjectStore(url)
        name = next(n for n in store.entries("step-00000002") if n.startswith("exp_avg_sq"))
        data = bytearray(store.entries("step-00000002")[name])
        store.read_into(f"step-00000002/{name}", 0, memoryview(data))
        data[-1] ^= 1
        store.write({f"step-00000002/{name}": [data]})
    for state, value, said in two_ranks.run(restore_remote, s3_variables, url):
        assert (state, value) == (train_state(1), 1.0)
        assert f"step-00000002 is passed over: {name} has another sha256" in said[0]
    with environment_set(s3_variables):
        assert read_pointer(store) == "step-00000001"


def test_upload_without_a_manifest_is_no_checkpoint_and_is_cleared(
    one_rank: RankPool, s3_variables: Variables, bucket: str
) -> None:
    url = f"{bucket}/run"
    one_rank.run(save_remote, s3_variables, url, 1, 2)
    with environment_set(s3_variables):
        store = ObjectStore(url)
        store.write({"step-00000003/weights-00000-of-00001.safetensors": [b"cut off"]})
        assert one_rank.run(restore_remote, s3_variables, url) == [(train_state(2), 2.0, [])]
        assert store.entries("step-00000003") == {}


def save_after_takeover(ranks: RankContext, variables: Variables, url: str) -> str:
    run = small_run(checkpoint={"store": url})
    place = Path("/nowhere")
    with (
        environment_set(variables),
        checkpointer(ranks, place, run) as stalled,
        checkpointer(ranks, place, run) as owner,
    ):
        stalled.restore(StubEngine(0.0), [].append)  # type: ignore[arg-type]
        owner.restore(StubEngine(0.0), [].append)  # type: ignore[arg-type]
        owner.save(StubEngine(1.0), train_state(1), 2)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError) as caught:
            stalled.save(StubEngine(9.0), train_state(1), 1)  # type: ignore[arg-type]
    return str(caught.value)


def test_owner_that_wakes_up_changes_no_file_of_the_new_one(
    two_ranks: RankPool, s3_variables: Variables, bucket: str
) -> None:
    messages = two_ranks.run(save_after_takeover, s3_variables, f"{bucket}/run")
    assert all("took the run over" in message for message in messages)
    replies = two_ranks.run(restore_remote, s3_variables, f"{bucket}/run")
    assert replies == [(train_state(1), 1.0, [])] * 2


def train_remote(
    ranks: RankContext, variables: Variables, run_dir: Path, stop_after_steps: int | None
) -> Any:
    with environment_set(variables):
        return train_rank(ranks, run_dir, stop_after_steps)


def test_run_resumes_from_the_store_bit_for_bit(
    two_ranks: RankPool, runs: Runs, s3_variables: Variables, bucket: str
) -> None:
    run = every_step("gpt", 1)
    stored = every_step("gpt", 1, checkpoint={"store": f"{bucket}/halves", "every_steps": 4})
    whole, halves = runs.make("whole", run), runs.make("halves", stored)
    two_ranks.run(train_rank, whole)
    assert two_ranks.run(train_remote, s3_variables, halves, HALF) == [None, None]
    assert not (halves / "checkpoints").exists()
    assert isinstance(two_ranks.run(train_remote, s3_variables, halves, None)[0], RunResult)
    assert losses(halves) == losses(whole)
