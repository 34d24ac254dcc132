"""From two scaling laws to how much more of a budget one family needs for the same loss.

The gain at a loss L is budget(family) / budget(reference), on four axes: parameters at equal
tokens, tokens at equal parameters, and training FLOPs and device seconds at each family's best
size. Above 1 the family needs more. Nothing is read outside the measured sizes.
Shapes: S draws, G sizes of the search.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.study.effect import Effect, effect_of_draws
from pipeline.study.fits import Estimate, fit_power_law
from pipeline.study.nested import NestedComparison
from pipeline.study.scaling import ScalingPoint, theta_of
from pipeline.study.trunks import count_trunks

Axis = Literal["parameters", "flops", "device_seconds", "tokens"]
AXES: tuple[Axis, ...] = ("parameters", "flops", "device_seconds", "tokens")
NUM_SIZES = 200
"""Sizes between the smallest and the largest measured one at which a budget is minimised."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The ratio of budgets at one loss on one axis."""

    axis: Axis
    loss: float
    """Nats per token, reached by both families."""
    ratio: Estimate
    """Budget of the family over that of the reference; the interval is that of its logarithm."""
    log_ratio: Effect
    reached_fraction: float
    """Share of the draws in which both laws reach the loss; below 0.975 the interval is void."""
    runs: tuple[str, ...]


def choose_losses(points: Sequence[ScalingPoint], num_losses: int = 5) -> list[float]:
    """Give losses that every family has measured on both sides, the lowest first.

    Raises:
        ValueError: The measured losses of the families do not overlap.
    """
    families = {p.family for p in points}
    ranges = [[p.loss for p in points if p.family == family] for family in families]
    low, high = max(min(own) for own in ranges), min(max(own) for own in ranges)
    if low >= high:
        raise ValueError(f"the families' losses do not overlap: {low:.3f} is above {high:.3f}")
    return [float(v) for v in np.linspace(low, high, num_losses + 1)[:-1]]


def measure_gain(
    comparison: NestedComparison, points: Sequence[ScalingPoint], axis: Axis, loss: float
) -> Gain | None:
    """Give the ratio of budgets with its interval.

    Args:
        comparison: The fit of both families, whose M2 laws and draws are used.
        points: The points it was fitted to; FLOPs and seconds come from them.
        axis: What the budget is.
        loss: Nats per token.

    Returns:
        None where the points do not record the axis, or a law does not reach the loss.
    """
    labels = (comparison.family, comparison.reference)
    own = {label: [p for p in points if p.family == label] for label in labels}
    frames = {label: _frame(axis, own[label], points) for label in labels}
    if any(frame is None for frame in frames.values()):
        return None
    laws = comparison.models["M2"].laws
    logs = [_log_budget(axis, loss, theta_of(laws[label])[None], frames[label]) for label in labels]
    value = float(logs[0][0] - logs[1][0])
    if not np.isfinite(value):
        return None
    drawn = [_log_budget(axis, loss, comparison.draws[label], frames[label]) for label in labels]
    with np.errstate(invalid="ignore"):
        draws_S = drawn[0] - drawn[1]
    counted = count_trunks([p for label in labels for p in own[label]], 1, np.random.default_rng(0))
    effect = effect_of_draws(value, draws_S, counted.num_trunks, counted.num_strata)
    return Gain(
        axis=axis,
        loss=loss,
        ratio=_exponentiate(effect.estimate),
        log_ratio=effect,
        reached_fraction=float(np.mean(np.isfinite(draws_S))),
        runs=comparison.runs,
    )


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """What a budget needs besides the law: sizes to search, and what a token costs at each."""

    log_sizes_G: np.ndarray
    log_cost_G: np.ndarray
    """Logarithm of the budget that one token takes at each size; 0 for tokens."""
    log_tokens: float
    """Logarithm of the tokens held equal, on the axis of parameters."""


def _frame(
    axis: Axis, own: Sequence[ScalingPoint], points: Sequence[ScalingPoint]
) -> _Frame | None:
    logs = np.log([p.num_parameters for p in own])
    log_sizes_G = np.linspace(logs.min(), logs.max(), NUM_SIZES)
    log_cost_G = np.zeros(NUM_SIZES)
    if axis == "tokens":
        # Equal parameters: the geometric mean of all sizes measured.
        log_sizes_G = np.array([float(np.mean(np.log([p.num_parameters for p in points])))])
        log_cost_G = np.zeros(1)
    elif axis != "parameters":
        costs = [(p.num_parameters, _spent(axis, p), p.tokens) for p in own]
        known = [(size, spent / tokens) for size, spent, tokens in costs if spent is not None]
        if len(known) < len(costs):
            return None
        line = fit_power_law([size for size, _ in known], [cost for _, cost in known])
        log_cost_G = line.intercept + line.slope.value * log_sizes_G
    most = min(max(p.tokens for p in points if p.family == f) for f in {p.family for p in points})
    return _Frame(log_sizes_G=log_sizes_G, log_cost_G=log_cost_G, log_tokens=float(np.log(most)))


def _spent(axis: Axis, point: ScalingPoint) -> float | None:
    return point.flops if axis == "flops" else point.device_seconds


def _log_budget(axis: Axis, loss: float, cloud_SP: np.ndarray, frame: _Frame | None) -> np.ndarray:
    """Give the logarithm of the least budget that reaches the loss, [S]; nan where none does."""
    assert frame is not None
    log_a, log_b, log_e, alpha, beta = (column[:, None] for column in cloud_SP.T)
    with np.errstate(divide="ignore", invalid="ignore"):
        if axis == "parameters":
            rest = loss - np.exp(log_e) - np.exp(log_b - beta * frame.log_tokens)
            return np.asarray(((log_a - np.log(rest)) / alpha)[:, 0])
        rest = loss - np.exp(log_e) - np.exp(log_a - alpha * frame.log_sizes_G)
        log_tokens_SG = np.where(rest > 0, (log_b - np.log(rest)) / beta, np.inf)
        least_S = (frame.log_cost_G + log_tokens_SG).min(axis=1)
    return np.where(np.isfinite(least_S), least_S, np.nan)


def _exponentiate(estimate: Estimate) -> Estimate:
    low, high = (None if v is None else float(np.exp(v)) for v in (estimate.low, estimate.high))
    return Estimate(value=float(np.exp(estimate.value)), low=low, high=high, num=estimate.num)


def summarize_gains(
    comparison: NestedComparison, points: Sequence[ScalingPoint]
) -> Mapping[Axis, list[Gain]]:
    """Give the gains of every recorded axis over the losses that both families reach."""
    losses = choose_losses([p for p in points if p.run in set(comparison.runs)])
    gains = {axis: [measure_gain(comparison, points, axis, v) for v in losses] for axis in AXES}
    return {axis: [g for g in found if g is not None] for axis, found in gains.items()}
