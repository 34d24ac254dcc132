"""Cells against their equations and torch's own modules, and the state in which they start.

Shapes: `B` batch, `T` time, `D` input, `C` state.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.lstm import LstmConfig
from pipeline.config.lstm_fields import NUM_GATES
from pipeline.models.cells import MinLstm, Recurrence, build_cell
from pipeline.models.documents import cut

CELLS = ["lstm", "gru", "elman", "min_lstm"]
every_cell = pytest.mark.parametrize("kind", CELLS)


def make(kind: str, **fields: Any) -> Recurrence | MinLstm:
    config = LstmConfig.model_validate({"width": 12, "hidden_width": 8, "cell": kind, **fields})
    cell = build_cell(config, input_width=10)
    generator = torch.Generator().manual_seed(0)
    cell.initialize(generator)
    for name, parameter in cell.named_parameters():
        if name.startswith("bias"):
            parameter.detach().add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return cell


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def slopes(cell: nn.Module, x_BTD: Tensor, output_BTC: Tensor) -> dict[str, Tensor]:
    """Give the gradients of a fixed random functional of the output."""
    x_BTD.grad = None
    cell.zero_grad()
    (output_BTC * random(*output_BTC.shape)).sum().backward()
    assert x_BTD.grad is not None
    return {"input": x_BTD.grad} | {
        name: parameter.grad.clone()
        for name, parameter in cell.named_parameters()
        if parameter.grad is not None
    }


@every_cell
@pytest.mark.parametrize("has_start", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 11])
def test_a_cell_equals_its_equations_in_values_and_gradients(
    kind: str, has_start: bool, num_tokens: int, unrolled_cell: type[nn.Module]
) -> None:
    cell, x_BTD = make(kind), random(3, num_tokens, 10).requires_grad_()
    start = tuple(random(3, 8).abs() for _ in cell.start(x_BTD)) if has_start else None
    (actual_BTC, last), (expected_BTC, expected_last) = (
        module(x_BTD, None, start) for module in (cell, unrolled_cell(cell))
    )
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(actual_BTC, expected_BTC, **close)
    torch.testing.assert_close(last, expected_last, **close)
    expected = slopes(cell, x_BTD, expected_BTC)
    torch.testing.assert_close(slopes(cell, x_BTD, actual_BTC), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "layer", "step"),
    [
        ("lstm", nn.LSTM, nn.LSTMCell),
        ("gru", nn.GRU, nn.GRUCell),
        ("elman", nn.RNN, nn.RNNCell),
    ],
)
def test_a_cell_equals_the_module_of_torch_and_a_loop_over_its_cell(
    kind: str, layer: type[nn.RNNBase], step: type[nn.Module]
) -> None:
    cell, x_BTD = make(kind), random(3, 7, 10)
    whole = layer(10, 8, batch_first=True)
    whole.load_state_dict(cell.state_dict())
    one = step(10, 8)
    one.load_state_dict({name.removesuffix("_l0"): v for name, v in cell.state_dict().items()})
    state: Any = None
    looped = []
    with torch.no_grad():
        for x_BD in x_BTD.unbind(1):
            state = one(x_BD, state)
            looped.append(state[0] if kind == "lstm" else state)
        actual_BTC = cell(x_BTD)[0]
        assert torch.equal(actual_BTC, whole(x_BTD)[0])
        torch.testing.assert_close(actual_BTC, torch.stack(looped, 1), rtol=1e-5, atol=1e-6)


@every_cell
def test_a_cell_cut_into_documents_equals_each_run_alone(kind: str) -> None:
    cell, x_BTD = make(kind), random(2, 9, 10).requires_grad_()
    documents_BT = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2], [0] * 9])
    actual_BTC = cell(x_BTD, cut(documents_BT))[0]
    pieces = [cell(x_BTD[:1, start:stop])[0] for start, stop in ((0, 3), (3, 4), (4, 9))]
    expected_BTC = torch.cat((torch.cat(pieces, dim=1), cell(x_BTD[1:])[0]))
    torch.testing.assert_close(actual_BTC, expected_BTC, rtol=1e-5, atol=1e-6)
    expected = slopes(cell, x_BTD, expected_BTC)
    torch.testing.assert_close(slopes(cell, x_BTD, actual_BTC), expected, rtol=1e-4, atol=1e-5)


def published_scan(cell: MinLstm, x_BTD: Tensor) -> Tensor:
    """Logarithms and one running sum. Source: Feng et al. 2024, appendix B, algorithm 8."""
    admit, keep, new = (x_BTD @ cell.weight_ih_l0.T + cell.bias_ih_l0).chunk(3, dim=2)
    odds = nn.functional.softplus(-keep) - nn.functional.softplus(-admit)
    log_keep, log_admit = -nn.functional.softplus(odds), -nn.functional.softplus(-odds)
    log_new = torch.where(new >= 0, (new.relu() + 0.5).log(), -nn.functional.softplus(-new))
    sums = log_keep.cumsum(dim=1)
    return (sums + (log_admit + log_new - sums).logcumsumexp(dim=1)).exp()


def test_min_lstm_equals_the_published_scan_of_logarithms() -> None:
    cell, x_BTD = make("min_lstm"), random(2, 100, 10)
    with torch.no_grad():
        expected_BTC = published_scan(cell.double(), x_BTD.double())
        actual_BTC = cell.float()(x_BTD)[0]
    torch.testing.assert_close(actual_BTC.double(), expected_BTC, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_min_lstm_keeps_its_digits_over_long_and_forgetful_samples(
    dtype: torch.dtype, tolerance: float, unrolled_cell: type[nn.Module]
) -> None:
    cell, x_BTD = make("min_lstm").to(dtype), random(1, 2048, 10).to(dtype)
    # Gates that forget by e^-20 a token: a running sum of logarithms would reach -40,000.
    cell.bias_ih_l0.detach()[8:16].sub_(20.0)
    with torch.no_grad():
        actual_BTC = cell(x_BTD)[0]
        expected_BTC = unrolled_cell(cell.double())(x_BTD.double())[0]
    assert actual_BTC.isfinite().all()
    torch.testing.assert_close(actual_BTC.double(), expected_BTC, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["lstm", "gru", "elman"])
def test_weight_drop_cuts_recurrent_connections_for_all_tokens_alike(kind: str) -> None:
    cell, whole, x_BTD = make(kind, weight_drop=0.5), make(kind), random(3, 9, 10)
    torch.manual_seed(4)
    dropped_GC = nn.functional.dropout(cell.weight_hh_l0.detach(), 0.5)
    assert 0.3 < (dropped_GC == 0).float().mean() < 0.7
    torch.manual_seed(4)
    actual_BTC = cell(x_BTD)[0]
    actual_BTC.sum().backward()
    whole.weight_hh_l0.detach().copy_(dropped_GC)
    torch.testing.assert_close(actual_BTC, whole(x_BTD)[0])
    assert torch.equal(cell.weight_hh_l0.grad == 0, dropped_GC == 0)
    assert torch.equal(cell.eval()(x_BTD)[0], make(kind)(x_BTD)[0])


@every_cell
def test_matrices_start_orthogonal_and_xavier_gate_by_gate(kind: str) -> None:
    config = LstmConfig.model_validate({"width": 6, "heads": 1, "cell": kind})
    cell = build_cell(config, input_width=10)
    cell.initialize(torch.Generator().manual_seed(0))
    limit = (6 / (10 + 6)) ** 0.5
    for input_CD in cell.weight_ih_l0.chunk(NUM_GATES[config.cell]):
        assert 0.8 * limit < input_CD.abs().max() <= limit
    if isinstance(cell, Recurrence):
        for recurrent_CC in cell.weight_hh_l0.chunk(NUM_GATES[config.cell]):
            torch.testing.assert_close(
                recurrent_CC @ recurrent_CC.T, torch.eye(6), rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("forget_bias", [0.0, 1.0, 2.5])
@pytest.mark.parametrize(("kind", "num_gates"), [("lstm", 4), ("gru", 3), ("min_lstm", 3)])
def test_the_gate_that_keeps_the_state_starts_with_the_stated_bias(
    kind: str, num_gates: int, forget_bias: float
) -> None:
    config = LstmConfig.model_validate(
        {"width": 6, "heads": 1, "cell": kind, "forget_bias": forget_bias}
    )
    cell = build_cell(config, input_width=6)
    cell.initialize(torch.Generator().manual_seed(0))
    bias = cell.bias_ih_l0.detach() + getattr(cell, "bias_hh_l0", torch.zeros(1)).detach()
    for gate, part_C in enumerate(bias.chunk(num_gates)):
        assert torch.equal(part_C, torch.full((6,), forget_bias if gate == 1 else 0.0))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_large_forget_bias_holds_the_state(kind: str) -> None:
    config = LstmConfig.model_validate({"width": 8, "cell": kind, "forget_bias": 20.0})
    cell = build_cell(config, input_width=6)
    cell.initialize(torch.Generator().manual_seed(0))
    start = tuple(torch.full((1, 8), 0.7) for _ in cell.start(torch.zeros(1, 1, 6)))
    with torch.no_grad():
        # Without them an input of zero proposes a new value of zero.
        cell.get_parameter("weight_hh_l0").zero_()
        last = cell(torch.zeros(1, 5, 6), None, start)[1][-1]
    torch.testing.assert_close(last, start[-1], rtol=0, atol=1e-6)


def test_chrono_draws_spans_up_to_the_longest_sample() -> None:
    config = LstmConfig(width=4000, forget_bias="chrono", max_positions=101)
    with torch.device("meta"):
        cell = build_cell(config, input_width=1)
    # Only the biases: orthogonal matrices of this width would take minutes.
    bias = nn.Parameter(torch.empty(16_000))
    cell.bias_ih_l0, cell.weight_ih_l0 = bias, nn.Parameter(torch.empty(16_000, 1))
    super(Recurrence, cell).initialize(torch.Generator().manual_seed(0))
    admit_C, keep_C, new_C, output_C = bias.detach().chunk(4)
    spans_C = keep_C.exp()
    assert 1.0 <= spans_C.min() < 2.0
    assert 99.0 < spans_C.max() <= 100.0
    # Uniform from 1 to 100: mean 50.5, whose standard error over 4,000 draws is 0.45.
    assert spans_C.mean().item() == pytest.approx(50.5, abs=4 * 99 / math.sqrt(12 * 4000))
    assert torch.equal(admit_C, -keep_C)
    assert new_C.abs().max() == output_C.abs().max() == 0.0


def test_the_drawn_weights_are_those_that_the_cell_computes_with() -> None:
    cell, x_BTD = make("lstm"), torch.ones(1, 4, 10)
    before_BTC = cell(x_BTD)[0]
    cell.bias_ih_l0.detach().add_(1.0)
    assert (before_BTC - cell(x_BTD)[0]).abs().min() > 0.01
