"""From claims and evidence to verdicts: supported, refuted, or not decided and why."""

from collections.abc import Sequence

import numpy as np

from pipeline.config.claims import (
    ClaimConfig,
    ClaimsConfig,
    HypothesisConfig,
    MarginConfig,
    Outcome,
)
from pipeline.study.conditions import describe_conditions
from pipeline.study.decision import Rule, weigh
from pipeline.study.evidence import Evidence, Measurement
from pipeline.study.gates import check_gates
from pipeline.study.significance import adjust_by_holm
from pipeline.study.verdict import HypothesisVerdict, Judged, Verdict
from pipeline.study.verdict_text import write_text

NO_INTERVAL = "one independent unit alone, which gives no interval"
NO_DEVIATION = "the margin is stated in seed deviations, and none was measured"


def judge(claims: ClaimsConfig, claim: ClaimConfig, evidence: Evidence) -> Verdict:
    """Judge one claim by itself, without a correction for the others.

    Args:
        claims: The file that the claim stands in, for its arms, gates and level.
        claim: The claim.
        evidence: Measurements and facts.
    """
    weighed = _weigh_claim(claims, claim, evidence)
    return _conclude(claims, claim, weighed, _p_supported(weighed), _p_refuted(weighed))


def judge_all(claims: ClaimsConfig, evidence: Evidence) -> list[Verdict]:
    """Judge every claim at a level that holds for all of them together.

    A claim that was not measured counts with p = 1: leaving measurements out makes nothing easier.
    """
    weighed = [_weigh_claim(claims, claim, evidence) for claim in claims.claims]
    supported = adjust_by_holm([_p_supported(own) for own in weighed])
    refuted = adjust_by_holm([_p_refuted(own) for own in weighed])
    rows = zip(claims.claims, weighed, supported, refuted, strict=True)
    return [_conclude(claims, claim, own, first, second) for claim, own, first, second in rows]


def _weigh_claim(
    claims: ClaimsConfig, claim: ClaimConfig, evidence: Evidence
) -> list[HypothesisVerdict]:
    return [_weigh_hypothesis(claims, hypothesis, evidence) for hypothesis in claim.hypotheses]


def _weigh_hypothesis(
    claims: ClaimsConfig, hypothesis: HypothesisConfig, evidence: Evidence
) -> HypothesisVerdict:
    judged = [
        _judge_measurement(claims, hypothesis, measurement, evidence)
        for measurement in evidence.find(hypothesis.statistic)
    ]
    admitted = [one for one in judged if one.is_admitted]
    supported = max((one.p_supported for one in admitted), default=1.0)
    refuted = max((one.p_refuted for one in admitted), default=1.0)
    return HypothesisVerdict(
        statistic=hypothesis.statistic,
        text=hypothesis.text,
        role=hypothesis.role,
        unit=hypothesis.unit,
        threshold=hypothesis.threshold,
        outcome=_outcome(supported, refuted, claims.level),
        p_supported=supported,
        p_refuted=refuted,
        measurements=tuple(judged),
        published=hypothesis.published,
    )


def _judge_measurement(
    claims: ClaimsConfig,
    hypothesis: HypothesisConfig,
    measurement: Measurement,
    evidence: Evidence,
) -> Judged:
    arms = {label: claims.arms[label] for label in hypothesis.arms}
    gates = tuple(check_gates(claims.gates_of(hypothesis), measurement, arms, evidence))
    margin = _margin(hypothesis.margin, measurement)
    effect = measurement.effect
    obstacle = ""
    if hypothesis.margin is not None and margin is None:
        obstacle = NO_DEVIATION
    if effect.standard_error is None or effect.degrees < 1:
        obstacle = NO_INTERVAL
    supported = refuted = 1.0
    if not obstacle and all(gate.passed for gate in gates):
        rule = Rule(direction=hypothesis.direction, threshold=hypothesis.threshold, margin=margin)
        error, degrees = np.array(effect.standard_error), np.array(effect.degrees)
        p = weigh(rule, np.array(effect.value), error, degrees)
        # An exact test of few seeds knows how few assignments there are; it may only weaken. It
        # tests a difference of zero, so it says nothing of equivalence or of another threshold.
        is_of_zero = hypothesis.direction != "equivalent" and hypothesis.threshold == 0.0
        exact = (effect.exact_p or 0.0) if is_of_zero else 0.0
        supported = max(float(p.supported), exact)
        refuted = float(p.refuted)
    return Judged(
        setting=measurement.setting,
        effect=effect.estimate,
        margin=margin,
        p_supported=supported,
        p_refuted=refuted,
        gates=gates,
        obstacle=obstacle,
        conditions=describe_conditions(
            [evidence.runs[name] for name in measurement.runs if name in evidence.runs]
        ),
        runs=measurement.runs,
    )


def _margin(margin: MarginConfig | None, measurement: Measurement) -> float | None:
    if margin is None:
        return None
    if margin.absolute is not None:
        return margin.absolute
    deviation = measurement.seed_deviation
    if deviation is None or margin.seed_deviations is None:
        return None
    return margin.seed_deviations * deviation.value


def _outcome(p_supported: float, p_refuted: float, level: float) -> Outcome:
    """Refuting goes first: an effect that is there but below the margin does not matter."""
    if p_refuted <= level:
        return "refuted"
    return "supported" if p_supported <= level else "not_decided"


def _primary(weighed: Sequence[HypothesisVerdict]) -> list[HypothesisVerdict]:
    return [verdict for verdict in weighed if verdict.role == "primary"]


def _p_supported(weighed: Sequence[HypothesisVerdict]) -> float:
    """Every primary hypothesis has to hold, so the weakest counts (an intersection-union test)."""
    return max(verdict.p_supported for verdict in _primary(weighed))


def _p_refuted(weighed: Sequence[HypothesisVerdict]) -> float:
    """One that falls is enough, so the strongest counts, times how many could have."""
    primary = _primary(weighed)
    return min(1.0, len(primary) * min(verdict.p_refuted for verdict in primary))


def _conclude(
    claims: ClaimsConfig,
    claim: ClaimConfig,
    weighed: Sequence[HypothesisVerdict],
    p_supported: float,
    p_refuted: float,
) -> Verdict:
    outcome = _outcome(p_supported, p_refuted, claims.level)
    closed = {
        gate.gate: None
        for verdict in _primary(weighed)
        for judged in verdict.measurements
        for gate in judged.failed
    }
    runs = {name: None for v in weighed for one in v.measurements for name in one.runs}
    return Verdict(
        number=claim.number,
        title=claim.title,
        outcome=outcome,
        text=write_text(claim, outcome, weighed, (p_supported, p_refuted)),
        p_supported=p_supported,
        p_refuted=p_refuted,
        hypotheses=tuple(weighed),
        failed_gates=tuple(closed),
        runs=tuple(runs),
    )
