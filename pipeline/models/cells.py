"""Recurrent cells: from a layer's inputs to its states, in one kernel call a layer.

The kernels are those of `nn.LSTM`, `nn.GRU` and `nn.RNN` (cuDNN, oneDNN), called with weights that
are ordinary parameters. `nn.LSTM` itself would lay them out anew in one buffer whenever the model
moves, behind DeepSpeed's back, and could not take a recurrent matrix with dropped entries.

Shapes: `B` batch, `T` time, `D` input, `C` state, `G` stacked gates, `S` documents, `P` packed.
"""

import warnings
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pipeline.config.lstm import LstmConfig
from pipeline.config.lstm_fields import NUM_GATES, NUM_STATES
from pipeline.errors import LaunchError
from pipeline.models.documents import Segments
from pipeline.models.scan import linear_scan

State = tuple[Tensor, ...]
"""What a layer carries from one token to the next, each `[B, C]`; the output comes first."""

FORGET_GATE = {"lstm": 1, "min_lstm": 1, "gru": 1}
"""Position of the gate that keeps the old state; in a GRU it is the update gate, which multiplies
the old state in PyTorch's equations."""
INPUT_GATE = {"lstm": 0, "min_lstm": 0}
"""Position of the gate that admits the new value, where it is one of its own."""

_KERNELS: dict[str, Any] = {"lstm": torch.lstm, "gru": torch.gru, "elman": torch.rnn_tanh}
_STEPS: dict[str, Any] = {
    "lstm": torch.lstm_cell,
    "gru": torch.gru_cell,
    "elman": torch.rnn_tanh_cell,
}


class Cell(nn.Module):
    """Parameters that all cells have, and how they start."""

    def __init__(self, config: LstmConfig, input_width: int) -> None:
        super().__init__()
        hidden = config.resolved_hidden_width
        self.kind = config.cell
        self.hidden_width = hidden
        self.forget_bias = config.forget_bias
        self.max_positions = config.max_positions
        self.weight_ih_l0 = nn.Parameter(torch.empty(NUM_GATES[self.kind] * hidden, input_width))
        self.bias_ih_l0 = nn.Parameter(torch.empty(NUM_GATES[self.kind] * hidden))

    def initialize(self, generator: Generator) -> None:
        """Draw the input matrices gate by gate; biases are 0 but for the forget gate's.

        Source: Glorot and Bengio 2010 (input weights), Jozefowicz et al. 2015, section 2.2 (forget
        bias), Tallec and Ollivier 2018, section 2.2 (chrono).
        """
        for input_CD in self.weight_ih_l0.chunk(NUM_GATES[self.kind]):
            nn.init.xavier_uniform_(input_CD, generator=generator)
        nn.init.zeros_(self.bias_ih_l0)
        if self.kind not in FORGET_GATE:
            return
        biases = self.bias_ih_l0.detach().chunk(NUM_GATES[self.kind])
        if self.forget_bias != "chrono":
            biases[FORGET_GATE[self.kind]].fill_(self.forget_bias)
            return
        spans_C = biases[FORGET_GATE[self.kind]]
        spans_C.uniform_(1.0, self.max_positions - 1.0, generator=generator).log_()
        if self.kind in INPUT_GATE:
            biases[INPUT_GATE[self.kind]].copy_(-spans_C)

    def start(self, like_BTD: Tensor) -> State:
        """Give the state before the first token: zeros."""
        zeros_BC = like_BTD.new_zeros(like_BTD.shape[0], self.hidden_width)
        return (zeros_BC,) * NUM_STATES[self.kind]


