"""Batch, learning rate, betas, warm-up and tokens from a model's size; what is stated wins."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.automatic import PUBLISHED_RULE, RULES, list_origins
from pipeline.config.batching import plan_batches
from pipeline.config.cluster import check_run_on_cluster
from pipeline.config.explain import known_families
from pipeline.config.load import build_run, config_hash, dump_yaml, load_run, read_run
from pipeline.config.schema import RunConfig, TrainConfig
from pipeline.errors import ConfigError

GPT = {"family": "gpt"}


def automatic(**train: Any) -> RunConfig:
    return build_run({"model": GPT, "train": {"automatic": True, **train}}, "test")


def size_of(run: RunConfig) -> int:
    return run.model.num_parameters(0).non_embedding


@pytest.mark.parametrize(
    ("num_parameters", "rate", "batch_tokens", "beta2"),
    [
        (100_000_000, 2.4e-3, 311_000, 0.99),
        (190_000_000, 1.95e-3, 478_000, 0.99),
        (370_000_000, 1.56e-3, 745_000, 0.95),
        (760_000_000, 1.23e-3, 1_200_000, 0.95),
        (108_000_000, 2.35e-3, 327_680, 0.99),
    ],
)
def test_the_published_rule_gives_the_values_worked_out_by_hand(
    num_parameters: int, rate: float, batch_tokens: int, beta2: float
) -> None:
    rule = PUBLISHED_RULE
    assert rule.learning_rate_at(num_parameters) == pytest.approx(rate, rel=0.005)
    assert rule.batch_tokens_at(num_parameters) == pytest.approx(batch_tokens, rel=0.005)
    assert rule.beta2_at(rule.batch_tokens_at(num_parameters)) == beta2


def test_every_family_has_a_rule() -> None:
    assert set(RULES) == set(known_families())


def test_a_run_is_filled_from_its_own_size() -> None:
    run = automatic()
    size, train = size_of(run), run.train
    assert train.optimizer.learning_rate == RULES["gpt"].learning_rate_at(size)
    assert train.global_batch_tokens == pytest.approx(RULES["gpt"].batch_tokens_at(size), rel=0.1)
    assert train.total_tokens == pytest.approx(20 * size, abs=train.global_batch_tokens / 2)
    assert train.schedule.warmup_fraction * train.total_tokens == pytest.approx(size)
    assert (train.optimizer.beta1, train.optimizer.beta2) == (0.9, 0.99)
    assert set(list_origins(run)["by_rule"]) == set(train.filled_by_rule or ())
    assert list_origins(run)["stated"] == {}


def test_off_by_default_nothing_is_filled() -> None:
    run = build_run({"model": GPT}, "test")
    assert run.train.filled_by_rule is None
    assert list_origins(run) == {}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("global_batch_tokens", 16384),
        ("total_tokens", 16384 * 100),
        ("optimizer.learning_rate", 1e-3),
        ("optimizer.beta1", 0.9),
        ("optimizer.beta2", 0.95),
        ("schedule.warmup_fraction", 0.02),
    ],
)
def test_a_stated_value_wins_also_when_it_is_the_default(
    tmp_path: Path, path: str, value: float
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: {family: gpt}\ntrain: {automatic: true}\n")
    stated = [f"train.{path}={value}"]
    if path == "total_tokens":
        stated.append("train.global_batch_tokens=16384")
    origins = list_origins(load_run(config, stated))
    assert origins["stated"][path] == value
    assert path not in origins["by_rule"]
    assert len(origins["by_rule"]) == 6 - len(stated)


def test_later_fields_follow_from_stated_ones() -> None:
    run = automatic(global_batch_tokens=524_288, total_tokens=524_288 * 10)
    assert run.train.optimizer.beta2 == 0.95
    assert run.train.schedule.warmup_fraction == size_of(run) / (524_288 * 10)


def test_tokens_follow_the_stated_multiple_of_the_parameters() -> None:
    run = automatic(tokens_per_parameter=5)
    assert run.train.total_tokens == pytest.approx(
        5 * size_of(run), abs=run.train.global_batch_tokens / 2
    )


@pytest.mark.parametrize(
    ("micro", "length", "num_ranks"), [(2, 128, 8), (8, 128, 4), (8, 256, 2), (4, 1024, 1)]
)
def test_a_filled_batch_divides_over_as_many_ranks_as_ten_percent_allow(
    micro: int, length: int, num_ranks: int
) -> None:
    # The rule gives 12,2xx tokens at this size, and 5% of it are about 600.
    run = automatic(micro_batch_samples=micro, sequence_tokens=length)
    wanted = RULES["gpt"].batch_tokens_at(size_of(run))
    units = {n: n * micro * length for n in (8, 4, 2, 1)}
    legal = [n for n, unit in units.items() if abs(round(wanted / unit) * unit / wanted - 1) <= 0.1]
    assert (legal or [1])[0] == num_ranks
    assert plan_batches(run.train, num_ranks).global_batch_tokens == run.train.global_batch_tokens
    assert abs(run.train.global_batch_tokens - wanted) <= units[num_ranks] / 2


def test_a_large_model_divides_over_all_powers_of_two_up_to_eight_ranks() -> None:
    model = {"family": "gpt", "width": 768, "depth": 12, "heads": 12}
    train = {"automatic": True, "sequence_tokens": 1024}
    run = build_run({"model": model, "train": train}, "test")
    for num_ranks in (1, 2, 4, 8):
        check_run_on_cluster(run, num_ranks, "cpu")


def test_a_resolved_run_reads_back_the_same_and_is_not_filled_again(tmp_path: Path) -> None:
    run = automatic(tokens_per_parameter=5)
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    assert read_run(tmp_path) == run
    again = load_run(tmp_path / "run.yaml", ["model.width=64"])
    assert again.train == run.train
    assert config_hash(load_run(tmp_path / "run.yaml")) == config_hash(run)


def profiled(steps: str) -> RunConfig:
    tree = {"model": GPT, "train": {"automatic": True}, "profile": {"steps": steps}}
    return build_run(tree, "test")


def test_profiled_steps_are_checked_against_the_filled_ones(tmp_path: Path) -> None:
    total = automatic().train.total_steps
    assert total > TrainConfig().total_steps
    run = profiled(f"{total}..{total}")
    assert run.profile.first_and_last == (total, total)
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    assert read_run(tmp_path) == run
    steps = f"{total}..{total + 1}"
    with pytest.raises(ConfigError, match=rf"profile.steps={steps} goes .* the run's {total} "):
        profiled(steps)
    # More than the default has, and more than this run has: it is short.
    short = {"automatic": True, "tokens_per_parameter": 2}
    with pytest.raises(ConfigError, match="profile.steps=299..300 goes beyond"):
        build_run({"model": GPT, "train": short, "profile": {"steps": "299..300"}}, "test")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"micro_batch_samples": 64},
            r"micro\(64\) x seq\(256\)=16384 tokens exceeds .* lower train.micro_batch\w* to 4",
        ),
        ({"total_tokens": 1_000_001}, "total_tokens=1000001 is not a multiple of .*; nearest: "),
        (
            {"global_batch_tokens": 2048, "total_tokens": 204_800},
            r"the warm-up of .* tokens outlasts total_tokens=204,800; state train.schedule",
        ),
        (
            {"tokens_per_parameter": 20, "global_batch_tokens": 2048, "total_tokens": 4_096_000},
            "tokens_per_parameter=20 and total_tokens=4096000 are two ways to say the same",
        ),
        ({"automatic": False, "tokens_per_parameter": 20}, "with automatic=true only"),
        ({"automatic": False, "filled_by_rule": ["total_tokens"]}, "with automatic=true only"),
        ({"tokens_per_parameter": 0}, "greater than 0"),
        ({"micro_batch_samples": "many"}, "micro_batch_samples: .*got 'many'"),
        ({"optimizer": {"beta3": 1}}, "unknown key train.optimizer.beta3"),
    ],
)
def test_a_contradiction_is_refused(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        automatic(**train)


def test_a_wrong_model_is_explained_before_anything_is_filled() -> None:
    with pytest.raises(ConfigError, match="unknown key model.widht; did you mean model.width"):
        build_run({"model": {"family": "gpt", "widht": 3}, "train": {"automatic": True}}, "test")
