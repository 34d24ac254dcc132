"""Blocks that compute again, or compiled, against the same blocks as they are.

Shapes: `B` batch, `T` time.
"""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch._dynamo.utils import counters

from pipeline.config.model import ModelConfig
from pipeline.config.schema import DocumentsConfig, TrainConfig
from pipeline.models import build_model
from pipeline.models.documents import DocumentRule
from pipeline.models.execution import set_execution

VOCAB, TOKENS = 50, 12
SIZE = {"width": 32, "depth": 3, "heads": 4, "max_positions": 16}
APART = DocumentRule(
    end_of_document_id=7,
    switches=DocumentsConfig(reset_positions=True, mask_attention=True, reset_state=True),
)
ARMS: list[dict[str, Any]] = [
    {"family": "gpt"},
    {"family": "gpt", "dropout": 0.3, "kv_heads": 2, "qk_norm": True, "biases": True},
    {"family": "gpt", "positions": "alibi", "window_tokens": 4, "norm": "layernorm"},
    {"family": "lstm_attention"},
    {"family": "lstm_attention", "dropout": 0.3, "window_tokens": 4},
]
every_arm = pytest.mark.parametrize("arm", ARMS, ids=lambda arm: ",".join(map(str, arm.values())))


def tokens_of(num_samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(VOCAB, (num_samples, TOKENS + 1), generator=generator)


def losses_and_gradients(
    arm: dict[str, Any], rule: DocumentRule | None = None, **switches: bool
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Give losses `[B, T]`, gradients by parameter, and the bytes that wait for the backward."""
    config: ModelConfig = TypeAdapter(ModelConfig).validate_python({**SIZE, **arm})
    model, tokens = build_model(config, VOCAB, seed=0, documents=rule), tokens_of(4)
    set_execution(model, TrainConfig.model_validate(switches))
    torch.manual_seed(0)
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses_BT = model(tokens[:, :-1], tokens[:, 1:])
    losses_BT.mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses_BT.detach(), gradients, sum(saved.values())


@every_arm
@pytest.mark.parametrize("rule", [None, APART], ids=["whole", "documents"])
def test_activations_computed_again_change_no_bit_and_keep_little(
    arm: dict[str, Any], rule: DocumentRule | None
) -> None:
    losses_BT, gradients, kept_bytes = losses_and_gradients(arm, rule)
    again_BT, gradients_again, kept_bytes_again = losses_and_gradients(
        arm, rule, activation_checkpointing=True
    )
    assert torch.equal(losses_BT, again_BT)
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name
    assert kept_bytes_again < 0.6 * kept_bytes


@pytest.mark.slow
@pytest.mark.needs_program("g++")
@pytest.mark.parametrize(("arm", "again"), [(ARMS[0], False), (ARMS[3], True)])
def test_compiled_blocks_give_the_same_losses_and_gradients(
    arm: dict[str, Any], again: bool
) -> None:
    counters.clear()
    torch.compiler.reset()
    losses_BT, gradients, _ = losses_and_gradients(arm)
    compiled_BT, gradients_compiled, _ = losses_and_gradients(
        arm, compile=True, activation_checkpointing=again
    )
    # All blocks share one graph, and nothing breaks it.
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch.testing.assert_close(compiled_BT, losses_BT, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients_compiled, gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.needs_program("g++")
def test_compiled_dropout_drops_the_same_when_computed_again() -> None:
    torch.compiler.reset()
    arm = {"family": "gpt", "dropout": 0.5}
    first = losses_and_gradients(arm, compile=True)
    second = losses_and_gradients(arm, compile=True, activation_checkpointing=True)
    torch.testing.assert_close(first[0], second[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first[1], second[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "arm", [*ARMS, {"family": "lstm_attention", "feed_forward": False}], ids=str
)
def test_a_config_tells_whether_anything_is_compiled(arm: dict[str, Any]) -> None:
    config: ModelConfig = TypeAdapter(ModelConfig).validate_python({**SIZE, **arm})
    blocks = build_model(config, VOCAB, seed=0).compilable_blocks()
    assert config.is_compilable == bool(blocks)


@every_arm
def test_parameters_keep_their_names(arm: dict[str, Any]) -> None:
    config: ModelConfig = TypeAdapter(ModelConfig).validate_python({**SIZE, **arm})
    model = build_model(config, VOCAB, seed=0)
    names = [name for name, _ in model.named_parameters()]
    set_execution(model, TrainConfig(compile=True, activation_checkpointing=True))
    assert [name for name, _ in model.named_parameters()] == names
    assert model.checkpointable_blocks()
    assert model.compilable_blocks()
