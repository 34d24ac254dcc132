"""Products by shape against those that the built model runs.

Attention runs as plain products, and recurrent cells as a loop over time, whose inputs are one
product as in the kernels. The gradient of a recurrent matrix, which kernels sum up in one product,
autograd takes step by step; the closed form is cut up likewise before they are compared.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.config.schema import RunConfig
from pipeline.estimate.products import MatrixProduct, matrix_products
from pipeline.models import build_model
from pipeline.models.cells import MinLstm
from pipeline.models.execution import set_execution
from tests.estimate.counting import ProductLog, Shape

SAMPLES, TOKENS, VOCAB = 3, 7, 40
GPT: dict[str, Any] = {"family": "gpt", "width": 16, "depth": 2, "heads": 2}
LSTM: dict[str, Any] = {**GPT, "family": "lstm_attention"}
BARE: dict[str, Any] = {"feed_forward": False, "attention": "none"}
MODELS: list[dict[str, Any]] = [
    GPT,
    {**GPT, "kv_heads": 1, "biases": True, "activation": "gelu", "tied_head": False},
    {**GPT, "window_tokens": 3, "dropout": 0.1},
    LSTM,
    {**LSTM, "hidden_width": 24, "depth": 3, "activation": "gelu"},
    {**LSTM, "cell": "gru", "attention": "dot"},
    {**LSTM, "cell": "elman", "attention": "additive", "window_tokens": 3},
    {**LSTM, "cell": "min_lstm", "attention_after": "second_last"},
    {**LSTM, **BARE},
    {**LSTM, **BARE, "hidden_width": 24, "backbone": "vanilla"},
]


class LoopedCell(nn.Module):
    """The products of a recurrent layer, as its kernel runs them: its inputs all at once."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell = cell

    def forward(
        self, x_BTD: Tensor, segments: None = None, state: None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        gates = F.linear(x_BTD, self.cell.weight_ih_l0)
        # Asks for a gradient, so that backward runs the recurrent product of the first step too.
        state_BC = self.cell.start(x_BTD)[0].clone().requires_grad_()
        states = []
        for gates_BG in gates.unbind(1):
            mixed_BG = gates_BG + F.linear(state_BC, self.cell.weight_hh_l0)
            state_BC = mixed_BG.tanh()[:, : self.cell.hidden_width]
            states.append(state_BC)
        return torch.stack(states, dim=1), (state_BC,)


def run_of(model: dict[str, Any], again: bool = False, **train: int) -> RunConfig:
    fields = {
        "sequence_tokens": TOKENS, "micro_batch_samples": SAMPLES,
        "global_batch_tokens": SAMPLES * TOKENS, "total_tokens": SAMPLES * TOKENS,
        "activation_checkpointing": again,
    }  # fmt: skip
    return RunConfig.model_validate({"model": model, "train": fields | train})


def count_products(run: RunConfig) -> Counter[Shape]:
    model = build_model(run.model, VOCAB, seed=0)
    for layer in getattr(model, "layers", ()):
        if not isinstance(layer.cell, MinLstm):
            layer.cell = LoopedCell(layer.cell)
    set_execution(model, run.train)
    tokens = torch.randint(VOCAB, (SAMPLES, TOKENS + 1))
    with sdpa_kernel(SDPBackend.MATH), ProductLog() as log:
        model(tokens[:, :-1], tokens[:, 1:].contiguous()).sum().backward()
    return log.shapes


def by_step(product: MatrixProduct) -> MatrixProduct:
    if product.name != "layers.cell.recurrent.weight" or product.sequential:
        return product
    return MatrixProduct(
        name=product.name, pass_=product.pass_, m=product.m, n=product.n, k=SAMPLES,
        times=product.times * TOKENS,
    )  # fmt: skip


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: ",".join(map(str, model.values())))
def test_products_equal_by_shape_those_that_run(model: dict[str, Any], again: bool) -> None:
    run = run_of(model, again)
    expected: Counter[Shape] = Counter()
    for product in map(by_step, matrix_products(run, VOCAB, SAMPLES)):
        expected[product.batch, product.m, product.n, product.k] += product.times
    assert expected == count_products(run)


FED = [{**LSTM, "input_feeding": True, "window_tokens": 2}, {
    **LSTM, "cell": "gru", "attention": "additive", "input_feeding": True,
}]  # fmt: skip


@pytest.mark.parametrize("model", [*MODELS, *FED], ids=lambda m: ",".join(map(str, m.values())))
def test_needed_flops_are_those_of_the_models_closed_form(model: dict[str, Any]) -> None:
    run = run_of(model)
    rows = matrix_products(run, VOCAB, SAMPLES)
    needed = sum(row.needed_flops for row in rows if row.pass_ != "recompute")
    per_token = run.model.flops_per_token(VOCAB, TOKENS)
    assert needed == pytest.approx(per_token * SAMPLES * TOKENS, rel=1e-12)


def test_steps_of_a_recurrence_are_sequential_and_chunks_of_the_head_are_cut() -> None:
    run = run_of({**LSTM, "max_positions": 4096}, sequence_tokens=4096, global_batch_tokens=12288,
                 total_tokens=12288)  # fmt: skip
    rows = matrix_products(run, 50_000, SAMPLES)
    steps = {row.name: (row.m, row.times) for row in rows if row.sequential}
    assert steps == {
        "layers.cell.recurrent": (SAMPLES, 2 * 4096),
        "layers.cell.recurrent.input": (SAMPLES, 2 * 4096),
    }
    # 2^22 logits would be 83 tokens, so that a chunk has the smallest size, 256.
    assert [(row.m, row.times) for row in rows if row.name == "head"] == [(256, 48)]
