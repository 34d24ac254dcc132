"""Runs that go on at another world size and ZeRO stage, from the checkpoint as it stands."""

from pathlib import Path

import pytest
import torch

from pipeline.config.batching import plan_batches
from pipeline.config.load import dump_yaml, read_run
from pipeline.config.schema import RunConfig
from pipeline.tracking.store import read_result
from pipeline.training.checkpoint import Checkpointer
from pipeline.training.checkpoint_files import list_checkpoints, load_state, read_manifest
from pipeline.training.distributed import RankContext
from pipeline.training.engine import build_engine
from pipeline.training.train import build_run_model, load_prepared
from tests.training.cases import SEQUENCE_TOKENS, write_run
from tests.training.rank_pool import RankPool
from tests.training.runs import Runs, every_step, losses, train_rank

pytestmark = pytest.mark.slow
MOVE = 3
"""Step after which a run moves."""


def restore_and_compare(ranks: RankContext, run_dir: Path) -> tuple[int, list[str], list[str]]:
    """Restore into a new engine; give the tensors counted, those that differ, and what was said."""
    run = read_run(run_dir)
    manifest = load_prepared(run, run_dir)
    model = build_run_model(run, manifest)
    with Checkpointer(run_dir, run, manifest.fingerprint, model, ranks) as saver:
        engine = build_engine(model, run, plan_batches(run.train, ranks.world_size), ranks)
        said: list[str] = []
        state = saver.restore(engine, said.append)
    assert state is not None
    assert state.step == MOVE
    gathered = engine.export_state()
    checkpoint = list_checkpoints(run_dir)[0]
    stored = load_state(checkpoint, read_manifest(checkpoint))
    names = [
        (kind, name)
        for kind in ("parameters", "exp_avg", "exp_avg_sq")
        for name in getattr(stored, kind)
    ]
    differing = [
        f"{kind} of {name}"
        for kind, name in names
        if not torch.equal(getattr(gathered, kind)[name], getattr(stored, kind)[name])
    ]
    return len(names), differing, said


@pytest.fixture(scope="module")
def unmoved(
    two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, prepared_dir: Path
) -> dict[str, dict[int, float]]:
    """Losses of a run of each family on two ranks at stage 1, from its first step to its last."""
    found = {}
    for family in ("gpt", "lstm_attention"):
        run_dir = write_run(tmp_path_factory.mktemp("unmoved") / "run", prepared_dir, short(family))
        two_ranks.run(train_rank, run_dir)
        found[family] = losses(run_dir)
    return found


def short(family: str, stage: int = 1) -> RunConfig:
    """Six steps of eight samples, one a micro-batch, so that up to eight ranks can share them."""
    scored = {"every_steps": None, "max_tokens": 8 * SEQUENCE_TOKENS}
    run = every_step(family, stage, eval=scored)
    steps = {"micro_batch_samples": 1, "total_tokens": 2 * MOVE * run.train.global_batch_tokens}
    return run.model_copy(update={"train": run.train.model_copy(update=steps)})


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        ("lstm_attention", (2, 1), (1, 3)),
        ("gpt", (1, 3), (2, 0)),
        ("gpt", (2, 3), (4, 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]} ranks stage {value[1]}",
)
def test_run_goes_on_at_any_world_size_and_stage(
    pools: dict[int, RankPool],
    runs: Runs,
    unmoved: dict[str, dict[int, float]],
    family: str,
    first: tuple[int, int],
    second: tuple[int, int],
) -> None:
    moved = runs.make("moved", short(family, first[1]))
    pools[first[0]].run(train_rank, moved, MOVE)
    there = read_run(moved)
    zero = short(family, second[1]).zero
    (moved / "run.yaml").write_text(dump_yaml(there.model_copy(update={"zero": zero})))
    for num_tensors, differing, said in pools[second[0]].run(restore_and_compare, moved):
        assert num_tensors > 30
        assert (differing, said) == ([], [])
    pools[second[0]].run(train_rank, moved)
    # Another order of sums over ranks moves the last digits; another sample would move the third.
    assert losses(moved) == pytest.approx(unmoved[family], rel=1e-4)
    result = read_result(moved)
    assert (result.world_size, result.zero_stage, result.attempts) == (*second, 2)
    assert result.steps == 2 * MOVE
