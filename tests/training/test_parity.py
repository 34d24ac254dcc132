import math
import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.schema import RunConfig
from pipeline.training.distributed import RankContext
from pipeline.training.engine import StateBytes, StepOutcome
from tests.training.cases import my_batches, skip_without_bf16, small_engine, small_run
from tests.training.rank_pool import RankPool

pytestmark = pytest.mark.slow
NUM_STEPS = 6
FAMILIES = ["gpt", "lstm_attention"]
LEARNING_RATE = 3e-3


def train_curve(
    ranks: RankContext, run: RunConfig, name: str, num_steps: int = NUM_STEPS
) -> tuple[list[StepOutcome], StateBytes]:
    engine, _ = small_engine(ranks, run, name)
    outcomes = [engine.train_step(my_batches(ranks, s), LEARNING_RATE) for s in range(num_steps)]
    return outcomes, engine.state_bytes()


def test_untied_head_with_z_loss_follows_the_oracle_at_every_stage(two_ranks: RankPool) -> None:
    head = {"tied_head": False, "z_loss": 1e-3}
    run = small_run("gpt", model=head)
    expected = [o.loss for o in two_ranks.run(train_curve, run, "torch", 4)[0][0]]
    plain = two_ranks.run(train_curve, small_run("gpt", model=head | {"z_loss": 0.0}), "torch", 4)
    assert [o.loss for o in plain[0][0]] != pytest.approx(expected, rel=1e-5)
    for stage in range(4):
        run = small_run("gpt", stage, model=head)
        outcomes = two_ranks.run(train_curve, run, "deepspeed", 4)[0][0]
        assert [o.loss for o in outcomes] == pytest.approx(expected, rel=1e-4), stage


Curve = list[list[tuple[list[StepOutcome], StateBytes]]]


@pytest.fixture(scope="module")
def oracle(two_ranks: RankPool) -> dict[str, list[StepOutcome]]:
    return {f: two_ranks.run(train_curve, small_run(f), "torch")[0][0] for f in FAMILIES}


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str, int], list[StateBytes]]:
    return {}


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_curves_of_every_stage_are_those_of_the_oracle(
    two_ranks: RankPool,
    oracle: dict[str, list[StepOutcome]],
    measured: dict[tuple[str, str, int], list[StateBytes]],
    family: str,
    stage: int,
) -> None:
    replies = two_ranks.run(train_curve, small_run(family, stage), "deepspeed")
    measured[family, "fp32", stage] = [state_bytes for _, state_bytes in replies]
    outcomes = replies[0][0]
    expected = oracle[family]
    assert all(outcome.applied for outcome in outcomes)
    assert [o.loss for o in outcomes] == pytest.approx([o.loss for o in expected], rel=1e-4)
    norms = [o.grad_norm for o in outcomes]
    assert norms == pytest.approx([o.grad_norm for o in expected], rel=1e-4)
    assert [o.num_tokens for o in outcomes] == [o.num_tokens for o in expected]
    # Every rank reports the same loss and norm: they are global.
    for mine, other in zip(replies[0][0], replies[1][0], strict=True):
        assert (mine.loss, mine.grad_norm) == (other.loss, other.grad_norm)
    assert outcomes[-1].loss < outcomes[0].loss


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_curves_of_every_stage_stay_near_the_oracle(
    two_ranks: RankPool,
    oracle: dict[str, list[StepOutcome]],
    measured: dict[tuple[str, str, int], list[StateBytes]],
    family: str,
    stage: int,
) -> None:
    skip_without_bf16(family, "bf16")
    replies = two_ranks.run(train_curve, small_run(family, stage, precision="bf16"), "deepspeed")
    measured[family, "bf16", stage] = [state_bytes for _, state_bytes in replies]
    outcomes = replies[0][0]
    # Weights rounded to the 8 bits of bf16 move the loss by parts in a thousand, no more.
    assert [o.loss for o in outcomes] == pytest.approx([o.loss for o in oracle[family]], rel=5e-3)
    norms = [o.grad_norm for o in oracle[family]]
    assert [o.grad_norm for o in outcomes] == pytest.approx(norms, rel=5e-2)
    assert all(outcome.applied for outcome in outcomes)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_stage_halves_its_part_of_the_state_over_two_ranks(
    two_ranks: RankPool,
    measured: dict[tuple[str, str, int], list[StateBytes]],
    family: str,
    precision: str,
) -> None:
    skip_without_bf16(family, precision)
    for stage in range(4):
        if (family, precision, stage) not in measured:
            run = small_run(family, stage, precision=precision)
            replies = two_ranks.run(train_curve, run, "deepspeed", 1)
            measured[family, precision, stage] = [state_bytes for _, state_bytes in replies]
    num = num_parameters(family)
    weight_bytes = 4 if precision == "fp32" else 2
    for rank in range(2):
        by_stage = [measured[family, precision, stage][rank] for stage in range(4)]
        # Whole, up to alignment; stage 0 in fp32 needs no second copy of the weights.
        moments = 8 if precision == "fp32" else 12
        assert by_stage[0].optimizer == pytest.approx(moments * num, rel=0.02)
        for stage in (1, 2, 3):
            assert by_stage[stage].optimizer == pytest.approx(12 * num / 2, rel=0.02)
        for stage in (0, 1):
            assert by_stage[stage].gradients == pytest.approx(weight_bytes * num, rel=0.02)
        # A tensor that two ranks share stays whole in stage 2's buffers.
        assert by_stage[2].gradients == pytest.approx(weight_bytes * num / 2, rel=0.25)
        assert by_stage[3].gradients == pytest.approx(weight_bytes * num / 2, rel=0.02)
        for stage in (0, 1, 2):
            assert by_stage[stage].parameters == pytest.approx(weight_bytes * num, rel=0.02)
        assert by_stage[3].parameters == pytest.approx(weight_bytes * num / 2, rel=0.02)


