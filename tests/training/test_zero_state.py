import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.config.schema import OptimizerConfig
from pipeline.models import build_model
from pipeline.training.distributed import RankContext
from pipeline.training.engine import Engine, EngineState, parameter_groups
from tests.training.cases import (
    VOCAB_SIZE,
    my_batches,
    skip_without_bf16,
    small_engine,
    small_run,
)
from tests.training.rank_pool import RankPool

Arrays = dict[str, dict[str, npt.NDArray[np.float32]]]
KINDS = ("parameters", "exp_avg", "exp_avg_sq")
LEARNING_RATE = 3e-3


def to_arrays(state: EngineState) -> Arrays:
    return {k: {n: t.numpy() for n, t in getattr(state, k).items()} for k in KINDS}


def to_state(arrays: Arrays, step: int) -> EngineState:
    tensors = {k: {n: torch.from_numpy(a) for n, a in arrays[k].items()} for k in KINDS}
    return EngineState(**tensors, step=step)


def steps(engine: Engine, ranks: RankContext, first: int, num: int) -> list[float]:
    return [
        engine.train_step(my_batches(ranks, s), LEARNING_RATE).loss
        for s in range(first, first + num)
    ]


def train_and_export(
    ranks: RankContext, family: str, num_steps: int, name: str = "torch"
) -> tuple[Arrays, list[float], npt.NDArray[np.float32]]:
    """Export after `num_steps`, then go on: what any engine that imports must repeat."""
    engine, _ = small_engine(ranks, small_run(family), name)
    steps(engine, ranks, 0, num_steps)
    arrays = to_arrays(engine.export_state())
    scores = engine.evaluate(my_batches(ranks, 0)[0])
    return arrays, steps(engine, ranks, num_steps, 3), scores


def import_and_train(
    ranks: RankContext, family: str, stage: int, precision: str, arrays: Arrays, num_steps: int
) -> tuple[Arrays, int, list[float], npt.NDArray[np.float32]]:
    engine, _ = small_engine(ranks, small_run(family, stage, precision=precision, seed=1))
    # An engine that has trained already must forget all of it.
    if stage % 2:
        steps(engine, ranks, 50, 1)
    engine.import_state(to_state(arrays, num_steps))
    exported = engine.export_state()
    scores = engine.evaluate(my_batches(ranks, 0)[0])
    return to_arrays(exported), exported.step, steps(engine, ranks, num_steps, 3), scores


@pytest.fixture(scope="module")
def saved(
    two_ranks: RankPool,
) -> dict[str, list[tuple[Arrays, list[float], npt.NDArray[np.float32]]]]:
    return {f: two_ranks.run(train_and_export, f, 4) for f in ("gpt", "lstm_attention")}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("family", ["gpt", "lstm_attention"])
def test_imported_state_comes_out_unchanged_and_is_what_trains(
    two_ranks: RankPool,
    saved: dict[str, list[tuple[Arrays, list[float], npt.NDArray[np.float32]]]],
    family: str,
    stage: int,
    precision: str,
) -> None:
    skip_without_bf16(family, precision)
    arrays = saved[family][0][0]
    replies = two_ranks.run(import_and_train, family, stage, precision, arrays, 4)
    for rank, (exported, step, losses, scores) in enumerate(replies):
        assert step == 4
        for kind in KINDS:
            assert exported[kind].keys() == arrays[kind].keys()
            for name, value in arrays[kind].items():
                assert np.array_equal(exported[kind][name], value), f"{kind} of {name}"
        tolerance = 1e-6 if precision == "fp32" else 5e-3
        assert losses == pytest.approx(saved[family][rank][1], rel=tolerance)
        # Scored before any step: the working copy of the weights was refreshed too.
        expected = saved[family][rank][2]
        assert scores == pytest.approx(expected, rel=10 * tolerance, abs=10 * tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_state_of_two_ranks_trains_on_one(
    one_rank: RankPool,
    saved: dict[str, list[tuple[Arrays, list[float], npt.NDArray[np.float32]]]],
    stage: int,
) -> None:
    arrays, expected, _ = saved["gpt"][0]
    _, _, losses, _ = one_rank.run(import_and_train, "gpt", stage, "fp32", arrays, 4)[0]
    assert losses == pytest.approx(expected, rel=1e-6)


def export_shares(ranks: RankContext, stage: int) -> list[set[str]]:
    engine, _ = small_engine(ranks, small_run("gpt", stage))
    mine = {"embedding_VD"} if ranks.rank == 0 else set()
    state = engine.export_state(mine)
    return [set(state.parameters), set(state.exp_avg), set(state.exp_avg_sq)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_rank_keeps_only_the_share_it_asks_for(two_ranks: RankPool, stage: int) -> None:
    shares = two_ranks.run(export_shares, stage)
    assert shares == [[{"embedding_VD"}] * 3, [set()] * 3]


def export_fresh(ranks: RankContext, stage: int, precision: str) -> tuple[Arrays, int]:
    engine, _ = small_engine(ranks, small_run("gpt", stage, precision=precision))
    state = engine.export_state()
    return to_arrays(state), state.step


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_engine_starts_from_the_models_weights_with_empty_moments(
    two_ranks: RankPool, stage: int, precision: str
) -> None:
    arrays, step = two_ranks.run(export_fresh, stage, precision)[1]
    model = build_model(small_run("gpt").model, VOCAB_SIZE, 0)
    assert step == 0
    for name, parameter in model.named_parameters():
        # 16-bit engines make their master weights from the rounded ones.
        rounded = parameter if precision == "fp32" else parameter.bfloat16().float()
        assert np.array_equal(arrays["parameters"][name], rounded.detach().numpy())
        assert not arrays["exp_avg"][name].any()
        assert not arrays["exp_avg_sq"][name].any()


def test_weight_decay_is_on_matrices_only() -> None:
    model = build_model(small_run("gpt").model, VOCAB_SIZE, 0)
    decayed, rest = parameter_groups(model, OptimizerConfig(weight_decay=0.3))
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 for p in rest["params"])
    names = {id(p): n for n, p in model.named_parameters()}
    assert "embedding_VD" in [names[id(p)] for p in decayed["params"]]
    assert "final_norm.weight" in [names[id(p)] for p in rest["params"]]
    assert len(decayed["params"]) + len(rest["params"]) == len(names)
