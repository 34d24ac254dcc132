"""From the facts of runs to the conditions under which a number holds, for people."""

from collections.abc import Iterable, Sequence

from pipeline.study.evidence import RunFacts


def describe_conditions(runs: Sequence[RunFacts]) -> dict[str, str]:
    """Give what the runs share or span; what none of them recorded is left out."""
    spans: dict[str, Iterable[float | None]] = {
        "parameters": (run.model.total_parameters for run in runs),
        "tokens": (run.training.tokens for run in runs),
        "context_tokens": (run.training.sequence_tokens for run in runs),
        "epochs": (run.training.epochs for run in runs),
        "load_per_core": (run.timing.load_per_core for run in runs),
    }
    found = {name: _span(values) for name, values in spans.items()}
    lists: dict[str, Iterable[object | None]] = {
        "arms": (run.arm for run in runs),
        "hardware": (run.hardware for run in runs),
        "seeds": (run.seed for run in runs),
        "code_versions": (run.code_version for run in runs),
        "data_fingerprints": (run.data_fingerprint for run in runs),
    }
    found |= {name: _list(values) for name, values in lists.items()}
    return {name: text for name, text in found.items() if text}


def _span(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    return f"{low:,.4g}" if low == high else f"{low:,.4g} to {high:,.4g}"


def _list(values: Iterable[object | None]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))
