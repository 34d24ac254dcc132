"""From token ids to what may not pass from one document of a sample to the next.

A document is the tokens up to and with its end-of-document id. What follows the last such id is a
document too, and so is what stands before the first, though it began in another sample.

Shapes: `B` batch, `T` time, `N` all B x T tokens, `S` documents of a batch, `P` packed places.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config.schema import DocumentsConfig


@dataclass(frozen=True, kw_only=True)
class DocumentRule:
    """Where documents end, and what of theirs stays within."""

    end_of_document_id: int
    """The id that closes a document and belongs to it."""
    switches: DocumentsConfig
    """What stays within a document."""

    def find(self, inputs_BT: Tensor) -> "Borders":
        """Find the documents of a batch, if any switch needs them."""
        if self.switches == DocumentsConfig():
            return Borders()
        ends_BT = (inputs_BT == self.end_of_document_id).long()
        return Borders(documents_BT=ends_BT.cumsum(dim=1) - ends_BT, switches=self.switches)


@dataclass(frozen=True, kw_only=True)
class Segments:
    """The documents of a batch as a packed sequence: longest first, one position after the other.

    Every document is a sequence of its own in it, so a recurrence starts each at zero, exactly and
    without padding. One sequence more stands before them, a token longer than the longest, whose
    states nobody reads: where all sequences are equally long, torch takes another kernel, whose
    gradients come in another order, and ZeRO would add up different parameters of two ranks.
    """

    tokens_P: Tensor
    """Which of the B x T tokens stands at each place of the packed order."""
    places_N: Tensor
    """The place of each token."""
    batch_sizes: Tensor
    """Sequences that are longer than each position, on the CPU, as `PackedSequence` needs them."""


@dataclass(frozen=True, kw_only=True)
class Borders:
    """The documents of a batch, for a backbone to ask what its parts have to keep apart."""

    documents_BT: Tensor | None = None
    """Number of each token's document within its sample, from 0; None: nothing is kept apart."""
    switches: DocumentsConfig = DocumentsConfig()

    def positions(self) -> Tensor | None:
        """Give positions `[B, T]` that start at 0 in every document; None: they run on."""
        if self.documents_BT is None or not self.switches.reset_positions:
            return None
        return positions_in(self.documents_BT)

    def seen(self, window_tokens: int | None) -> Tensor | None:
        """Give what each query (row) sees of its own document; None: all up to itself.

        Args:
            window_tokens: Most recent positions seen, the own one included; None sees all.

        Returns:
            bool `[B, 1, T, T]`, causal.
        """
        together_B1TT = self.together()
        if together_B1TT is None:
            return None
        seen_B1TT = together_B1TT.tril()
        return seen_B1TT if window_tokens is None else seen_B1TT.triu(1 - window_tokens)

    def together(self) -> Tensor | None:
        """Give bool `[B, 1, T, T]`, true within a document; None: attention crosses borders."""
        if self.documents_BT is None or not self.switches.mask_attention:
            return None
        return (self.documents_BT.unsqueeze(2) == self.documents_BT.unsqueeze(1)).unsqueeze(1)

    def segments(self) -> Segments | None:
        """Give the documents as separate sequences; None: the state runs on."""
        if self.documents_BT is None or not self.switches.reset_state:
            return None
        return cut(self.documents_BT)


def positions_in(documents_BT: Tensor) -> Tensor:
    """Give the position of each token within its document, from 0."""
    times_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    is_first_BT = documents_BT.diff(dim=1, prepend=documents_BT[:, :1] - 1) != 0
    return times_T - torch.where(is_first_BT, times_T, 0).cummax(dim=1).values


def cut(documents_BT: Tensor) -> Segments:
    """Cut a batch into documents, ordered as a packed sequence.

    The sizes are needed on the CPU anyway, so all is computed there, after one copy.
    """
    times_N = positions_in(documents_BT.cpu()).flatten()
    segments_N = (times_N == 0).cumsum(dim=0) - 1
    lengths_S = segments_N.bincount()
    ranks_S = lengths_S.argsort(descending=True, stable=True).argsort() + 1
    batch_sizes = F.pad(times_N.bincount(), (0, 1)) + 1
    starts = batch_sizes.cumsum(dim=0) - batch_sizes
    places_N = starts[times_N] + ranks_S[segments_N]
    # The sequence before them repeats token 0, which is as good as any.
    tokens_P = torch.zeros(int(batch_sizes.sum()), dtype=torch.long)
    tokens_P[places_N] = torch.arange(len(places_N))
    device = documents_BT.device
    return Segments(
        tokens_P=tokens_P.to(device),
        places_N=places_N.to(device),
        batch_sizes=batch_sizes,
    )
