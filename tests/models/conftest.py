"""Second implementations that the models are compared with."""

import pytest
import torch
from torch import Tensor, nn


class UnrolledLstm(nn.Module):
    """The equations of one LSTM layer as a loop over time, in plain products.

    Source: Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000.
    """

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x_BTD: Tensor, segments: None = None) -> Tensor:
        lstm = self.lstm
        # Asks for a gradient so that backward runs the recurrent products of step 0 as well.
        hidden_BC = x_BTD.new_zeros(x_BTD.shape[0], lstm.hidden_size, requires_grad=True)
        cell_BC = torch.zeros_like(hidden_BC)
        states = []
        for x_BD in x_BTD.unbind(1):
            gates = x_BD @ lstm.weight_ih_l0.T + hidden_BC @ lstm.weight_hh_l0.T
            input_BC, forget_BC, new_BC, output_BC = (
                gates + lstm.bias_ih_l0 + lstm.bias_hh_l0
            ).chunk(4, dim=1)
            cell_BC = forget_BC.sigmoid() * cell_BC + input_BC.sigmoid() * new_BC.tanh()
            hidden_BC = output_BC.sigmoid() * cell_BC.tanh()
            states.append(hidden_BC)
        return torch.stack(states, dim=1)


@pytest.fixture(scope="session")
def unrolled_lstm() -> type[UnrolledLstm]:
    return UnrolledLstm
