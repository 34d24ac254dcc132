"""The laid-out parameters against the built models: names, shapes, and order of gradients."""

from typing import Any

import pytest
import torch

from pipeline.config.gpt import GptConfig
from pipeline.config.lstm import LstmConfig
from pipeline.config.schema import DocumentsConfig
from pipeline.estimate.parameters import layout_of
from pipeline.models import build_model
from pipeline.models.base import LanguageModel
from pipeline.models.documents import DocumentRule
from tests.estimate.counting import label

VOCAB = 40
SIZE: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2}
MODELS = [
    GptConfig(**SIZE),
    GptConfig(**SIZE, qk_norm=True, kv_heads=1, activation="gelu"),
    GptConfig(
        **SIZE, norm="layernorm", positions="learned", biases=True, tied_head=False, qk_norm=True
    ),
    LstmConfig(**SIZE),
    LstmConfig(**SIZE, hidden_width=24, tied_head=False, norm="layernorm", activation="gelu"),
    LstmConfig(**SIZE, cell="gru", attention="dot", vocab_size=48),
    LstmConfig(**SIZE, cell="elman", attention="additive", backbone="vanilla", feed_forward=False),
    LstmConfig(**SIZE, cell="min_lstm", attention="none"),
    LstmConfig(**SIZE, attention="additive", attention_after="second_last"),
    LstmConfig(**SIZE, attention="dot", input_feeding=True),
]


@pytest.mark.parametrize("config", MODELS, ids=label)
def test_names_shapes_and_order_of_gradients_are_the_built_models(
    config: GptConfig | LstmConfig,
) -> None:
    model, layout = build_model(config, VOCAB, seed=0), layout_of(config, VOCAB)
    assert [(p.name, p.shape) for p in layout.parameters] == [
        (name, tuple(parameter.shape)) for name, parameter in model.named_parameters()
    ]
    assert [p.name for p in layout.gradients] == order_of_gradients(model)


def order_of_gradients(model: LanguageModel) -> list[str]:
    order: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    tokens = torch.randint(VOCAB, (3, 8))
    tokens[:, 4] = 0
    model(tokens[:, :-1], tokens[:, 1:]).sum().backward()
    return order


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_states_that_start_anew_in_documents_change_the_order(cell: str) -> None:
    config = LstmConfig.model_validate({**SIZE, "cell": cell})
    rule = DocumentRule(end_of_document_id=0, switches=DocumentsConfig(reset_state=True))
    order = order_of_gradients(build_model(config, VOCAB, 0, rule))
    assert [p.name for p in layout_of(config, VOCAB, is_packed=True).gradients] == order


def test_a_model_of_a_hundred_layers_has_the_parameters_of_its_closed_form() -> None:
    config = GptConfig(width=8192, depth=100, heads=64, kv_heads=8, tied_head=False)
    total = sum(p.num_elements for p in layout_of(config, 128_256).parameters)
    assert total == config.num_parameters(128_256).total
