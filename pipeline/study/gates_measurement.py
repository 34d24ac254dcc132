"""Gates of a measurement itself: its documents, its floors and the law that it was read from."""

from collections.abc import Callable, Mapping

from pipeline.config.claims import GateConfig
from pipeline.study.gates_runs import Case, Finding, show

FLOORS = ("unigram", "ngram")


def _documents(gate: GateConfig, case: Case) -> Finding:
    least, num = int(gate.at_least or 0), case.measurement.num_documents
    if num is not None and num >= least:
        return Finding()
    return Finding(text=f"needs {least} documents; got {'not recorded' if num is None else num}")


def _floors(gate: GateConfig, case: Case) -> Finding:
    missing = [name for name in FLOORS if name not in case.measurement.floors]
    if not missing:
        return Finding()
    return Finding(text=f"needs the {' and '.join(missing)} loss of the same tokens for scale")


def _held_out_error(gate: GateConfig, case: Case) -> Finding:
    most, error = gate.at_most or 0.0, case.measurement.held_out_error
    if error is not None and error <= most:
        return Finding()
    got = "not measured" if error is None else show(error)
    return Finding(text=f"needs an error of at most {most:g} nats at the held-out size; got {got}")


def _interpolated(gate: GateConfig, case: Case) -> Finding:
    if case.measurement.is_extrapolated is False:
        return Finding()
    return Finding(text="needs a value inside the measured range; it is extrapolated or unknown")


def _shared_floor(gate: GateConfig, case: Case) -> Finding:
    if case.measurement.is_floor_shared:
        return Finding()
    return Finding(
        text="needs one floor E for all families: on few points a floor of its own trades off "
        "against alpha"
    )


CHECKS: Mapping[str, Callable[[GateConfig, Case], Finding]] = {
    "documents": _documents,
    "floors": _floors,
    "held_out_error": _held_out_error,
    "interpolated": _interpolated,
    "shared_floor": _shared_floor,
}
