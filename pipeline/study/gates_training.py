"""Gates of trained runs: size, data, seeds, tuning and what a family must not be denied."""

from collections.abc import Callable, Mapping

import numpy as np

from pipeline.config.claims import GateConfig
from pipeline.study.evidence import RunFacts
from pipeline.study.gates_runs import Case, Finding, check_each, check_equal, group, show

BYTE_LEVEL = 1.5
"""Bytes a token below which tokens count as bytes, of which a context needs twice as many."""


def _seeds(gate: GateConfig, case: Case) -> Finding:
    least = int(gate.at_least or 0)
    counts = {name: len({run.seed for run in runs}) for name, runs in case.by_cell().items()}
    few = [name for name, num in counts.items() if num < least]
    if not few:
        return Finding()
    runs = tuple(run.run for name in few for run in case.by_cell()[name])
    return Finding(text=f"needs {least} seeds a cell; got {min(counts.values())}", runs=runs)


def _sizes_of(case: Case) -> dict[str, set[int]]:
    return {
        arm: {run.model.total_parameters for run in runs} for arm, runs in case.by_arm().items()
    }


def _sizes(gate: GateConfig, case: Case) -> Finding:
    least = int(gate.at_least or 0)
    few = {arm: len(sizes) for arm, sizes in _sizes_of(case).items() if len(sizes) < least}
    got = ", ".join(f"{num} of {arm}" for arm, num in few.items())
    return Finding(text=f"needs {least} sizes an arm; got {got}") if few else Finding()


def _parameter_decades(gate: GateConfig, case: Case) -> Finding:
    least = gate.at_least or 0.0
    spans = {a: float(np.log10(max(s) / min(s))) for a, s in _sizes_of(case).items()}
    short = {arm: span for arm, span in spans.items() if span < least}
    got = ", ".join(f"{span:.2f} of {arm}" for arm, span in short.items())
    return Finding(text=f"needs {least:g} decades of parameters; got {got}") if short else Finding()


def _context(gate: GateConfig, case: Case) -> Finding:
    least = int(gate.at_least or 0)

    def spare(run: RunFacts) -> float | None:
        tokens, size = run.training.scored_tokens, run.training.bytes_per_token
        if tokens is None or size is None:
            return None
        return tokens / (2.0 if size < BYTE_LEVEL else 1.0)

    wanted = f"a context of {least} tokens, or {2 * least} bytes where tokens are bytes"
    return check_each(case.runs, wanted, spare, lambda v: v >= least)


def _steps(gate: GateConfig, case: Case) -> Finding:
    least = int(gate.at_least or 0)

    def reached(run: RunFacts) -> float | None:
        return float(least) if run.training.is_target_reached else run.training.steps

    return check_each(
        case.runs, f"{least} steps or the target reached", reached, lambda v: v >= least
    )


def _matched(gate: GateConfig, case: Case) -> Finding:
    most, quantity = gate.at_most or 0.0, (gate.one_of or ["total_parameters"])[0]
    if not (whole := _groups_hold_every_arm(case)).is_clean:
        return whole
    for name, runs in case.by_match().items():
        sizes = [getattr(run.model, quantity) for run in runs]
        apart = max(sizes) / min(sizes) - 1
        if apart > most:
            return Finding(
                text=f"needs {quantity} within {most:.0%}; {name} is apart by {apart:.1%}",
                runs=tuple(run.run for run in runs),
            )
    return Finding()


def _groups_hold_every_arm(case: Case) -> Finding:
    """Require each group of matched runs to hold all arms: else nothing was matched in it."""
    wanted = {run.arm for run in case.runs}
    for name, runs in case.by_match().items():
        if missing := sorted(wanted - {run.arm for run in runs}):
            return Finding(
                text=f"needs every arm in each matched group; {name} lacks {', '.join(missing)}",
                runs=tuple(run.run for run in runs),
            )
    return Finding()


def _equal_tokens(gate: GateConfig, case: Case) -> Finding:
    unknown = tuple(run.run for run in case.runs if run.training.tokens is None)
    if unknown:
        return Finding(text="needs the tokens of every run; not recorded", runs=unknown)
    if not (whole := _groups_hold_every_arm(case)).is_clean:
        return whole
    for runs in case.by_match().values():
        tried = {
            arm: sorted({run.training.tokens or 0 for run in own})
            for arm, own in group(runs, lambda run: run.arm).items()
        }
        if len({tuple(tokens) for tokens in tried.values()}) > 1:
            got = ", ".join(f"{arm} {tokens}" for arm, tokens in tried.items())
            return Finding(text=f"needs equal tokens; got {got}", runs=tuple(r.run for r in runs))
    return Finding()


