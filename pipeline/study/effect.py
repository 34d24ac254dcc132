"""From samples or bootstrap draws to an effect with its error, which verdicts rest on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from pipeline.study.fits import CONFIDENCE, Estimate, fit_power_law


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A difference or a constant with its standard error, from independent units."""

    value: float
    standard_error: float | None
    """None where one unit alone was measured."""
    degrees: int
    """Degrees of freedom of the error: units minus the means taken out of them."""
    num: int
    """Independent units: seeds, trunks, rounds or documents."""
    exact_p: float | None = None
    """Two-sided p of an exact permutation test of zero; it can only weaken a claim."""

    @property
    def estimate(self) -> Estimate:
        """The value with Student's 95% interval."""
        if self.standard_error is None or self.degrees < 1:
            return Estimate(value=self.value, low=None, high=None, num=self.num)
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.degrees)) * self.standard_error
        return Estimate(
            value=self.value, low=self.value - reach, high=self.value + reach, num=self.num
        )


def effect_of_samples(values: Sequence[float]) -> Effect:
    """Give the mean of independent samples as an effect.

    Raises:
        ValueError: There is no sample.
    """
    num = len(values)
    if num == 0:
        raise ValueError("an effect needs at least one sample")
    error = float(np.std(values, ddof=1)) / num**0.5 if num > 1 else None
    return Effect(value=float(np.mean(values)), standard_error=error, degrees=num - 1, num=num)


def effect_of_groups(values: Sequence[float], reference: Sequence[float]) -> Effect:
    """Give the difference of the means of two independent groups, by Welch's error and degrees.

    Source: Welch 1947, Biometrika 34, 28.

    Raises:
        ValueError: A group is empty.
    """
    first, second = effect_of_samples(values), effect_of_samples(reference)
    num = min(first.num, second.num)
    value = first.value - second.value
    if first.standard_error is None or second.standard_error is None:
        return Effect(value=value, standard_error=None, degrees=0, num=num)
    parts = (first.standard_error**2, second.standard_error**2)
    total = sum(parts)
    spread = parts[0] ** 2 / first.degrees + parts[1] ** 2 / second.degrees
    degrees = first.degrees + second.degrees if spread == 0 else int(total**2 / spread)
    return Effect(value=value, standard_error=total**0.5, degrees=max(1, degrees), num=num)


def effect_of_draws(
    value: float, draws: Sequence[float] | np.ndarray, num_units: int, num_means: int = 1
) -> Effect:
    """Give a bootstrapped statistic as an effect, corrected for few units.

    Resampling n units gives a variance that is (n - means) / n of the true one; with three seeds
    the interval would be a fifth too short before Student's tails are even looked at.

    Args:
        value: The statistic of the data itself.
        draws: The statistic of each resample; those that are not finite are left out.
        num_units: Independent units that were resampled.
        num_means: Means that the resampling keeps fixed: the strata.
    """
    kept = np.asarray(draws, dtype=float)
    kept = kept[np.isfinite(kept)]
    degrees = num_units - num_means
    if degrees < 1 or len(kept) < 2:
        return Effect(value=value, standard_error=None, degrees=0, num=num_units)
    error = float(np.std(kept, ddof=1)) * (num_units / degrees) ** 0.5
    return Effect(value=value, standard_error=error, degrees=degrees, num=num_units)


def effect_of_slopes(
    x: Sequence[float],
    rounds: Sequence[Sequence[float]],
    reference: Sequence[Sequence[float]] | None = None,
) -> Effect:
    """Give an exponent over interleaved rounds, or its difference from that of a reference.

    Args:
        x: Positive abscissae: sequence lengths, contexts.
        rounds: For each round one positive ordinate per abscissa.
        reference: The same rounds of the other arm; the load of a round cancels in the pair.

    Raises:
        ValueError: The arms have other numbers of rounds, or as `fit_power_law`.
    """
    slopes = [fit_power_law(x, y).slope.value for y in rounds]
    if reference is not None:
        others = [fit_power_law(x, y).slope.value for y in reference]
        slopes = [own - other for own, other in zip(slopes, others, strict=True)]
    return effect_of_samples(slopes)