class Recurrence(Cell):
    """An LSTM, GRU or Elman layer.

    Source: Hochreiter and Schmidhuber 1997, Cho et al. 2014, Elman 1990; Merity et al. 2018,
    section 2 (weight drop).
    """

    def __init__(self, config: LstmConfig, input_width: int) -> None:
        super().__init__(config, input_width)
        gates = NUM_GATES[self.kind] * self.hidden_width
        self.weight_drop = config.weight_drop
        self.weight_hh_l0 = nn.Parameter(torch.empty(gates, self.hidden_width))
        self.bias_hh_l0 = nn.Parameter(torch.empty(gates))
        # ZeRO moves weights into flat buffers of its own, so they never lie in cuDNN's layout and
        # are copied together in each call: 8 h^2 values a layer, beside the T h times as many
        # products that follow. `flatten_parameters` would cut them off from ZeRO's buffers.
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous")

    def initialize(self, generator: Generator) -> None:
        """Draw every parameter; the recurrent matrix of each gate is orthogonal.

        Source: Saxe et al. 2014.
        """
        super().initialize(generator)
        for recurrent_CC in self.weight_hh_l0.chunk(NUM_GATES[self.kind]):
            nn.init.orthogonal_(recurrent_CC, generator=generator)
        nn.init.zeros_(self.bias_hh_l0)

    def forward(
        self, x_BTD: Tensor, segments: Segments | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Give the states `[B, T, C]` and what the next token starts from.

        Args:
            x_BTD: Input.
            segments: Documents, each of which starts at zero; None: a sample is one.
            state: Where the samples start; None starts at zero. Not together with segments.

        Raises:
            LaunchError: The input is on a CUDA device that cannot run it through cuDNN.
        """
        require_cudnn(x_BTD)
        if segments is not None:
            return self._packed(x_BTD, segments), ()
        state = self.start(x_BTD) if state is None else state
        if x_BTD.shape[1] == 1:
            return self._step(x_BTD, state)
        whole = [part_BC.unsqueeze(0) for part_BC in state]
        state_BTC, *last = _KERNELS[self.kind](
            x_BTD, whole if self.kind == "lstm" else whole[0], self._weights(),
            True, 1, 0.0, torch.is_grad_enabled(), False, True,
        )  # fmt: skip
        return state_BTC, tuple(part_1BC[0] for part_1BC in last)

    def _step(self, x_B1D: Tensor, state: State) -> tuple[Tensor, State]:
        """Take one token: the cell's own kernel is several times faster than that of a layer."""
        new = _STEPS[self.kind](
            x_B1D[:, 0], state if self.kind == "lstm" else state[0], *self._weights()
        )
        new = new if self.kind == "lstm" else (new,)
        return new[0].unsqueeze(1), new

    def _packed(self, x_BTD: Tensor, segments: Segments) -> Tensor:
        x_PD = x_BTD.flatten(0, 1).index_select(0, segments.tokens_P)
        start_1SC = x_BTD.new_zeros(1, int(segments.batch_sizes[0]), self.hidden_width)
        state_PC = _KERNELS[self.kind](
            x_PD, segments.batch_sizes,
            [start_1SC, start_1SC] if self.kind == "lstm" else start_1SC, self._weights(),
            True, 1, 0.0, torch.is_grad_enabled(), False,
        )[0]  # fmt: skip
        state_NC: Tensor = state_PC.index_select(0, segments.places_N)
        return state_NC.view(*x_BTD.shape[:2], -1)

    def _weights(self) -> list[Tensor]:
        """Give the kernel's weights; in training the recurrent matrix with entries dropped.

        One draw a call, so that all steps of a sequence lose the same connections.
        """
        recurrent_GC: Tensor = self.weight_hh_l0
        if self.weight_drop > 0.0:
            recurrent_GC = F.dropout(recurrent_GC, self.weight_drop, self.training)
        return [self.weight_ih_l0, recurrent_GC, self.bias_ih_l0, self.bias_hh_l0]


class MinLstm(Cell):
    """A cell whose gates see the input only, so that all steps are one scan.

    It separates the recurrence from the cell: no matrix stands between one state and the next.

    Source: Feng et al. 2024, section 3.2 and appendix B (normalised gates, positive values).
    """

    def forward(
        self, x_BTD: Tensor, segments: Segments | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Give the states `[B, T, C]` and what the next token starts from; see `Recurrence`.

        The scan runs in float32 whatever the type of the input.
        """
        gates_BTG = F.linear(x_BTD, self.weight_ih_l0, self.bias_ih_l0).float()
        admit_BTC, keep_BTC, value_BTC = gates_BTG.chunk(3, dim=2)
        # log(i / f) of two sigmoids; the shares f / (f + i) and i / (f + i) then never divide.
        odds_BTC = F.softplus(-keep_BTC) - F.softplus(-admit_BTC)
        keep_BTC, value_BTC = (-odds_BTC).sigmoid(), odds_BTC.sigmoid() * positive(value_BTC)
        if segments is not None:
            is_first_BT = (segments.places_N < segments.batch_sizes[0]).view(x_BTD.shape[:2])
            keep_BTC = keep_BTC.masked_fill(is_first_BT.unsqueeze(2), 0.0)
        start_BC = None if state is None else state[0].float()
        state_BTC = linear_scan(keep_BTC, value_BTC, start_BC).to(x_BTD.dtype)
        return state_BTC, (state_BTC[:, -1],)


def positive(x: Tensor) -> Tensor:
    """Give x + 1/2 from 0 up and sigmoid(x) below. Source: Feng et al. 2024, appendix B.2."""
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


def build_cell(config: LstmConfig, input_width: int) -> Recurrence | MinLstm:
    """Build the cell of one layer.

    Args:
        config: Names the cell.
        input_width: Width of what it reads, the fed-back vector included.
    """
    kind = MinLstm if config.cell == "min_lstm" else Recurrence
    return kind(config, input_width)


def require_cudnn(x_BTD: Tensor) -> None:
    """Refuse to run a recurrence on a CUDA device without cuDNN, where it is many times slower.

    The check is the one by which torch itself chooses the kernel.

    Raises:
        LaunchError: torch would not choose cuDNN for this tensor.
    """
    if x_BTD.is_cuda and not torch.cudnn_is_acceptable(x_BTD):
        raise LaunchError(
            f"a recurrent layer on {x_BTD.device} in {x_BTD.dtype} cannot run on cuDNN "
            f"(torch.backends.cudnn.enabled={torch.backends.cudnn.enabled}); legal: float32, "
            f"bfloat16 or float16, with cuDNN enabled"
        )