def _equal_tuning(gate: GateConfig, case: Case) -> Finding:
    return check_equal(case.runs, "number of tuning trials", lambda run: run.training.num_trials)


def _interior_learning_rate(gate: GateConfig, case: Case) -> Finding:
    least = int(gate.at_least or 0)
    few = check_each(
        case.runs,
        f"{least} learning rates tried",
        lambda run: len(set(run.training.learning_rates_tried)),
        lambda v: v >= least,
    )
    if not few.is_clean:
        return few

    def edge(run: RunFacts) -> str | None:
        rate, tried = run.training.learning_rate, run.training.learning_rates_tried
        if rate is None:
            return None
        inside = min(tried) < rate < max(tried)
        return "inside" if inside else f"{rate:g} at the edge of {min(tried):g} to {max(tried):g}"

    return check_each(case.runs, "an interior learning rate", edge, lambda v: v == "inside")


def _schedule_finished(gate: GateConfig, case: Case) -> Finding:
    return check_each(
        case.runs, "a finished schedule", lambda run: run.training.is_schedule_finished, lambda v: v
    )


def _dropout(gate: GateConfig, case: Case) -> Finding:
    def below(run: RunFacts) -> float | None:
        epochs, dropout = run.training.epochs, run.training.dropout
        if epochs is None or dropout is None:
            return None
        return dropout if epochs <= 1 else 0.0

    return check_each(case.runs, "no dropout within one epoch", below, lambda v: v == 0)


def _epochs(gate: GateConfig, case: Case) -> Finding:
    most = gate.at_most or 0.0
    wanted = f"at most {most:g} passes over the data"
    return check_each(case.runs, wanted, lambda run: run.training.epochs, lambda v: v <= most)


def _tuned_regularisation(gate: GateConfig, case: Case) -> Finding:
    least = int(gate.at_least or 0)
    few = check_each(
        case.runs,
        f"{least} settings of dropout and weight decay tried",
        lambda run: run.training.num_regularisation_trials,
        lambda v: v >= least,
    )
    if not few.is_clean:
        return few
    return check_equal(
        case.runs,
        "number of settings of regularisation",
        lambda run: run.training.num_regularisation_trials,
    )


def _same_context(gate: GateConfig, case: Case) -> Finding:
    window = check_equal(
        case.runs, "window of back-propagation", lambda run: run.training.sequence_tokens
    )
    if not window.is_clean:
        return window
    return check_equal(case.runs, "handling of state", lambda run: run.training.carries_state)


def _trained_length(gate: GateConfig, case: Case) -> Finding:
    def beyond(run: RunFacts) -> int | None:
        scored, trained = run.training.scored_tokens, run.training.sequence_tokens
        return None if scored is None or trained is None else max(0, scored - trained)

    return check_each(
        case.runs, "0 tokens scored beyond the trained length", beyond, lambda v: v == 0
    )


def _forget_bias(gate: GateConfig, case: Case) -> Finding:
    least = gate.at_least or 0.0
    gated = [run for run in case.runs if run.model.cell == "lstm"]
    if not gated:
        return Finding()
    wanted = f"a forget bias of at least {show(least)}"
    return check_each(gated, wanted, lambda run: run.model.forget_bias, lambda v: v >= least)


def _causality(gate: GateConfig, case: Case) -> Finding:
    # A bidirectional model sees later tokens by design.
    causal = [run for run in case.runs if run.model.mask != "bidirectional"]
    if not causal:
        return Finding()
    return check_each(
        causal,
        "a proof that no logit sees a later token",
        lambda run: run.model.is_causality_proven,
        lambda v: v,
    )


def _mask(gate: GateConfig, case: Case) -> Finding:
    legal = gate.one_of or []
    reading = [run for run in case.runs if run.model.attention == "self"]
    return check_each(
        reading, f"a {' or '.join(legal)} mask", lambda run: run.model.mask, lambda v: v in legal
    )


CHECKS: Mapping[str, Callable[[GateConfig, Case], Finding]] = {
    "seeds": _seeds,
    "sizes": _sizes,
    "parameter_decades": _parameter_decades,
    "context": _context,
    "steps": _steps,
    "matched": _matched,
    "equal_tokens": _equal_tokens,
    "equal_tuning": _equal_tuning,
    "interior_learning_rate": _interior_learning_rate,
    "schedule_finished": _schedule_finished,
    "dropout": _dropout,
    "epochs": _epochs,
    "tuned_regularisation": _tuned_regularisation,
    "same_context": _same_context,
    "trained_length": _trained_length,
    "forget_bias": _forget_bias,
    "causality": _causality,
    "mask": _mask,
}
