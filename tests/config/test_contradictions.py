"""Every contradiction fails when a config is read, naming path and nearest legal value."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.batching import plan_batches
from pipeline.config.cluster import check_run_on_cluster
from pipeline.config.load import build_run, load_run, load_study
from pipeline.config.schema import RunConfig, TrainConfig
from pipeline.errors import ConfigError

GPT = "model: {family: gpt}"


def run_of(**fields: object) -> RunConfig:
    return build_run({"model": {"family": "gpt"}, **fields}, "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"{GPT}\ntrain: {{global_batch_tokens: 5000}}",
            "train.global_batch_tokens=5000 is not a multiple of micro(8) x seq(256)=2048; "
            "nearest: 4096 or 6144",
        ),
        (
            f"{GPT}\ntrain: {{global_batch_tokens: 1000, total_tokens: 1000}}",
            "train.global_batch_tokens=1000 is not a multiple of micro(8) x seq(256)=2048; "
            "nearest: 2048",
        ),
        (
            f"{GPT}\ntrain: {{total_tokens: 20000}}",
            "train.total_tokens=20000 is not a multiple of global_batch_tokens=16384; "
            "nearest: 16384 or 32768",
        ),
        (
            "model: {family: gpt, max_positions: 128}",
            "train.sequence_tokens=256 is longer than model.max_positions=128; "
            "nearest: train.sequence_tokens=128 or model.max_positions=256",
        ),
        (
            f"{GPT}\nprofile: {{steps: 12}}",
            "profile.steps",
        ),
        (
            f"{GPT}\nprofile: {{steps: 10-12}}",
            "profile.steps=10-12 is not FIRST..LAST, such as 10..12, nor null",
        ),
        (
            f"{GPT}\nprofile: {{steps: 0..2}}",
            "profile.steps=0..2: the first is at least 1 and the last not below it; nearest: 1..2",
        ),
        (
            f"{GPT}\nprofile: {{steps: 12..10}}",
            "profile.steps=12..10: the first is at least 1 and the last not below it; "
            "nearest: 12..12",
        ),
        (
            f"{GPT}\nprofile: {{steps: 299..301}}",
            "profile.steps=299..301 goes beyond the run's 300 steps; nearest: 299..300",
        ),
        (
            "model: {family: gpt, causal: false}",
            "model.causal=false reads the next token, which training and evaluation ask it to "
            "predict, and there is no other objective yet; legal: true",
        ),
        (
            f"{GPT}\ntrain: {{compile: true}}\nzero: {{stage: 3}}",
            "train.compile=true gains nothing at zero.stage=3",
        ),
        (
            "model: {family: lstm_attention, feed_forward: false}\ntrain: {compile: true}",
            "train.compile=true finds nothing to compile with model.feed_forward=false",
        ),
        ("model: {family: gpt, preset: [a]}", "model.preset: Input should be 'gpt2_124m', "),
        ("model: {family: gpt, preset: {}}", "model.preset: Input should be 'gpt2_124m', "),
        (
            "model: {family: lstm_attention, width: 130, heads: 4}",
            "model.width=130 is not a multiple of heads=4; nearest width: 128 or 132",
        ),
        (f"{GPT}\nzero: {{stage: 4}}", "zero.stage=4 is outside 0..3; nearest: 3"),
        (f"{GPT}\nzero: {{stage: -1}}", "zero.stage=-1 is outside 0..3; nearest: 0"),
        (
            "model: {family: gpt, width: 130, heads: 4}",
            "model.width=130 is not a multiple of heads=4; nearest width: 128 or 132",
        ),
        (
            "model: {family: gpt, width: 12, heads: 4}",
            "model.positions=rope rotates pairs, but width/heads=3 is odd",
        ),
        (
            "model: {family: lstm_attention, depth: 1, attention_after: second_last}",
            "model.attention_after=second_last needs depth >= 2",
        ),
        (
            f"{GPT}\ntrain: {{schedule: {{kind: wsd, warmup_fraction: 0.9}}}}",
            "train.schedule.warmup_fraction=0.9 + decay_fraction=0.2 > 1; "
            "nearest decay_fraction: 0.1",
        ),
        ("model: {family: gpt, depth: 0}", "model.depth: Input should be greater than or equal"),
        ("model: {family: gpt, depth: 0}", "(got 0); nearest: 1"),
        (f"{GPT}\nprecision: bf32", "precision: Input should be 'fp32', 'bf16' or 'fp16'"),
        (f"{GPT}\nprecision: fp23", "did you mean fp32?"),
        (f"{GPT}\ntrain: {{optimizer: {{learning_rate: .inf}}}}", "train.optimizer.learning_rate"),
        (f"{GPT}\ndata: {{source: {{kind: jsonl}}}}", "data.source.kind=jsonl needs path"),
        (f"{GPT}\ndata: {{source: {{path: a.txt}}}}", "data.source.kind=embedded takes no path"),
        (f"{GPT}\nname: ../up", "name: String should match pattern"),
        (f"{GPT}\nseed: -1", "seed: Input should be greater than or equal to 0 (got -1)"),
        ("model: {width: 64}", "model.family is missing; known: gpt, lstm_attention"),
        ("model: {family: gtp}", "model.family='gtp' is unknown; did you mean gpt?"),
        ("name: empty", "model is missing"),
        (f"{GPT}\ntrian: {{}}", "unknown key trian; did you mean train?"),
        (
            f"{GPT}\ntrain: {{optimizer: {{learning_rte: 1}}}}",
            "unknown key train.optimizer.learning_rte; did you mean train.optimizer.learning_rate?",
        ),
        (f"{GPT}\nlearning_rate: 1", "did you mean train.optimizer.learning_rate?"),
        ("model: {family: gpt, widht: 64}", "unknown key model.widht; did you mean model.width?"),
        (
            "model: {family: gpt, forget_bias: 1.0}",
            "model.forget_bias is no field of this family; it belongs to lstm_attention",
        ),
    ],
)
def test_a_run_that_contradicts_itself_is_refused_with_path_and_nearest_value(
    text: str, message: str, write_config: Callable[[str], Path]
) -> None:
    path = write_config(text)
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("attention", ["none", "dot", "additive"])
def test_heads_need_not_divide_a_width_that_no_head_cuts(attention: str) -> None:
    model = {"family": "lstm_attention", "width": 130, "heads": 4, "attention": attention}
    assert run_of(model=model).model.width == 130


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_run_compiles_where_parameters_stay_whole(stage: int) -> None:
    for family in ("gpt", "lstm_attention"):
        run = run_of(model={"family": family}, train={"compile": True}, zero={"stage": stage})
        assert run.train.compile


def test_every_problem_is_told_at_once(write_config: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(write_config("model: {family: gpt, widht: 1}\nzero: {stage: 9}\nseed: x"))
    assert [line.partition("config.yaml: ")[2] for line in str(caught.value).splitlines()] == [
        "seed: Input should be a valid integer, unable to parse string as an integer (got 'x')",
        "unknown key model.widht; did you mean model.width?",
        "zero.stage=9 is outside 0..3; nearest: 3",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "base: {trian: {}}\nfamilies: {a: {model: {family: gpt}}}",
            "families.a: unknown key trian; did you mean train?",
        ),
        (
            "families: {gpt: {model: {family: gpt, heds: 2}}}",
            "families.gpt: unknown key model.heds; did you mean model.heads?",
        ),
        (
            "base: {zero: {stage: 5}}\nfamilies: {a: {model: {family: gpt}}}",
            "families.a: zero.stage=5 is outside 0..3; nearest: 3",
        ),
        ("families: {}", "families: Dictionary should have at least 1 item"),
        (
            "familes: {a: {model: {family: gpt}}}",
            "unknown key familes; did you mean families?",
        ),
        (
            "families: {a: {model: {family: gpt}}}\nprobes: [{prob: step_time}]",
            "unknown key probes.0.prob",
        ),
        (
            "families: {a: {model: {family: gpt}}}\nmatch: {reference: b}",
            "match.reference='b' is not one of the families ['a']",
        ),
        (
            "families: {a: {model: {family: gpt}}}\ncluster: {num_worker: 2}",
            "unknown key cluster.num_worker; did you mean cluster.num_workers?",
        ),
    ],
)
def test_a_study_is_checked_down_to_the_runs_of_its_families(
    text: str, message: str, write_config: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(write_config(f"name: s\n{text}"))
    assert message in str(caught.value)


def test_fp16_on_a_cpu_is_refused() -> None:
    run = run_of(precision="fp16")
    with pytest.raises(ConfigError, match="precision=fp16 on a CPU.*nearest: bf16 or fp32"):
        check_run_on_cluster(run, 1, "cpu")
    assert check_run_on_cluster(run, 1, "cuda").world_size == 1


def test_a_world_size_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        check_run_on_cluster(run_of(), 3, "cpu")
    assert str(caught.value) == (
        "train.global_batch_tokens=16384 is not a multiple of micro(8) x seq(256) x world(3)=6144; "
        "nearest: 12288 or 18432"
    )
    with pytest.raises(ConfigError, match="world size 0 is not positive; nearest: 1"):
        check_run_on_cluster(run_of(), 0, "cpu")


def test_the_global_batch_is_the_same_at_every_world_size() -> None:
    train = TrainConfig(
        global_batch_tokens=12288, sequence_tokens=64, micro_batch_samples=4, total_tokens=122880
    )
    for world_size, accumulation_steps in {1: 48, 2: 24, 3: 16, 4: 12, 16: 3, 48: 1}.items():
        plan = plan_batches(train, world_size)
        assert plan.accumulation_steps == accumulation_steps
        assert plan.global_batch_tokens == train.global_batch_tokens
        assert plan.samples_per_rank * world_size == plan.global_batch_samples == 192
