"""From samples to slopes and means with confidence intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
"""Two-sided coverage of every interval in a report."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95% interval; the bounds are absent where the samples cannot give them."""

    value: float
    low: float | None
    high: float | None
    num: int
    """Number of samples behind the value."""

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval, in the unit of the value."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval exists and does not cover zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A least-squares line `y = intercept + slope * x`."""

    slope: Estimate
    intercept: float


def estimate_mean(values: Sequence[float]) -> Estimate:
    """Give the mean of independent samples with Student's interval.

    Args:
        values: At least one sample; a single one gives no interval.

    Raises:
        ValueError: There is no sample.
    """
    num = len(values)
    if num == 0:
        raise ValueError("a mean needs at least one sample")
    mean = float(np.mean(values))
    if num == 1:
        return Estimate(value=mean, low=None, high=None, num=1)
    error = float(np.std(values, ddof=1)) / num**0.5
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, num - 1)) * error
    return Estimate(value=mean, low=mean - reach, high=mean + reach, num=num)


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Fit a line by ordinary least squares; the slope's interval is Student's.

    Args:
        x: Abscissae, at least two of them distinct.
        y: As many ordinates.

    Returns:
        The line; with two points the slope has no interval.

    Raises:
        ValueError: Fewer than two distinct abscissae, or lengths that differ.
    """
    if len(x) != len(y) or len(set(x)) < 2:
        raise ValueError(f"a line needs two distinct x and as many y; got {len(x)} x, {len(y)} y")
    fit = stats.linregress(np.asarray(x, dtype=float), np.asarray(y, dtype=float))
    slope, num = float(fit.slope), len(x)
    if num == 2:
        estimate = Estimate(value=slope, low=None, high=None, num=2)
    else:
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, num - 2)) * float(fit.stderr)
        estimate = Estimate(value=slope, low=slope - reach, high=slope + reach, num=num)
    return Line(slope=estimate, intercept=float(fit.intercept))


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> Line:
    """Fit `y = c * x ** slope` as a line in natural logarithms.

    Args:
        x: Positive abscissae.
        y: As many positive ordinates.

    Returns:
        The line of `log y` over `log x`; `exp(intercept)` is c.

    Raises:
        ValueError: A value is not positive, or as `fit_line`.
    """
    if min(*x, *y) <= 0:
        raise ValueError("a power law needs positive values")
    return fit_line([float(v) for v in np.log(x)], [float(v) for v in np.log(y)])


def estimate_slope_over_rounds(x: Sequence[float], rounds: Sequence[Sequence[float]]) -> Estimate:
    """Give the power-law slope with an interval from repeated rounds over the same abscissae.

    Each round gives one slope. Slopes of rounds are independent where single times are not, because
    the load of the machine drifts more slowly than a round lasts.

    Args:
        x: Positive abscissae, shared by all rounds.
        rounds: For each round one positive ordinate per abscissa.

    Raises:
        ValueError: There is no round, or as `fit_power_law`.
    """
    return estimate_mean([fit_power_law(x, y).slope.value for y in rounds])


@dataclass(frozen=True, kw_only=True)
class Quartiles:
    """The middle of some samples and the range that holds their middle half."""

    median: float
    low: float
    high: float
    num: int


def find_quartiles(values: Sequence[float]) -> Quartiles:
    """Give median and quartiles, interpolated linearly.

    Args:
        values: At least one sample.

    Raises:
        ValueError: There is no sample.
    """
    if not values:
        raise ValueError("quartiles need at least one sample")
    low, middle, high = (float(v) for v in np.percentile(values, [25, 50, 75]))
    return Quartiles(median=middle, low=low, high=high, num=len(values))
