"""A study resolves into cells with stable names, or is refused before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.automatic import RULES
from pipeline.config.load import load_study
from pipeline.config.study import StudyConfig
from pipeline.errors import ConfigError
from pipeline.study.plan import plan_study

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "study" / "quickstart.yaml"


def changed(config: StudyConfig, **fields: Any) -> StudyConfig:
    return StudyConfig.model_validate({**config.model_dump(), **fields})


def test_cells_are_families_times_seeds_and_probes_times_world_sizes(
    study_config: StudyConfig,
) -> None:
    plan = plan_study(changed(study_config, seeds=[0, 7]))
    assert [cell.name for cell in plan.train_cells] == [
        "gpt-seed0", "lstm_attention-seed0", "gpt-seed7", "lstm_attention-seed7",
    ]  # fmt: skip
    assert [cell.name for cell in plan.probe_cells] == [
        "step_time-w2", "model_state-w1", "model_state-w2",
    ]  # fmt: skip
    assert [cell.run.seed for cell in plan.train_cells] == [0, 0, 7, 7]
    assert plan.train_cells[0].run.name == "gpt-seed0"
    assert plan.num_cells == 7


def test_families_share_all_but_what_they_state(study_config: StudyConfig) -> None:
    families = {
        "gpt": {"model": {"family": "gpt"}, "train": {"optimizer": {"learning_rate": 0.5}}},
        "other": {"model": {"family": "gpt"}},
    }
    plan = plan_study(changed(study_config, families=families, match=None))
    own, other = plan.families["gpt"].train, plan.families["other"].train
    assert own.optimizer.learning_rate == 0.5
    assert own.model_copy(update={"optimizer": other.optimizer}) == other


def test_the_quickstart_matches_its_families_within_two_percent() -> None:
    plan = plan_study(load_study(QUICKSTART))
    counts = [run.model.num_parameters(2048).non_embedding for run in plan.families.values()]
    assert len(counts) == 2
    assert abs(counts[1] / counts[0] - 1) < 0.02
    trains = [run.train for run in plan.families.values()]
    assert trains[0].total_steps == trains[1].total_steps >= 200


def test_an_automatic_family_is_filled_at_its_matched_size(study_config: StudyConfig) -> None:
    base = {"train": {"automatic": True, "sequence_tokens": 64, "micro_batch_samples": 1}}
    plan = plan_study(changed(study_config, base=base))
    for run in plan.families.values():
        size = run.model.num_parameters(0).non_embedding
        rule = RULES[run.model.family]
        assert run.train.optimizer.learning_rate == rule.learning_rate_at(size)
    sizes = [size.model for size in plan.sizes.values()]
    assert [run.model for run in plan.families.values()] == sizes
    assert sizes[1].width != study_config.families["lstm_attention"]["model"].get("width", 128)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": [1, 1]}, "both named gpt-seed1"),
        ({"probes": [{"probe": "model_state", "num_workers": [0]}]}, "world size 0"),
        ({"cluster": {"num_workers": 3}}, "not a multiple of .* nearest"),
        ({"base": {"seed": 3}}, "seed is set by the study"),
        ({"families": {"gpt": {"model": {"family": "gpt", "wdith": 3}}}}, "did you mean .*width"),
    ],
)
def test_a_contradiction_is_refused(
    study_config: StudyConfig, fields: dict[str, Any], message: str
) -> None:
    base = study_config.base if "base" not in fields else {**study_config.base, **fields["base"]}
    with pytest.raises(ConfigError, match=message):
        plan_study(changed(study_config, **{**fields, "base": base}))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"data": {"tokenizer": {"vocab_size": 512}}},
            r"data\.tokenizer\.vocab_size is 2048 in families\.gpt, 512 in families\.other",
        ),
        ({"eval": {"max_tokens": 100}}, r"eval\.max_tokens is none in families\.gpt, 100 in"),
    ],
)
def test_families_with_other_validation_tokens_are_refused(
    study_config: StudyConfig, own: dict[str, Any], message: str
) -> None:
    families = {
        "gpt": {"model": {"family": "gpt"}},
        "other": {"model": {"family": "gpt"}, **own},
    }
    with pytest.raises(ConfigError, match=message):
        plan_study(changed(study_config, families=families, match=None))


def test_matching_total_parameters_needs_a_known_vocabulary(study_config: StudyConfig) -> None:
    base = {**study_config.base, "data": {"tokenizer": {"path": "some/tokenizer.json"}}}
    match = {"reference": "gpt", "quantity": "total_parameters"}
    with pytest.raises(ConfigError, match="model.vocab_size"):
        plan_study(changed(study_config, base=base, match=match))
