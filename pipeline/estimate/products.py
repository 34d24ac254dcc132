"""From a run to the matrix products of one micro-batch, by shape, forward and backward.

Symbols: `N` tokens of a micro-batch, `B` samples, `T` tokens of each, `d` width, `h` recurrent
width, `f` feed-forward width, `V` vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.config.schema import RunConfig

Pass = Literal["forward", "recompute", "backward"]
"""`recompute` is the forward pass of a block that activation checkpointing runs again."""


@dataclass(frozen=True, kw_only=True)
class MatrixProduct:
    """Equal products `[batch, m, k] x [batch, k, n]`, each one call of a library."""

    name: str
    """What computes it: the module, and for gradients `.input` or `.weight` behind it."""
    pass_: Pass
    batch: int
    """Independent products of one call; 1 for a plain matrix product."""
    m: int
    n: int
    k: int
    times: int
    """Calls in one micro-batch, over all layers."""
    sequential: bool
    """Whether each call needs the one before it in its layer, as the steps of a recurrence do; all
    other calls of a layer are there at once. `times` is layers x steps."""
    needed_fraction: float = 1.0
    """Share of the product that the mask leaves; a fused attention kernel skips the rest, plain
    products do not."""

    @property
    def flops(self) -> float:
        """FLOPs of all calls, masked entries included; two a multiply-add."""
        return 2.0 * self.batch * self.m * self.n * self.k * self.times

    @property
    def needed_flops(self) -> float:
        """FLOPs of all calls without what a mask removes."""
        return self.flops * self.needed_fraction


def matrix_products(
    run: RunConfig, vocab_size: int, micro_batch_samples: int
) -> list[MatrixProduct]:
    """List the products of one micro-batch, forward, backward and run again.

    Args:
        run: Model, sequence length and whether activations are checkpointed.
        vocab_size: Rows V of the embedding table.
        micro_batch_samples: Samples B.

    Returns:
        Products with equal shape and name merged. The sum of `needed_flops`, recomputation left
        out, is `flops_per_token` of the model's config times the tokens.
    """
    raise NotImplementedError
