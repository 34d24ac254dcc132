"""From a run to the length of the chain of products that have to follow each other."""

from pipeline.config.schema import RunConfig

NUM_PASSES = 2
"""Backward goes the way of forward back: each product has one behind it that hands the gradient of
its input on. That of its weight ends there and lengthens no chain."""


def dependent_operations(run: RunConfig) -> int:
    """Count the longest chain of dependent matrix products in one micro-batch's two passes.

    It is what the model demands on any device: a recurrence may run as a wavefront over layers and
    tokens. A device that ends a layer before the next takes the `times` of the sequential products
    instead. Recomputed blocks wait for nothing in the backward pass, so they lengthen no chain.

    Args:
        run: Model and sequence length.
    """
    return NUM_PASSES * run.model.dependent_products(run.train.sequence_tokens)
