"""From the points of a ladder to scaling laws, how they differ, and what each loss costs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.study.fits import Estimate
from pipeline.study.gain import Axis, Gain, summarize_gains
from pipeline.study.nested import NestedComparison, compare_families
from pipeline.study.scaling import ScalingLaw, ScalingPoint, fit_scaling
from pipeline.study.trunks import bootstrap_scaling, summarize_draws


@dataclass(frozen=True, kw_only=True)
class FamilyLaw:
    """The law of one family."""

    label: str
    law: ScalingLaw
    is_converged: bool
    constants: Mapping[str, Estimate]
    """E, A, B, alpha, beta and the compute exponent, with the interval of resampled trunks."""


@dataclass(frozen=True, kw_only=True)
class LadderResult:
    """What a ladder found."""

    points: Sequence[ScalingPoint]
    laws: Sequence[FamilyLaw]
    comparisons: Sequence[NestedComparison]
    """Each family with the reference."""
    gains: Mapping[str, Mapping[Axis, Sequence[Gain]]]
    """Label of a family to how much more than the reference it needs."""
    obstacles: Sequence[str]
    """Why something could not be fitted."""


def analyze_ladder(
    points: Sequence[ScalingPoint], labels: Sequence[str], reference: str
) -> LadderResult:
    """Fit the law of each family, and compare each with the reference.

    Args:
        points: As `collect_points`.
        labels: The families in the order of the study.
        reference: The one that the others are compared with.
    """
    laws: list[FamilyLaw] = []
    comparisons: list[NestedComparison] = []
    gains: dict[str, Mapping[Axis, Sequence[Gain]]] = {}
    obstacles: list[str] = []
    for label in labels:
        try:
            laws.append(_fit_family(label, [p for p in points if p.family == label]))
        except ValueError as exc:
            obstacles.append(f"No law for {label}: {exc}")
    for label in labels:
        if label == reference or not {label, reference} <= {law.label for law in laws}:
            continue
        try:
            comparison = compare_families(points, label, reference)
            comparisons.append(comparison)
            gains[label] = summarize_gains(comparison, points)
        except ValueError as exc:
            obstacles.append(f"No gain of {label} over {reference}: {exc}")
    return LadderResult(
        points=tuple(points),
        laws=laws,
        comparisons=comparisons,
        gains=gains,
        obstacles=obstacles,
    )


def as_tree(found: LadderResult) -> dict[str, Any]:
    """Give what `ladder.json` holds: everything but the clouds of the resamples."""
    return {
        "points": [asdict(point) for point in found.points],
        "laws": [asdict(law) for law in found.laws],
        "comparisons": [
            {
                "family": c.family,
                "reference": c.reference,
                "chosen": c.chosen,
                "models": {name: asdict(model) for name, model in c.models.items()},
                "differences": {name: asdict(e) for name, e in c.differences.items()},
                "runs": list(c.runs),
            }
            for c in found.comparisons
        ],
        "gains": {
            label: {axis: [asdict(gain) for gain in own] for axis, own in axes.items()}
            for label, axes in found.gains.items()
        },
        "obstacles": list(found.obstacles),
    }


def _fit_family(label: str, points: Sequence[ScalingPoint]) -> FamilyLaw:
    fit = fit_scaling(points)
    draws_SP = bootstrap_scaling(points, fit)
    num_trunks = len({point.trunk for point in points})
    constants = summarize_draws(fit, draws_SP, num_trunks)
    if num_trunks == len({point.num_parameters for point in points}):
        # One trunk a size: every resample is the sample, which is no interval.
        constants = {name: replace(c, low=None, high=None) for name, c in constants.items()}
    return FamilyLaw(label=label, law=fit.law, is_converged=fit.is_converged, constants=constants)
