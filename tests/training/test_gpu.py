"""The device-dependent lines, on a machine that has a CUDA device."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from pipeline.config.schema import RunConfig
from pipeline.training.device import peak_memory, reset_peak_memory
from pipeline.training.distributed import RankContext
from pipeline.training.engine import EngineState, StateBytes, StepOutcome
from tests.training.cases import my_batches, small_engine, small_run
from tests.training.rank_pool import RankPool

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cuda_rank() -> Iterator[RankPool]:
    pool = RankPool(1, "cuda")
    yield pool
    pool.stop()


def train_curve(
    ranks: RankContext, run: RunConfig, name: str = "deepspeed"
) -> tuple[list[StepOutcome], StateBytes]:
    # TF32 keeps 10 bits of a product's factors, far fewer than the CPU curve has.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    engine, _ = small_engine(ranks, run, name)
    return [engine.train_step(my_batches(ranks, s), 3e-3) for s in range(20)], engine.state_bytes()


def describe(ranks: RankContext) -> tuple[str, str]:
    return dist.get_backend(), ranks.device.type


def test_rank_computes_on_cuda_and_talks_over_nccl(cuda_rank: RankPool) -> None:
    assert cuda_rank.run(describe) == [("nccl", "cuda")]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("family", ["gpt", "lstm_attention"])
def test_fp32_curve_is_that_of_the_cpu(
    cuda_rank: RankPool, one_rank: RankPool, family: str, stage: int
) -> None:
    run = small_run(family, stage)
    outcomes = cuda_rank.run(train_curve, run)[0][0]
    expected = one_rank.run(train_curve, small_run(family), "torch")[0][0]
    assert [o.loss for o in outcomes] == pytest.approx([o.loss for o in expected], rel=1e-3)
    assert all(outcome.backward_seconds > 0.0 for outcome in outcomes)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("family", ["gpt", "lstm_attention"])
def test_16_bit_curve_falls_at_every_stage(
    cuda_rank: RankPool, family: str, stage: int, precision: str
) -> None:
    outcomes = cuda_rank.run(train_curve, small_run(family, stage, precision=precision))[0][0]
    applied = [outcome.loss for outcome in outcomes if outcome.applied]
    assert applied[-1] < applied[0]
    assert precision == "fp16" or len(applied) == len(outcomes)


def continue_from_export(ranks: RankContext, stage: int) -> tuple[list[float], list[float]]:
    first, _ = small_engine(ranks, small_run("gpt", stage))
    first.train_step(my_batches(ranks, 0), 3e-3)
    exported: EngineState = first.export_state()
    assert all(t.device.type == "cpu" for t in exported.parameters.values())
    second, _ = small_engine(ranks, small_run("gpt", stage, seed=1))
    second.import_state(exported)
    curves = [
        [engine.train_step(my_batches(ranks, s), 3e-3).loss for s in range(1, 4)]
        for engine in (first, second)
    ]
    return curves[0], curves[1]


@pytest.mark.parametrize("stage", range(4))
def test_fused_optimizer_state_goes_out_and_in(cuda_rank: RankPool, stage: int) -> None:
    first, second = cuda_rank.run(continue_from_export, stage)[0]
    assert second == pytest.approx(first, rel=1e-5)


def measure_memory(ranks: RankContext) -> tuple[int, dict[str, float]]:
    before = reset_peak_memory(ranks.device)
    block = torch.ones(25_000_000, device=ranks.device)
    del block
    return before, peak_memory(ranks.device)


def test_peak_memory_is_that_of_the_allocator(cuda_rank: RankPool) -> None:
    before, values = cuda_rank.run(measure_memory)[0]
    assert values["memory/peak_bytes"] - before >= 100_000_000
    assert values["memory/reserved_bytes"] >= values["memory/peak_bytes"]
