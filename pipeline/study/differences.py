"""From two configs to the fields in which they differ: of families, and of claims over time."""

from collections.abc import Mapping

from pipeline.config.claims import ClaimsConfig, GateConfig
from pipeline.config.schema import RunConfig
from pipeline.tracking.replica import flatten

SET_BY_THE_STUDY = ("name", "output_dir", "seed")


def list_differences(runs: Mapping[str, RunConfig]) -> dict[str, dict[str, str]]:
    """Give each config field that is not the same in all runs, the model left out.

    Args:
        runs: Label of a family to its run.

    Returns:
        Dotted name of a field to its value, as text, by label; a field that is unset is `none`.
    """
    trees = {
        label: flatten(run.model_dump(mode="json", exclude={"model", *SET_BY_THE_STUDY}))
        for label, run in runs.items()
    }
    names = sorted({name for tree in trees.values() for name in tree})
    values = {
        name: {label: tree.get(name, "none") for label, tree in trees.items()} for name in names
    }
    return {name: own for name, own in values.items() if len(set(own.values())) > 1}


def list_claim_changes(before: ClaimsConfig, after: ClaimsConfig) -> dict[str, tuple[str, str]]:
    """Give what was changed in the claims after a study had fixed them.

    Returns:
        Place in the file to its text before and after; what was added or taken out is `none` on one
        side.
    """
    first, second = _describe_claims(before), _describe_claims(after)
    pairs = {
        name: (first.get(name, "none"), second.get(name, "none"))
        for name in sorted({*first, *second})
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _describe_claims(claims: ClaimsConfig) -> dict[str, str]:
    """Key every field by the number and the statistic that it belongs to, not by its place."""
    tree = claims.model_dump(mode="json", exclude={"claims", "every_claim", "gate_sets"})
    texts = flatten(tree) | {f"every_claim.{g.gate}": _gate(g) for g in claims.every_claim}
    for name, gates in claims.gate_sets.items():
        texts |= {f"gate_sets.{name}.{gate.gate}": _gate(gate) for gate in gates}
    for claim in claims.claims:
        own = flatten(claim.model_dump(mode="json", exclude={"hypotheses"}))
        texts |= {f"claims.{claim.number}.{name}": text for name, text in own.items()}
    for claim, hypothesis in claims.walk():
        place = f"claims.{claim.number}.{hypothesis.statistic}"
        own = flatten(hypothesis.model_dump(mode="json", exclude={"gates"}))
        texts |= {f"{place}.{name}": text for name, text in own.items()}
        texts |= {f"{place}.gates.{gate.gate}": _gate(gate) for gate in hypothesis.gates}
    return texts


def _gate(gate: GateConfig) -> str:
    bounds = gate.model_dump(exclude={"gate"}, exclude_none=True)
    return ", ".join(f"{name} {value}" for name, value in bounds.items()) or "required"
