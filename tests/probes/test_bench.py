"""The bench of one run on two real ranks: its parts add up, what it cannot measure is absent."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.probes.bench import covered
from pipeline.probes.params import check_probe
from pipeline.tracking.store import read_probe_result
from tests.probes.test_probes import probe_rank
from tests.training.cases import GLOBAL_BATCH_SAMPLES, SEQUENCE_TOKENS, VOCAB_SIZE, small_run
from tests.training.rank_pool import RankPool

STEPS = 5
TOKENS = GLOBAL_BATCH_SAMPLES * SEQUENCE_TOKENS


def bench(
    two_ranks: RankPool, run_dir: Path, prepared_dir: Path, config: RunConfig
) -> dict[str, dict[str, Any]]:
    run = config.model_dump(mode="json")
    run["data"]["prepared_dir"] = str(prepared_dir)
    run_dir.mkdir()
    tree = {"probe": "bench", "params": {"steps": STEPS}, "runs": {"gpt": run}}
    (run_dir / "probe.yaml").write_text(yaml.safe_dump(tree))
    assert two_ranks.run(probe_rank, run_dir) == [None, None]
    records = read_probe_result(run_dir).records
    assert {record["label"] for record in records} == {"gpt"}
    return {record["name"]: record for record in records}


@pytest.mark.slow
def test_parts_of_a_step_add_up_and_rates_follow_from_it(
    two_ranks: RankPool, tmp_path: Path, prepared_dir: Path
) -> None:
    config = small_run("gpt", 1)
    measured = bench(two_ranks, tmp_path / "bench", prepared_dir, config)
    value = {name: record["value"] for name, record in measured.items()}
    parts = [value[f"{part}_seconds"] for part in ("forward", "backward", "optimizer")]
    assert 0.3 * value["step_seconds"] < sum(parts) < 1.5 * value["step_seconds"]
    assert value["communication_seconds"] > 0.0
    # The median of five is one of them, so rate and time are of the same step.
    assert value["tokens_per_second"] == pytest.approx(TOKENS / value["step_seconds"])
    flops_per_token = config.model.flops_per_token(VOCAB_SIZE, SEQUENCE_TOKENS)
    rate = value["tokens_per_second"] * flops_per_token
    assert value["flops_per_second"] == pytest.approx(rate)
    assert value["peak_fraction"] == pytest.approx(rate / value["peak_flops_per_second"])
    # A product of 1024 x 1024 runs at more than a gigaflop everywhere, at less than ten tera.
    assert 1e9 < value["peak_flops_per_second"] < 1e13
    assert value["peak_memory_bytes"] > 50_000_000
    assert measured["step_seconds"]["num"] == measured["torch_step_seconds"]["num"] == STEPS
    assert measured["step_seconds"]["spread"] > 0.0
    assert value["deepspeed_share_fraction"] > -1.0


@pytest.mark.slow
def test_a_format_that_bare_pytorch_lacks_is_not_compared(
    two_ranks: RankPool, tmp_path: Path, prepared_dir: Path
) -> None:
    config = small_run("gpt", 2, precision="bf16")
    measured = bench(two_ranks, tmp_path / "bench", prepared_dir, config)
    assert "peak_fraction" in measured
    assert measured.keys().isdisjoint({"torch_step_seconds", "deepspeed_share_fraction"})


def test_overlapping_spans_count_once() -> None:
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.0)]) == 4.0
    assert covered([]) == 0.0


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"steps.*greater than or equal to 4|at least 4"):
        check_probe("bench", {"steps": 3}, {"gpt": small_run()}, 2)
