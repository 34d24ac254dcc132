"""What a model keeps of the tokens so far, so that the next one costs no recomputation."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Cache:
    """State of a batch of sequences in generation; it grows in place.

    A family decides what the tensors of a layer are: keys and values, or recurrent states.
    """

    num_tokens: int = 0
    """Tokens of each sequence so far."""
    layers: list[tuple[Tensor, ...]] = field(default_factory=list)
    """State of each layer, the batch in the first dimension."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the state of all sequences."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)