def num_parameters(family: str) -> int:
    return small_run(family).model.num_parameters(61).total


def test_persistence_threshold_keeps_small_parameters_whole(two_ranks: RankPool) -> None:
    sharded = small_run("gpt", 3)
    whole = small_run("gpt", 3, zero={"param_persistence_threshold": 100_000})
    bytes_of = [two_ranks.run(train_curve, run, "deepspeed", 1)[0][1] for run in (sharded, whole)]
    assert bytes_of[1].parameters == pytest.approx(3 * bytes_of[0].parameters, rel=0.05)


def test_reported_norm_is_that_before_clipping_at_every_stage(two_ranks: RankPool) -> None:
    loose, tight = {"gradient_clipping": 0.0}, {"gradient_clipping": 0.01}
    for stage in range(4):
        first = [
            two_ranks.run(
                train_curve, small_run("gpt", stage, train={"optimizer": clipping}), "deepspeed", 1
            )[0][0][0].grad_norm
            for clipping in (loose, tight)
        ]
        assert first[0] == pytest.approx(first[1], rel=1e-6)
        assert first[0] > 0.5


def one_loss_and_norm(ranks: RankContext, run: RunConfig) -> tuple[float, float]:
    engine, _ = small_engine(ranks, run)
    outcome = engine.train_step(my_batches(ranks, 0), 0.0)
    return outcome.loss, outcome.grad_norm


@pytest.mark.parametrize("stage", range(4))
def test_gradient_does_not_depend_on_ranks_and_micro_batches(
    two_ranks: RankPool, one_rank: RankPool, stage: int
) -> None:
    # The micro-batches hold different numbers of labels, so a mean of means would differ.
    run = small_run("gpt", stage)
    two, one = (pool.run(one_loss_and_norm, run)[0] for pool in (two_ranks, one_rank))
    assert two == pytest.approx(one, rel=1e-5)


def list_compiled(ranks: RankContext) -> list[str]:
    return [str(p) for p in Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("*")]


def test_no_extension_is_compiled_on_a_cpu(two_ranks: RankPool) -> None:
    for stage in range(4):
        two_ranks.run(train_curve, small_run("gpt", stage, precision="bf16"), "deepspeed", 2)
    assert two_ranks.run(list_compiled) == [[], []]


def bytes_before_and_after_evaluation(
    ranks: RankContext, run: RunConfig
) -> tuple[StateBytes, StateBytes]:
    engine, _ = small_engine(ranks, run)
    engine.train_step(my_batches(ranks, 0), LEARNING_RATE)
    before = engine.state_bytes()
    engine.evaluate(my_batches(ranks, 0)[0])
    return before, engine.state_bytes()


def test_weights_gathered_for_a_pass_do_not_count_as_state(two_ranks: RankPool) -> None:
    # A bucket larger than the model, so that evaluation leaves everything gathered.
    run = small_run("gpt", 3, zero={"bucket_elements": 50_000_000})
    for before, after in two_ranks.run(bytes_before_and_after_evaluation, run):
        assert before == after


def evaluate_and_step(ranks: RankContext, run: RunConfig) -> list[np.ndarray]:
    engine, _ = small_engine(ranks, run)
    batch = my_batches(ranks, 0)[0]
    before = engine.evaluate(batch)
    engine.train_step(my_batches(ranks, 0), LEARNING_RATE)
    return [before, engine.evaluate(batch), batch.labels]


@pytest.mark.parametrize("stage", range(4))
def test_evaluation_scores_tokens_with_the_current_weights(two_ranks: RankPool, stage: int) -> None:
    before, after, labels = two_ranks.run(evaluate_and_step, small_run("gpt", stage))[0]
    assert before.dtype == np.float32
    assert before.shape == labels.shape
    assert (before[labels == -100] == 0.0).all()
    # A little below ln V: half of the labels repeat their input, which a tied head favours.
    assert before[labels != -100].mean() == pytest.approx(math.log(61), abs=0.3)
    assert after.sum() < before.sum()
