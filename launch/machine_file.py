"""From the measured curves of a machine to a cluster file that states its hardware."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError

Record = Mapping[str, Any]
"""One point of a curve: `curve`, `shape`, `work`, `seconds` of a call, and `crowded_seconds` of it
while all ranks make it."""

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter")
LARGE_MESSAGE_BYTES = 2**18
"""From here on bandwidth and not latency takes the time of a collective."""
FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Host:
    """What is not measured but read off the machine."""

    device: str
    memory_bytes: int
    cache_bytes: int
    num_ranks: int
    threads_per_rank: int


@dataclass(frozen=True, kw_only=True)
class Line:
    """Time of a call as a start and a rate: seconds = start + work / rate."""

    start_seconds: float
    rate: float

    def seconds(self, work: float) -> float:
        """Give the time of a call."""
        return self.start_seconds + work / self.rate


def cluster_tree(records: Sequence[Record], host: Host) -> dict[str, Any]:
    """Give a cluster config as plain values.

    Args:
        records: Of the probe `machine`.
        host: The machine.

    Raises:
        ConfigError: A curve is not among the records.
    """
    curves: dict[str, list[Record]] = {}
    for record in records:
        curves.setdefault(record["curve"], []).append(record)
    needed = ["products", "copy", "values", "update", "attention", "recurrence"]
    needed += OPERATIONS if host.num_ranks > 1 else ()
    if missing := [name for name in needed if name not in curves]:
        raise ConfigError(f"the measurement lacks the curves {', '.join(missing)}; measure again")
    hardware = _hardware(curves, host)
    return {
        "num_workers": host.num_ranks,
        "threads_per_worker": host.threads_per_rank,
        "hardware": hardware,
    }


def _hardware(curves: Mapping[str, Sequence[Record]], host: Host) -> dict[str, Any]:
    from pipeline.estimate.step_time import UPDATE_BYTES, VALUE_PASSES

    products = fit_line(curves["products"])
    peak = max(products.rate, *(_rate(record) for record in curves["products"]))
    values = VALUE_PASSES["fp32"] * _median_rate(curves["values"])
    copied = _median_rate(curves["copy"])
    recurrence = fit_recurrence(curves["recurrence"], products, values)
    threads = host.threads_per_rank
    tree: dict[str, Any] = {
        "device": host.device,
        "kind": "cpu",
        "num_nodes": 1,
        "devices_per_node": host.num_ranks * threads,
        "peak_flops_per_second": {"fp32": peak / threads},
        "memory_bytes": host.memory_bytes,
        "memory_bytes_per_second": max(copied, values) / threads,
        "cache_bytes": host.cache_bytes,
        "product_fraction": products.rate / peak,
        "attention_fraction": min(1.0, _median_rate(curves["attention"]) / peak),
        "memory_fraction": values / max(copied, values),
        "call_seconds": products.start_seconds,
        "dispatch_seconds": 0.0,
        "recurrent_step_seconds": recurrence.start_seconds,
        "recurrent_fraction": min(1.0, recurrence.rate / peak),
        "update_bytes_per_second": UPDATE_BYTES["cpu"] * _median_rate(curves["update"]) / threads,
    }
    if host.num_ranks > 1:
        tree["crowded_fraction"] = crowded_fraction(curves)
        tree["intra_node"] = fit_link(curves, host.num_ranks)
    rounded: dict[str, Any] = _rounded(tree)
    return rounded


def crowded_fraction(curves: Mapping[str, Sequence[Record]]) -> float:
    """Give the share of its speed that a rank keeps beside the others, at the median of points.

    A large copy is left out: nothing in a step is as bound by memory as it is.
    """
    kept = [
        record["seconds"] / record["crowded_seconds"]
        for name, records in curves.items()
        if name not in (*OPERATIONS, "copy")
        for record in records
    ]
    return float(min(1.0, statistics.median(kept)))


def fit_line(records: Sequence[Record]) -> Line:
    """Fit start and rate to points by least squares of the relative errors.

    Args:
        records: Points of one curve, at least two of different work.
    """
    # Each point asks start / seconds + (work / seconds) / rate to be 1.
    rows = [(1.0 / r["seconds"], r["work"] / r["seconds"]) for r in records]
    aa = sum(a * a for a, _ in rows)
    ab = sum(a * b for a, b in rows)
    bb = sum(b * b for _, b in rows)
    at, bt = sum(a for a, _ in rows), sum(b for _, b in rows)
    determinant = aa * bb - ab * ab
    start = (bb * at - ab * bt) / determinant if determinant > 0 else 0.0
    if start <= 0:
        return Line(start_seconds=0.0, rate=bb / bt)
    return Line(start_seconds=start, rate=determinant / (aa * bt - ab * at))


def fit_recurrence(records: Sequence[Record], products: Line, value_rate: float) -> Line:
    """Give the least time of a recurrent step, and the rate of its product.

    Args:
        records: Both passes of LSTM layers `(samples, width, tokens)`; the first is so small that
            its steps take the least time.
        products: What the layer's other products take.
        value_rate: Bytes a second of what stands between products.
    """
    from pipeline.config.lstm_activations import LAYER_VALUES
    from pipeline.estimate.step_time import VALUE_PASSES

    first, *rest = records
    least = first["seconds"] / (2 * first["shape"][2])
    inverse = []
    for record in rest:
        samples, width, tokens = record["shape"]
        rows = samples * tokens
        # Inputs forward, their gradient, and the gradients of both matrices.
        others = 4 * products.seconds(2.0 * rows * width * 4 * width)
        kept = LAYER_VALUES["lstm"] * width * rows * FLOAT_BYTES
        between = VALUE_PASSES["fp32"] * kept / value_rate
        steps = record["seconds"] - others - between - 2 * tokens * least
        inverse.append(max(steps, 0.0) / record["work"])
    slowest = statistics.median(inverse)
    rate = min(products.rate, 1.0 / slowest) if slowest > 0 else products.rate
    return Line(start_seconds=least, rate=rate)


def fit_link(curves: Mapping[str, Sequence[Record]], num_ranks: int) -> dict[str, Any]:
    """Give latency of a hop and bandwidth of a ring, with each operation's share of the best.

    Args:
        curves: Points of the three collectives.
        num_ranks: Ranks of the ring.
    """
    hops = num_ranks - 1
    rounds = {name: 2 if name == "all_reduce" else 1 for name in OPERATIONS}
    smallest = {name: min(curves[name], key=lambda r: r["work"]) for name in OPERATIONS}
    latency = statistics.median(
        smallest[name]["seconds"] / (rounds[name] * hops) for name in OPERATIONS
    )
    reached = {}
    for name in OPERATIONS:
        large = [r for r in curves[name] if r["work"] >= LARGE_MESSAGE_BYTES]
        reached[name] = statistics.median(
            rounds[name] * hops / num_ranks * r["work"]
            / max(r["seconds"] - rounds[name] * hops * latency, 0.1 * r["seconds"])
            for r in large
        )  # fmt: skip
    best = max(reached.values())
    return {
        "bytes_per_second": best,
        "latency_seconds": latency,
        "fraction": 1.0,
        "fraction_by_operation": {name: value / best for name, value in reached.items()},
    }


def file_text(tree: Mapping[str, Any], origin: str) -> str:
    """Give the text of a cluster file.

    Args:
        tree: From `cluster_tree`.
        origin: What was measured, for the first line.
    """
    import yaml

    return f"# {origin}\n{yaml.safe_dump(dict(tree), sort_keys=False)}"


def _rate(record: Record) -> float:
    return float(record["work"] / record["seconds"])


def _median_rate(records: Sequence[Record]) -> float:
    return statistics.median(map(_rate, records))


def _rounded(tree: Any) -> Any:
    """Keep three digits: a curve is not known better."""
    if isinstance(tree, dict):
        return {name: _rounded(value) for name, value in tree.items()}
    return float(f"{tree:.3g}") if isinstance(tree, float) else tree
