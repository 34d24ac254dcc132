"""Gates of timed cells: what makes a step time or a throughput comparable."""

from collections.abc import Callable, Mapping

from pipeline.config.claims import GateConfig
from pipeline.study.gates_runs import Case, Finding, check_each, check_equal


def _quiet(gate: GateConfig, case: Case) -> Finding:
    most = gate.at_most or 0.0
    load = check_each(
        case.runs,
        f"a load of others of at most {most:g} a core",
        lambda run: run.timing.load_per_core,
        lambda value: value <= most,
    )
    if not load.is_clean:
        return load
    on_cpu = [run for run in case.runs if run.hardware == "cpu"]
    if not on_cpu:
        return Finding()
    return check_each(
        on_cpu, "CPU time beside wall time", lambda run: run.timing.cpu_seconds, lambda v: v > 0
    )


def _rounds(gate: GateConfig, case: Case) -> Finding:
    least = int(gate.at_least or 0)
    count = check_each(
        case.runs, f"{least} rounds", lambda run: run.timing.rounds, lambda v: v >= least
    )
    if not count.is_clean:
        return count
    return check_each(
        case.runs, "interleaved arms", lambda run: run.timing.is_interleaved, lambda v: v
    )


def _synchronised(gate: GateConfig, case: Case) -> Finding:
    least = int(gate.at_least or 0)
    waited = check_each(
        case.runs,
        "clocks read after the device has finished",
        lambda run: run.timing.is_synchronised,
        lambda v: v,
    )
    if not waited.is_clean:
        return waited
    return check_each(
        case.runs,
        f"{least} warm-up steps",
        lambda run: run.timing.warmup_steps,
        lambda v: v >= least,
    )


def _same_compilation(gate: GateConfig, case: Case) -> Finding:
    return check_equal(case.runs, "state of compilation", lambda run: run.timing.is_compiled)


def _same_checkpointing(gate: GateConfig, case: Case) -> Finding:
    return check_equal(
        case.runs, "activation checkpointing", lambda run: run.timing.has_activation_checkpointing
    )


def _fused_recurrence(gate: GateConfig, case: Case) -> Finding:
    """A loop in Python is a straw man; only input feeding has no fused form."""
    recurrent = [
        run
        for run in case.runs
        if run.model.cell != "none" and run.model.attention != "input_feeding"
    ]
    if not recurrent:
        return Finding()
    return check_each(
        recurrent,
        "a fused or parallel recurrence, not a loop in Python",
        lambda run: run.timing.recurrence,
        lambda v: v in ("fused", "parallel"),
    )


def _own_best_batch(gate: GateConfig, case: Case) -> Finding:
    return check_each(
        case.runs,
        "each arm's own best batch",
        lambda run: run.timing.is_own_best_batch,
        lambda v: v,
    )


def _sequence_lengths(gate: GateConfig, case: Case) -> Finding:
    least = int(gate.at_least or 0)
    few = check_each(
        case.runs,
        f"{least} sequence lengths",
        lambda run: len(set(run.timing.sequence_lengths)),
        lambda v: v >= least,
    )
    if not few.is_clean:
        return few
    return check_equal(
        case.runs, "set of sequence lengths", lambda run: run.timing.sequence_lengths
    )


def _cache(gate: GateConfig, case: Case) -> Finding:
    reading = [run for run in case.runs if run.model.attention != "none"]
    if not reading:
        return Finding()
    return check_each(
        reading, "generation with a cache", lambda run: run.timing.uses_cache, lambda v: v
    )


CHECKS: Mapping[str, Callable[[GateConfig, Case], Finding]] = {
    "quiet": _quiet,
    "rounds": _rounds,
    "synchronised": _synchronised,
    "same_compilation": _same_compilation,
    "same_checkpointing": _same_checkpointing,
    "fused_recurrence": _fused_recurrence,
    "own_best_batch": _own_best_batch,
    "sequence_lengths": _sequence_lengths,
    "cache": _cache,
}
