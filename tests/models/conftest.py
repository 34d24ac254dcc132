"""Second implementations that the models are compared with."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.cells import Cell


def lstm_step(cell: Cell, x_BD: Tensor, state: list[Tensor]) -> list[Tensor]:
    """Source: Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000."""
    hidden_BC, cell_BC = state
    gates = x_BD @ cell.weight_ih_l0.T + hidden_BC @ cell.weight_hh_l0.T
    input_BC, forget_BC, new_BC, output_BC = (gates + cell.bias_ih_l0 + cell.bias_hh_l0).chunk(4, 1)
    cell_BC = forget_BC.sigmoid() * cell_BC + input_BC.sigmoid() * new_BC.tanh()
    return [output_BC.sigmoid() * cell_BC.tanh(), cell_BC]


def gru_step(cell: Cell, x_BD: Tensor, state: list[Tensor]) -> list[Tensor]:
    """Source: Cho et al. 2014; the reset gate acts after the recurrent product, as in cuDNN."""
    old_BC = state[0]
    from_input = (x_BD @ cell.weight_ih_l0.T + cell.bias_ih_l0).chunk(3, 1)
    from_state = (old_BC @ cell.weight_hh_l0.T + cell.bias_hh_l0).chunk(3, 1)
    reset_BC, keep_BC = (
        (a + b).sigmoid() for a, b in zip(from_input[:2], from_state[:2], strict=True)
    )
    new_BC = (from_input[2] + reset_BC * from_state[2]).tanh()
    return [keep_BC * old_BC + (1 - keep_BC) * new_BC]


def elman_step(cell: Cell, x_BD: Tensor, state: list[Tensor]) -> list[Tensor]:
    """Source: Elman 1990."""
    gates = x_BD @ cell.weight_ih_l0.T + state[0] @ cell.weight_hh_l0.T
    return [(gates + cell.bias_ih_l0 + cell.bias_hh_l0).tanh()]


def min_lstm_step(cell: Cell, x_BD: Tensor, state: list[Tensor]) -> list[Tensor]:
    """Source: Feng et al. 2024, section 3.2.3, with g of appendix B.2 on the new value."""
    admit, keep, new = (x_BD @ cell.weight_ih_l0.T + cell.bias_ih_l0).chunk(3, 1)
    admit_BC, keep_BC = admit.sigmoid(), keep.sigmoid()
    new_BC = torch.where(new >= 0, F.relu(new) + 0.5, new.sigmoid())
    return [(keep_BC * state[0] + admit_BC * new_BC) / (keep_BC + admit_BC)]


STEPS = {"lstm": lstm_step, "gru": gru_step, "elman": elman_step, "min_lstm": min_lstm_step}


class UnrolledCell(nn.Module):
    """The equations of one layer as a loop over time, in plain products."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell
        self.start = cell.start

    def forward(
        self, x_BTD: Tensor, segments: None = None, state: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        current = list(self.cell.start(x_BTD) if state is None else state)
        if not current[0].requires_grad:
            # Asks for a gradient so that backward runs the recurrent products of step 0 as well.
            current = [part_BC.clone().requires_grad_() for part_BC in current]
        states = []
        for x_BD in x_BTD.unbind(1):
            current = STEPS[self.cell.kind](self.cell, x_BD, current)
            states.append(current[0])
        return torch.stack(states, dim=1), tuple(current)


@pytest.fixture(scope="session")
def unrolled_cell() -> type[UnrolledCell]:
    return UnrolledCell
