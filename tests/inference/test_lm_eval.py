"""Scores of lm-evaluation-harness beside plain computation and beside its own `hf` model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from pipeline.errors import ConfigError
from pipeline.inference.export import export_model, plan_export
from pipeline.inference.lm_eval_adapter import TandemLM, check_tasks, evaluate_tasks
from tests.inference.cases import TEXTS
from tests.inference.conftest import Made
from tests.inference.test_scoring import plain_log_likelihoods

TASKS = Path(__file__).parent / "tasks"
PAIRS = [
    ("The old river", " runs"),
    ("The old river ", "runs"),
    ("", "A new moon falls"),
    ("x" * 150, " and more"),
    ("日本", "語 and 😀"),
]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """The tasks with the path of their data, which the harness wants absolute."""
    directory = tmp_path / "tasks"
    directory.mkdir()
    for file in TASKS.glob("*.yaml"):
        text = file.read_text().replace("RIVERS", str(TASKS / "rivers.jsonl"))
        (directory / file.name).write_text(text)
    return directory


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=0)  # type: ignore[arg-type]
        for pair in arguments
    ]


def test_loglikelihoods_are_those_of_a_plain_computation(made: Made) -> None:
    trained = made.load()
    codec, limit = trained.codec, made.model.max_positions
    model = TandemLM(loaded=trained, batch_size=2)
    found = model.loglikelihood(requests("loglikelihood", PAIRS))
    for (context, continuation), (likelihood, _) in zip(PAIRS, found, strict=True):
        moved = context[len(context.rstrip()) :] + continuation
        before = codec.encode(context.rstrip())
        tokens = codec.encode(context.rstrip() + moved)
        start = len(before)
        if not before:
            tokens, start = [trained.codec.facts.end_of_document_id, *tokens], 1
        cut = max(0, len(tokens) - limit - 1)
        expected = sum(plain_log_likelihoods(made.model, tokens[cut:], start - cut))
        assert likelihood == pytest.approx(expected, abs=1e-4)


def test_whole_texts_are_scored_in_windows_of_the_models_positions(made: Made) -> None:
    trained = made.load()
    model = TandemLM(loaded=trained)
    long = " ".join(TEXTS)
    (found,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(long,)]))
    tokens = [trained.codec.facts.end_of_document_id, *trained.codec.encode(long)]
    assert len(tokens) > 65
    expected, scored = 0.0, 1
    while scored < len(tokens):
        stop = min(scored + 64, len(tokens))
        begin = max(0, stop - 65)
        expected += sum(plain_log_likelihoods(made.model, tokens[begin:stop], scored - begin))
        scored = stop
    assert found == pytest.approx(expected, abs=1e-3)


def test_generation_stops_at_a_string_and_leaves_it_out(made: Made) -> None:
    model = TandemLM(loaded=made.load())
    options = {"until": [], "max_gen_toks": 30}
    (whole,) = model.generate_until(requests("generate_until", [("The old", options)]))
    stop = whole[4]
    (cut,) = model.generate_until(
        requests("generate_until", [("The old", options | {"until": [stop]})])
    )
    assert cut == whole.split(stop)[0]


def test_repeats_of_a_sampled_request_differ_and_can_be_drawn_again(made: Made) -> None:
    model = TandemLM(loaded=made.load())
    options = {"until": [], "max_gen_toks": 30, "do_sample": True, "temperature": 1.0, "top_k": 0}
    repeats = requests("generate_until", [("The old", options)] * 3)
    texts = model.generate_until(repeats)
    assert len(set(texts)) == 3
    assert model.generate_until(repeats) == texts


def test_a_task_is_scored_for_either_family(made: Made, tasks: Path) -> None:
    trained = made.load()
    scores = evaluate_tasks(trained, ["tandem_rivers", "tandem_continued"], tasks)
    right = 0
    for question, choices, gold in (
        ("The old river runs past the", ["dark stone", "new moon"], 0),
        ("A new moon falls on the", ["stone", "river"], 1),
        ("The sun is", ["old", "naïve café", "light"], 0),
    ):
        context = trained.codec.encode(question)
        sums = []
        for choice in choices:
            tokens = trained.codec.encode(f"{question} {choice}")
            sums.append(sum(plain_log_likelihoods(made.model, tokens, len(context))))
        right += sums.index(max(sums)) == gold
    assert scores["tandem_rivers"]["acc,none"] == pytest.approx(right / 3)
    assert 0.0 <= scores["tandem_continued"]["exact_match,none"] <= 1.0


def test_an_exported_gpt_scores_as_the_harness_scores_it(
    made_runs: dict[str, Made], tasks: Path, tmp_path: Path
) -> None:
    trained = made_runs["gpt"].load()
    target = tmp_path / "exported"
    export_model(trained, trained.run.model, plan_export(trained.run.model, "llama"), target)
    theirs = HFLM(pretrained=str(target), device="cpu", dtype="float32", batch_size=2)
    pairs = [pair for pair in PAIRS if pair[0]]
    expected = theirs.loglikelihood(requests("loglikelihood", pairs))
    model = TandemLM(path=str(target))
    found = model.loglikelihood(requests("loglikelihood", pairs))
    assert [s for s, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-4)
    assert [g for _, g in found] == [g for _, g in expected]
    texts = [(" ".join(TEXTS),), ("A new moon",)]
    assert model.loglikelihood_rolling(
        requests("loglikelihood_rolling", texts)
    ) == pytest.approx(
        theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts)), abs=1e-3
    )  # fmt: skip
    prompts = [("The old", {"until": ["."], "max_gen_toks": 8, "do_sample": False})]
    assert model.generate_until(requests("generate_until", prompts)) == theirs.generate_until(
        requests("generate_until", prompts)
    )
    answer = simple_evaluate(
        model=theirs, tasks=["tandem_rivers"], bootstrap_iters=0, log_samples=False,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )  # fmt: skip
    own = evaluate_tasks(trained, ["tandem_rivers"], tasks)["tandem_rivers"]
    for metric in ("acc,none", "acc_norm,none"):
        assert own[metric] == pytest.approx(answer["results"]["tandem_rivers"][metric])


def test_an_unknown_task_is_refused_by_name(tasks: Path) -> None:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    check_tasks(manager, ["tandem_rivers"])
    with pytest.raises(ConfigError, match=r"knows no task tandem_lakes; list them"):
        check_tasks(manager, ["tandem_rivers", "tandem_lakes"])


def test_the_adapter_is_found_by_its_name() -> None:
    from lm_eval.api.registry import get_model

    assert get_model("tandem") is TandemLM
    with pytest.raises(ConfigError, match="path=DIR"):
        TandemLM()
    assert torch.is_inference_mode_enabled() is False
