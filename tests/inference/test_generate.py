from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from pipeline.config.gpt import GptConfig
from pipeline.config.model import ModelConfig
from pipeline.config.schema import DocumentsConfig
from pipeline.errors import ConfigError
from pipeline.inference.generate import (
    DEFAULT_MAX_TOKENS,
    GenerationConfig,
    continue_texts,
    generate,
    plan_room,
)
from pipeline.inference.sampling import SamplingConfig, next_token
from pipeline.inference.text import UNKNOWN
from pipeline.models import build_model
from pipeline.models.base import LanguageModel
from pipeline.models.documents import DocumentRule
from tests.inference.cases import FAMILIES, spread_logits
from tests.inference.conftest import Made

GREEDY = SamplingConfig(temperature=0)


def collect(model: LanguageModel, prompts: list[list[int]], **fields: Any) -> list[list[int]]:
    """The new tokens of each prompt; no id ends a document."""
    end_id = fields.pop("end_id", 10**6)
    vocab_size = fields.pop("vocab_size", 10**6)
    new: list[list[int]] = [[] for _ in prompts]
    config = GenerationConfig.model_validate({"max_tokens": 9} | fields)
    for token in generate(model, prompts, config, vocab_size=vocab_size, end_id=end_id):
        new[token.prompt].append(token.token_id)
    return new


def greedy_by_recomputation(model: LanguageModel, prompt: list[int], num_new: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(num_new):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_tokens_are_those_of_recomputing_the_whole_text(made: Made) -> None:
    prompts = [[5, 9, 1], [7], [3, 2, 8], [4, 4, 4, 4, 9]]
    found = collect(made.model, prompts, sampling=GREEDY)
    assert found == [greedy_by_recomputation(made.model, prompt, 9) for prompt in prompts]


def test_a_prompt_is_continued_the_same_way_alone_and_among_others(made: Made) -> None:
    prompts = [[5, 9, 1], [7, 3, 3], [6]]
    assert collect(made.model, prompts)[0] == collect(made.model, prompts[:1])[0]


def test_a_seed_repeats_its_draws_and_another_draws_otherwise(made: Made) -> None:
    prompts = [[5, 9, 1], [5, 9, 1]]
    first = collect(made.model, prompts, seed=3)
    before = torch.get_rng_state()
    assert collect(made.model, prompts, seed=3) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert collect(made.model, prompts, seed=4) != first
    assert first[0] != first[1], "equal prompts have draws of their own"


def test_draws_come_from_the_distribution_of_the_model(made: Made) -> None:
    """The first token by hand, with the generator that the prompt is said to have."""
    from pipeline.inference.generate import _seed_of

    with torch.no_grad():
        logits_V = made.model(torch.tensor([[5, 9, 1]]))[0, -1]
    sampling = SamplingConfig(temperature=0.8, top_k=20, top_p=0.9)
    for seed in range(5):
        generator = torch.Generator().manual_seed(_seed_of(seed, 0))
        expected = next_token(logits_V, sampling, generator)
        assert collect(made.model, [[5, 9, 1]], sampling=sampling, seed=seed)[0][0] == expected


def test_an_end_of_document_stops_one_prompt_and_not_the_others(made: Made) -> None:
    prompts = [[5, 9, 1], [7, 3, 3]]
    whole = collect(made.model, prompts, sampling=GREEDY)
    end_id = whole[0][2]
    cut = collect(made.model, prompts, sampling=GREEDY, end_id=end_id)
    for own, full in zip(cut, whole, strict=True):
        stop = full.index(end_id) + 1 if end_id in full else len(full)
        assert own == full[:stop]


def test_rows_beyond_the_tokenizer_are_never_drawn(made: Made) -> None:
    found = collect(made.model, [[5, 9, 1]], vocab_size=7, max_tokens=40)
    assert max(found[0]) < 7


def test_an_empty_prompt_begins_behind_an_end_of_document(made: Made) -> None:
    assert (
        collect(made.model, [[]], sampling=GREEDY, end_id=0)
        == collect(made.model, [[0]], sampling=GREEDY, end_id=0)
    )  # fmt: skip


@pytest.mark.parametrize("family", list(FAMILIES))
def test_documents_kept_apart_begin_without_the_end_before_them(family: str) -> None:
    """Beside the training pass, over an end of document and what follows it."""
    switches = DocumentsConfig(
        mask_attention=True, reset_positions=family == "gpt", reset_state=family != "gpt"
    )
    rule = DocumentRule(end_of_document_id=0, switches=switches)
    config: ModelConfig = TypeAdapter(ModelConfig).validate_python(
        FAMILIES[family] | {"tied_head": False, "init_std": 0.3}
    )
    model = build_model(config, 50, seed=3, documents=rule).eval()
    spread_logits(model)
    with torch.no_grad():
        model.head_VD[0] = 0.0  # so that another token is likelier than the end
    found = collect(model, [[], [7], [7, 9]], sampling=GREEDY, end_id=0)
    expected = [greedy_by_recomputation(model, prompt, 9) for prompt in ([0], [7], [7, 9])]
    assert all(0 not in tokens for tokens in expected)
    assert found == expected
    model.documents = None
    assert found[0] != collect(model, [[]], sampling=GREEDY, end_id=0)[0]


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "message"),
    [
        (64, None, "no room in model.max_positions=64; legal: 1 to 63"),
        (70, 1, "prompt 0 has 70 tokens"),
        (60, 5, r"max_tokens=5 more go beyond model.max_positions=64; legal: .* 1 to 4"),
    ],
)
def test_a_text_beyond_the_positions_is_refused_before_it_begins(
    made: Made, num_prompt: int, max_tokens: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        collect(made.model, [[1] * num_prompt], max_tokens=max_tokens)


def test_a_text_may_fill_the_positions(made: Made) -> None:
    assert len(collect(made.model, [[1] * 60], max_tokens=4)[0]) == 4
    assert plan_room(60, None, 64, 0) == 4
    assert plan_room(60, None, 4096, 0) == DEFAULT_MAX_TOKENS


def test_a_model_that_sees_what_follows_is_refused() -> None:
    config = GptConfig(width=8, depth=1, heads=2, causal=False)
    with pytest.raises(ConfigError, match=r"model\.causal=false"):
        collect(build_model(config, 11, seed=0), [[1]])


def test_pieces_of_text_add_up_to_the_text_of_the_tokens(made: Made) -> None:
    trained = made.load()
    prompts = ["The old", "", "日本"]
    shown = [""] * len(prompts)
    states = {}
    for seed in range(3):
        config = GenerationConfig(max_tokens=40, seed=seed)
        shown = [""] * len(prompts)
        for number, piece, state in continue_texts(trained, prompts, config):
            shown[number] += piece
            states[number] = state
        for number, state in states.items():
            decoded = trained.codec.decode(state.token_ids)
            # A character that is not complete at the end is not shown.
            assert decoded.rstrip(UNKNOWN) == shown[number].rstrip(UNKNOWN)
            assert state.text == shown[number]
            assert state.ended_document == (
                state.token_ids[-1] == trained.codec.facts.end_of_document_id
            )
            assert len(state.token_ids) == 40 or state.ended_document
    assert any(shown)
