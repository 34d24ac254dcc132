"""From losses by seed and document to differences of families, by resampling both at once.

All seeds and families are scored on the same documents, so documents and seeds are crossed: each
draw takes seeds and documents with replacement, once each.
Source: Owen 2007, Ann. Appl. Stat. 1, 386.
Shapes: K seeds, D documents, S draws.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.study.effect import Effect, effect_of_draws

NUM_DRAWS = 10_000


def bootstrap_documents(
    own_D: Sequence[float] | np.ndarray,
    other_D: Sequence[float] | np.ndarray,
    tokens_D: Sequence[float] | np.ndarray,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> Effect:
    """Give the difference of one pair of models, own minus other, paired by document.

    The interval is that of documents alone: it says nothing about other seeds.

    Args:
        own_D: Mean loss of each document, nats per token.
        other_D: The same documents under the other model.
        tokens_D: Scored tokens of each document, its weight.
        num_draws: S.
        seed: Of the draws.
    """
    own, other = np.asarray(own_D), np.asarray(other_D)
    draws_SD = _draw(np.random.default_rng(seed), num_draws, len(own))
    means_S = _means(own[None] - other[None], np.asarray(tokens_D), np.ones((1, 1)), draws_SD)
    value = float(np.average(own - other, weights=tokens_D))
    return effect_of_draws(value, means_S, len(own))


def bootstrap_seeds(
    own_KD: np.ndarray,
    other_KD: np.ndarray,
    tokens_D: Sequence[float] | np.ndarray,
    is_paired: bool,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> Effect:
    """Give the difference of two families, own minus other, over seeds and documents.

    Args:
        own_KD: Mean loss of each document under each seed, nats per token.
        other_KD: The same documents; as many seeds if paired.
        tokens_D: Scored tokens of each document.
        is_paired: Whether row k of both saw one data order, so that rows are drawn together.
        num_draws: S.
        seed: Of the draws.

    Raises:
        ValueError: The documents differ in number, or the seeds of a pair.
    """
    if own_KD.shape[1] != other_KD.shape[1] or (is_paired and len(own_KD) != len(other_KD)):
        raise ValueError(
            f"losses by seed and document of shapes {own_KD.shape} and {other_KD.shape} do not pair"
        )
    generator = np.random.default_rng(seed)
    weight_D = np.asarray(tokens_D)
    documents_SD = _draw(generator, num_draws, own_KD.shape[1])
    own_SK = _draw(generator, num_draws, len(own_KD))
    other_SK = own_SK if is_paired else _draw(generator, num_draws, len(other_KD))
    draws_S = _means(own_KD, weight_D, own_SK, documents_SD) - _means(
        other_KD, weight_D, other_SK, documents_SD
    )
    value = float(np.average(own_KD.mean(axis=0) - other_KD.mean(axis=0), weights=weight_D))
    num_units, num_means = (len(own_KD), 1) if is_paired else (len(own_KD) + len(other_KD), 2)
    return effect_of_draws(value, draws_S, num_units, num_means)


def bootstrap_interaction(
    gains_KD: np.ndarray, rest_KD: np.ndarray, num_draws: int = NUM_DRAWS, seed: int = 0
) -> Effect:
    """Give how much larger a gain is on some tokens than on the rest of the same documents.

    Args:
        gains_KD: Other loss less own, on the tokens in question, by seed and document.
        rest_KD: The same on all other tokens.
        num_draws: S.
        seed: Of the draws.
    """
    return bootstrap_seeds(gains_KD, rest_KD, np.ones(gains_KD.shape[1]), True, num_draws, seed)


def _draw(generator: np.random.Generator, num_draws: int, num_units: int) -> np.ndarray:
    share = np.full(num_units, 1 / num_units)
    return generator.multinomial(num_units, share, size=num_draws).astype(float)


def _means(
    loss_KD: np.ndarray, weight_D: np.ndarray, seeds_SK: np.ndarray, documents_SD: np.ndarray
) -> np.ndarray:
    """Give the mean over drawn seeds and documents, weighted by tokens, [S]."""
    weighted_SD = documents_SD * weight_D
    total_S = ((seeds_SK @ loss_KD) * weighted_SD).sum(axis=1)
    return np.asarray(total_S / (weighted_SD.sum(axis=1) * seeds_SK.sum(axis=1)))
