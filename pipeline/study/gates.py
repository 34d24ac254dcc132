"""From a measurement and the facts of its runs to which conditions of an expert it fails.

A fact that was not recorded fails its gate: what is not known is not in order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.claims import ArmConfig, GateConfig
from pipeline.study import gates_measurement, gates_timing, gates_training
from pipeline.study.evidence import Evidence, Measurement, RunFacts
from pipeline.study.gates_runs import Case, Finding, check_each, check_equal


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """One gate and what it found."""

    gate: str
    passed: bool
    text: str
    """The value, what is legal, and the runs that fail."""
    runs: tuple[str, ...]
    """Runs that fail; empty where the gate passes or no single run is to blame."""


def _arms_present(gate: GateConfig, case: Case) -> Finding:
    present = {run.arm for run in case.runs}
    missing = sorted(set(case.arms) - present)
    if missing:
        return Finding(text=f"no run of {', '.join(missing)}")
    unlisted = sorted(name for name in case.measurement.runs if name not in case.known)
    if unlisted:
        return Finding(text="facts of runs are missing", runs=tuple(unlisted))
    return Finding()


def _labels(gate: GateConfig, case: Case) -> Finding:
    wrong, texts = [], []
    for run in case.runs:
        own, arm = run.model, case.arms.get(run.arm)
        if arm is None:
            wrong.append(run.run)
            texts.append(f"{run.arm} is no arm of this hypothesis")
        elif (own.cell, own.attention) != (arm.cell, arm.attention):
            wrong.append(run.run)
            texts.append(
                f"labelled {run.arm} (cell {arm.cell}, attention {arm.attention}) but built with "
                f"cell {own.cell}, attention {own.attention}"
            )
    return Finding(text="; ".join(sorted(set(texts))), runs=tuple(wrong)) if wrong else Finding()


def _same_code(gate: GateConfig, case: Case) -> Finding:
    return check_equal(case.runs, "code version", lambda run: run.code_version)


def _same_data(gate: GateConfig, case: Case) -> Finding:
    return check_equal(case.runs, "data fingerprint", lambda run: run.data_fingerprint)


def _hardware(gate: GateConfig, case: Case) -> Finding:
    legal = gate.one_of or []
    return check_each(
        case.runs, f"hardware {' or '.join(legal)}", lambda run: run.hardware, lambda v: v in legal
    )


Check = Callable[[GateConfig, Case], Finding]

GATES: Mapping[str, Check] = {
    "arms_present": _arms_present,
    "labels": _labels,
    "same_code": _same_code,
    "same_data": _same_data,
    "hardware": _hardware,
    **gates_timing.CHECKS,
    **gates_training.CHECKS,
    **gates_measurement.CHECKS,
}
"""Name in the claims file to its check."""


def check_gates(
    gates: Sequence[GateConfig],
    measurement: Measurement,
    arms: Mapping[str, ArmConfig],
    evidence: Evidence,
) -> list[GateResult]:
    """Run every gate; none is left out because another failed.

    Args:
        gates: Gates of the hypothesis.
        measurement: What was measured.
        arms: The arms that the hypothesis needs.
        evidence: Where the facts of the runs stand.
    """
    runs: list[RunFacts] = [
        evidence.runs[name] for name in measurement.runs if name in evidence.runs
    ]
    case = Case(measurement=measurement, runs=runs, arms=arms, known=frozenset(evidence.runs))
    results = []
    for gate in gates:
        finding = GATES[gate.gate](gate, case)
        results.append(
            GateResult(
                gate=gate.gate, passed=finding.is_clean, text=finding.sentence, runs=finding.runs
            )
        )
    return results
