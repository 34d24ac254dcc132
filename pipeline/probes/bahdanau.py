"""An encoder-decoder with attention as it was first published, and the same without.

A bidirectional GRU reads the source. At each step of the decoder a small network scores all its
states, and their mean by softmax weights is what the decoder, a GRU, reads beside the last letter.
Without attention that is the last state of both directions, the same at every step.

Shapes: `B` batch, `S` source, `T` target, `D` embedding, `H` state, `A` hidden values of a score,
`C` context (2 H), `V` vocabulary.
"""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F


class EncoderDecoder(nn.Module):
    """From a source to the logits of a target.

    Source: Bahdanau et al. 2015, section 3 and appendix A; without attention Cho et al. 2014,
    section 2. The output layer is linear where the paper has a maxout.
    """

    def __init__(self, vocab_size: int, width: int, *, attends: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.encoder = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.start = nn.Linear(width, width)
        self.decoder = nn.GRUCell(3 * width, width)
        self.out = nn.Linear(4 * width, vocab_size)
        self.attends = attends
        if attends:
            self.query = nn.Linear(width, width, bias=False)
            self.key = nn.Linear(2 * width, width, bias=False)
            self.score_A = nn.Parameter(torch.empty(width))

    def initialize(self, generator: Generator) -> None:
        """Draw every parameter: recurrent matrices orthogonal, others Xavier's, biases zero."""
        for name, parameter in self.named_parameters():
            if "weight_hh" in name:
                for gate_HH in parameter.detach().chunk(3):
                    nn.init.orthogonal_(gate_HH, generator=generator)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter, generator=generator)
            elif name == "score_A":
                bound = math.sqrt(6 / (len(parameter) + 1))
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
            else:
                nn.init.zeros_(parameter)

    def forward(self, source_BS: Tensor, target_BT: Tensor) -> Tensor:
        """Give the logits `[B, T, V]` after each token of a target that is given.

        Args:
            source_BS: Ids.
            target_BT: Ids, the first of which begins the target.
        """
        state_BH, source = self._read(source_BS)
        logits = []
        for token_B in target_BT.unbind(1):
            state_BH, logits_BV = self._step(token_B, state_BH, source)
            logits.append(logits_BV)
        return torch.stack(logits, dim=1)

    @torch.no_grad()
    def decode(self, source_BS: Tensor, begin: int, num_tokens: int) -> Tensor:
        """Give the target `[B, num_tokens]`, each token the likeliest after the last."""
        state_BH, source = self._read(source_BS)
        token_B = torch.full_like(source_BS[:, 0], begin)
        tokens = []
        for _ in range(num_tokens):
            state_BH, logits_BV = self._step(token_B, state_BH, source)
            token_B = logits_BV.argmax(dim=1)
            tokens.append(token_B)
        return torch.stack(tokens, dim=1)

    def _read(self, source_BS: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Give the decoder's first state, and states and keys of the source, or its summary."""
        states_BSC, last_2BH = self.encoder(self.embedding(source_BS))
        state_BH = self.start(last_2BH[1]).tanh()
        if self.attends:
            return state_BH, (states_BSC, self.key(states_BSC))
        summary_BC = torch.cat((last_2BH[0], last_2BH[1]), dim=1)
        return state_BH, (summary_BC, summary_BC)

    def _step(
        self, token_B: Tensor, state_BH: Tensor, source: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        context_BC = source[0]
        if self.attends:
            hidden_BSA = (self.query(state_BH).unsqueeze(1) + source[1]).tanh()
            weights_BS = F.linear(hidden_BSA, self.score_A.unsqueeze(0)).squeeze(2).softmax(dim=1)
            context_BC = torch.einsum("bs,bsc->bc", weights_BS, source[0])
        read_BD = torch.cat((self.embedding(token_B), context_BC), dim=1)
        state_BH = self.decoder(read_BD, state_BH)
        return state_BH, self.out(torch.cat((state_BH, read_BD), dim=1))
