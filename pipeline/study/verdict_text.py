"""From a judged claim to the sentences of its verdict."""

from collections.abc import Sequence

from pipeline.config.claims import ClaimConfig, Outcome
from pipeline.study.verdict import HypothesisVerdict, Judged

OUTCOMES: dict[Outcome, str] = {
    "supported": "supported",
    "refuted": "refuted",
    "not_decided": "not decided at this scale",
}


def write_text(
    claim: ClaimConfig,
    outcome: Outcome,
    weighed: Sequence[HypothesisVerdict],
    p_values: tuple[float, float],
) -> str:
    """Write the verdict.

    Args:
        claim: The claim.
        outcome: What it came to.
        weighed: Its hypotheses.
        p_values: P of supporting and of refuting it, corrected for the other claims.
    """
    sentences = [f"Claim {claim.number} is {OUTCOMES[outcome]}."]
    alone = {verdict.outcome for verdict in weighed if verdict.role == "primary"}
    if outcome == "not_decided" and (alone == {"supported"} or "refuted" in alone):
        sentences.append(
            f"Alone it would be {'refuted' if 'refuted' in alone else 'supported'}; corrected for "
            f"the other claims p is {min(p_values):.3f}."
        )
    sentences += [sentence for verdict in weighed for sentence in _describe(verdict)]
    if claim.false_as_worded is not None:
        shown = next(v for v in weighed if v.statistic == claim.false_as_worded.statistic)
        sentences.append(
            f'As usually worded ("{claim.usual_wording}") it is false: '
            f"{claim.false_as_worded.text} {_own_finding(shown)}"
        )
    return " ".join(sentences)


def _describe(verdict: HypothesisVerdict) -> list[str]:
    name = verdict.statistic if verdict.role == "primary" else f"{verdict.statistic} (secondary)"
    if not verdict.measurements:
        return [f"{name}: not measured."]
    return [f"{name}: {_describe_one(verdict, one)}" for one in verdict.measurements]


def _describe_one(verdict: HypothesisVerdict, judged: Judged) -> str:
    effect = judged.effect
    interval = (
        "no interval"
        if effect.low is None or effect.high is None
        else f"95% interval {effect.low:.4g} to {effect.high:.4g}"
    )
    where = f" on {judged.setting}" if judged.setting else ""
    shown = f"{effect.value:.4g} {verdict.unit}{where} ({interval}, n={effect.num})"
    if judged.failed:
        gates = "; ".join(f"gate {gate.gate}: {gate.text}" for gate in judged.failed)
        return f"{shown} decides nothing; {gates}."
    if judged.obstacle:
        return f"{shown} decides nothing: {judged.obstacle}."
    return f"{shown}: {OUTCOMES[verdict.outcome]}."


def _own_finding(shown: HypothesisVerdict) -> str:
    if not shown.measurements:
        return "This study did not measure it."
    if shown.outcome == "supported":
        effect = shown.measurements[0].effect
        return f"This study shows it: {shown.statistic} {effect.value:.4g} {shown.unit}."
    if shown.outcome == "refuted":
        return "This study measured the opposite; look at its conditions."
    return "This study does not decide it."
