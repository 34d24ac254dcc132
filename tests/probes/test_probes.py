"""Probes measure real engines on two real ranks."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.load import load_study
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.probes import PROBES
from pipeline.probes.execute import find_probe, run_probe
from pipeline.probes.params import at_stage, check_probe
from pipeline.study.estimate import state_bytes_formula
from pipeline.study.plan import plan_study
from pipeline.tracking.store import ProbeResult, read_probe_result, read_verdict
from pipeline.training.distributed import RankContext
from tests.probes.cases import ARMS
from tests.probes.cases import measure as measure_alone
from tests.training.cases import MODELS, VOCAB_SIZE, small_run
from tests.training.rank_pool import RankPool

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "study" / "quickstart.yaml"
LENGTHS = [4, 8, 16]
STEP_TIME = {"tokens_per_step": 64, "sequence_tokens": LENGTHS, "repeats": 3, "warmup_steps": 2}


def write_probe(run_dir: Path, prepared_dir: Path | None, probe: str, params: Any) -> Path:
    """Write the directory of a probe cell over both families."""
    run_dir.mkdir(parents=True)
    runs = {}
    for family in MODELS:
        run = small_run(family, 1).model_dump(mode="json")
        run["data"]["prepared_dir"] = prepared_dir and str(prepared_dir)
        runs[family] = run
    tree = {"study": "small", "probe": probe, "params": params, "runs": runs}
    (run_dir / "probe.yaml").write_text(yaml.safe_dump(tree))
    return run_dir


def probe_rank(ranks: RankContext, run_dir: Path) -> str | None:
    """Run the probe in a group that exists already; give our own error instead of raising it."""
    try:
        run_probe(run_dir, "cpu")
    except PipelineError as exc:
        return f"{type(exc).__name__}: {exc}"
    return None


def measure(
    two_ranks: RankPool, tmp_path: Path, prepared_dir: Path | None, probe: str, params: Any
) -> ProbeResult:
    run_dir = write_probe(tmp_path / f"{probe}-w2", prepared_dir, probe, params)
    assert two_ranks.run(probe_rank, run_dir) == [None, None]
    return read_probe_result(run_dir)


@pytest.mark.slow
def test_step_time_times_every_arm_once_a_round(
    two_ranks: RankPool, tmp_path: Path, prepared_dir: Path
) -> None:
    result = measure(two_ranks, tmp_path, prepared_dir, "step_time", STEP_TIME)
    assert (result.run, result.study, result.world_size) == ("step_time-w2", "small", 2)
    assert result.params == STEP_TIME
    arms = [(label, length) for label in MODELS for length in LENGTHS]
    for number in range(3):
        order = [(r["label"], r["sequence_tokens"]) for r in result.records if r["round"] == number]
        # The order of the arms turns round every round, so that drift falls on all of them alike.
        assert order == (arms if number % 2 == 0 else arms[::-1])
    assert all(r["step_seconds"] > 0 for r in result.records)
    assert all(r["tokens_per_step"] == 64 for r in result.records)
    assert sum("warmup_seconds" in r for r in result.records) == len(arms)
    for record in result.records:
        assert record["cpu_seconds"] > 0
        assert record["load_average"] >= 0
        assert record["threads"] == 1
        shape = small_run(record["label"]).model
        assert record["flops_per_token"] == shape.flops_per_token(
            VOCAB_SIZE, record["sequence_tokens"]
        )


@pytest.mark.slow
def test_step_time_takes_arms_and_threads_of_its_own(
    two_ranks: RankPool, tmp_path: Path, prepared_dir: Path
) -> None:
    params = {
        "tokens_per_step": 32, "sequence_tokens": [8], "repeats": 1, "threads": [1, 2],
        "models": {name: ARMS[name] for name in ("input_feeding", "min_lstm")},
    }  # fmt: skip
    result = measure(two_ranks, tmp_path, prepared_dir, "step_time", params)
    arms = [(r["label"], r["threads"]) for r in result.records]
    assert arms == [(label, n) for label in ("input_feeding", "min_lstm") for n in (1, 2)]
    assert all(r["step_seconds"] > 0 for r in result.records)


@pytest.mark.slow
def test_model_state_meets_the_closed_form_and_falls_stage_by_stage(
    two_ranks: RankPool, tmp_path: Path, prepared_dir: Path
) -> None:
    result = measure(two_ranks, tmp_path, prepared_dir, "model_state", {})
    assert len(result.records) == 2 * 4 * 2
    for family in MODELS:
        count = small_run(family).model.num_parameters(VOCAB_SIZE).total
        sums: dict[int, dict[str, int]] = {}
        for record in result.records:
            if record["label"] == family:
                assert record["num_parameters"] == count
                stage = sums.setdefault(record["zero_stage"], {})
                for name in ("parameter_bytes", "gradient_bytes", "optimizer_bytes"):
                    stage[name] = stage.get(name, 0) + record[name]
        # Summed over both ranks; what is split is there once, what is not is there twice.
        for stage_number, stage in sums.items():
            formula = state_bytes_formula(count, stage_number, 2)
            assert stage["parameter_bytes"] == pytest.approx(2 * formula.parameters, rel=0.02)
            assert stage["gradient_bytes"] == pytest.approx(2 * formula.gradients, rel=0.2)
            expected = 2 * (formula.moments + formula.master_weights)
            assert stage["optimizer_bytes"] == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_ranks_share_trainings_and_give_what_one_rank_gives(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    params = {
        "task": "parity", "learning_rates": [1e-3, 1e-2, 3e-2], "max_steps": 2,
        "batch_samples": 4, "test_samples": 8,
    }  # fmt: skip
    result = measure(two_ranks, tmp_path, None, "synthetic_task", params)
    runs = {family: small_run(family, 1) for family in MODELS}
    alone = measure_alone("synthetic_task", params, runs)
    assert len(alone) == 2 * 2 * 3
    for records in (alone, result.records):
        for record in records:
            record.pop("cpu_seconds", None)
    assert result.records == alone


@pytest.mark.slow
def test_one_rank_of_two_reads_the_text(
    two_ranks: RankPool, tmp_path: Path, prepared_dir: Path
) -> None:
    params = {"sequence_tokens": 8, "num_samples": 6, "seeds": [0], "kept_tokens": [2]}
    result = measure(two_ranks, tmp_path, prepared_dir, "shuffle", params)
    assert {record["label"] for record in result.records} == {*MODELS, "unigram", "bigram"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({**STEP_TIME, "tokens_per_step": 72}, r"not a multiple of seq\(8\) x world\(2\)=16"),
        ({**STEP_TIME, "sequence_tokens": [32]}, "longer than families.gpt.model.max_positions=17"),
        ({**STEP_TIME, "repeat": 3}, "unknown key repeat"),
    ],
)
def test_arguments_that_contradict_are_refused_on_every_rank(
    two_ranks: RankPool, tmp_path: Path, prepared_dir: Path, params: Any, message: str
) -> None:
    run_dir = write_probe(tmp_path / "bad", prepared_dir, "step_time", params)
    for error in two_ranks.run(probe_rank, run_dir):
        assert error is not None
        assert error.startswith(ConfigError.__name__)
        assert re.search(message, error)
    assert read_verdict(run_dir) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("probe", "params", "is_named"),
    [("model_state", {}, True), ("model_state", {}, False), ("step_time", STEP_TIME, False)],
)
def test_a_probe_without_prepared_text_names_what_is_missing(
    two_ranks: RankPool, tmp_path: Path, probe: str, params: Any, is_named: bool
) -> None:
    prepared_dir = tmp_path / "nothing" if is_named else None
    run_dir = write_probe(tmp_path / "empty", prepared_dir, probe, params)
    for error in two_ranks.run(probe_rank, run_dir):
        assert error is not None
        assert error.startswith(DataError.__name__)
        assert "launch prepare" in error
        assert is_named or f"{run_dir / 'probe.yaml'} names no prepared data" in error


def test_every_registered_probe_can_be_found() -> None:
    for name in PROBES:
        assert callable(find_probe(name))


def test_an_unknown_probe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"'step_tine' is not one of attention_use, bench, .*, step_time"
    ):
        find_probe("step_tine")


@pytest.mark.parametrize(
    ("probe", "params", "message"),
    [
        ("step_tine", {}, r"'step_tine' is not one of attention_use, bench, .*, step_time"),
        (
            "step_time",
            {**STEP_TIME, "tokens_per_step": 72},
            r"seq\(8\) x world\(2\)=16; nearest: 64",
        ),
        ("step_time", {**STEP_TIME, "sequence_tokens": [32]}, "max_positions=17"),
        ("step_time", {"repeats": 1}, "tokens_per_step"),
        ("model_state", {"stages": [4]}, r"stage=4 is outside 0..3"),
        ("model_state", {"stagse": [1]}, "did you mean stages"),
        ("context_use", {"sequence_tokens": 8}, "params.seeds and params.trained are both empty"),
        (
            "shuffle",
            {"sequence_tokens": 8, "trained": {"gtp": ["a"]}},
            "params.trained names 'gtp'; known labels: gpt, lstm_attention",
        ),
        (
            "step_time",
            {**STEP_TIME, "models": {"short": {"family": "gpt", "max_positions": 8}}},
            "longer than families.short.model.max_positions=8",
        ),
    ],
)
def test_a_probe_that_cannot_run_is_refused_before_any_process_starts(
    probe: str, params: Any, message: str
) -> None:
    runs = {family: small_run(family) for family in MODELS}
    with pytest.raises(ConfigError, match=message):
        check_probe(probe, params, runs, 2)


def test_a_compiled_run_is_measured_at_every_stage() -> None:
    run = small_run("gpt", 1, train={"compile": True})
    check_probe("model_state", {}, {"gpt": run}, 2)
    assert [at_stage(run, stage).train.compile for stage in range(4)] == [True, True, True, False]


def test_the_probes_of_the_quickstart_can_run() -> None:
    plan = plan_study(load_study(QUICKSTART))
    assert {cell.probe for cell in plan.probe_cells} == {"step_time", "model_state"}
    for cell in plan.probe_cells:
        check_probe(cell.probe, cell.params, cell.runs, cell.num_workers)
