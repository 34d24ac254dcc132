"""From the ranks of this machine to its curves: products, memory, attention, LSTM steps, links.

Rank 0 measures alone, then all ranks at the same time, as they train, so that what they share is
seen. Every record holds one point of a curve: its shape, the seconds of one call, and what moved or
was computed in it. `launch.machine_file` turns them into the figures of a cluster file.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from pipeline.config.schema import RunConfig
from pipeline.probes.context import ProbeContext
from pipeline.probes.params import MachineParams
from pipeline.training.distributed import RankContext, barrier, gather_json

PRODUCTS = (
    (8, 8, 8), (64, 64, 64), (256, 128, 512), (512, 256, 768), (1024, 256, 1024), (512, 512, 1536),
    (2048, 256, 4096), (256, 768, 2048), (1024, 512, 2048),
)  # fmt: skip
"""Rows, inner width and columns: what blocks and heads of small models have, and what takes no
time, for the start of a call."""
COPY_BYTES = 2**28
"""Larger than caches."""
VALUE_SHAPES = ((512, 256), (2048, 256), (1024, 512), (2048, 512))
"""Tokens and width of what stands between products."""
UPDATED_ELEMENTS = (2**20, 2**23)
ATTENTIONS = ((8, 4, 256, 64), (4, 8, 512, 64), (4, 4, 128, 32))
"""Samples, heads, tokens and width of a head; causal."""
RECURRENCES = ((1, 32, 128), (4, 128, 128), (8, 256, 128), (2, 256, 128), (4, 512, 64))
"""Samples, width and tokens of one LSTM layer."""
MESSAGES = (8, 2**14, 2**18, 2**22, 2**25)
"""Bytes of a collective's whole tensor."""
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")
LARGEST_REPEATS = 200


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a curve: a call that can be timed."""

    curve: str
    """products, copy, values, update, attention, recurrence, or a collective."""
    shape: tuple[int, ...]
    work: float
    """FLOPs of a call, or the bytes that it moves; what it is, the curve says."""
    call: Callable[[], Any]


def run(runs: Mapping[str, RunConfig], context: ProbeContext) -> list[dict[str, Any]]:
    """Measure the curves.

    Args:
        runs: None; the machine is measured, not a run.
        context: Rank group and arguments.

    Returns:
        Records of `curve`, `shape`, `work` and the median `seconds` of a call: of rank 0 alone, but
        of the slowest rank for collectives; with `num` calls and interquartile range `spread`.
        `crowded_seconds` is the slowest rank's while all of them make the call.
    """
    del runs
    params, ranks, records = context.parse_params(MachineParams), context.ranks, []
    said = ""
    for point in _points(ranks):
        if point.curve != said:
            said = point.curve
            context.on_event(f"measure {said}")
        budget = params.seconds_per_point
        if point.curve in COLLECTIVES:
            seconds, spread, num = _time_together(point, budget, ranks)
            crowded = seconds
        else:
            seconds, spread, num = _time_alone(point, budget, ranks)
            crowded = _time_together(point, budget, ranks)[0] if ranks.world_size > 1 else seconds
        records.append(
            {
                "curve": point.curve, "shape": list(point.shape), "work": point.work,
                "seconds": seconds, "num": num, "spread": spread, "crowded_seconds": crowded,
            }
        )  # fmt: skip
    return records


def _points(ranks: RankContext) -> Iterator[Point]:
    yield from map(_product, PRODUCTS)
    yield _copy()
    yield from map(_values, VALUE_SHAPES)
    yield from map(_update, UPDATED_ELEMENTS)
    yield from map(_attention, ATTENTIONS)
    yield from map(_recurrence, RECURRENCES)
    if ranks.world_size > 1:
        for num_bytes in MESSAGES:
            yield from _collectives(num_bytes, ranks)


def _time_alone(
    point: Point, budget_seconds: float, ranks: RankContext
) -> tuple[float, float, int]:
    """Time calls of rank 0 while the others wait; give median, interquartile range and number."""
    mine: list[float] = []
    if ranks.rank == 0:
        point.call()
        begin = time.perf_counter()
        point.call()
        mine = _calls(point, time.perf_counter() - begin, budget_seconds)
    taken = gather_json(mine, ranks)[0]
    low, middle, high = statistics.quantiles(taken, n=4, method="inclusive")
    return middle, high - low, len(taken)


def _time_together(
    point: Point, budget_seconds: float, ranks: RankContext
) -> tuple[float, float, int]:
    """Time calls of all ranks, which make equally many, as collectives need; give the slowest's."""
    point.call()
    barrier(ranks)
    begin = time.perf_counter()
    point.call()
    once = max(gather_json(time.perf_counter() - begin, ranks))
    barrier(ranks)
    taken = _calls(point, once, budget_seconds)
    low, middle, high = statistics.quantiles(taken, n=4, method="inclusive")
    seconds, spread = max(gather_json([middle, high - low], ranks))
    return seconds, spread, len(taken)


def _calls(point: Point, once_seconds: float, budget_seconds: float) -> list[float]:
    """Time calls, as many as the budget holds, short ones several at a time."""
    # Or the clock would be what is measured.
    together = max(1, round(1e-4 / max(once_seconds, 1e-7)))
    fitting = budget_seconds / max(once_seconds * together, 1e-7)
    taken = []
    for _ in range(min(LARGEST_REPEATS, max(5, round(fitting)))):
        begin = time.perf_counter()
        for _ in range(together):
            point.call()
        taken.append((time.perf_counter() - begin) / together)
    return taken


def _product(shape: tuple[int, int, int]) -> Point:
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    work = 2.0 * rows * inner * columns
    return Point(curve="products", shape=shape, work=work, call=lambda: a @ b)


def _copy() -> Point:
    """A large copy, read and written."""
    source, target = torch.ones(COPY_BYTES // 4), torch.empty(COPY_BYTES // 4)
    return Point(
        curve="copy", shape=(COPY_BYTES,), work=2.0 * COPY_BYTES, call=lambda: target.copy_(source)
    )


def _values(shape: tuple[int, int]) -> Point:
    """A norm, a gated activation and a residual sum, both passes; `work` is what they keep."""
    tokens, width = shape
    x, gate = (torch.randn(tokens, width, requires_grad=True) for _ in range(2))
    norm = nn.RMSNorm(width, eps=1e-5)
    gradient = torch.ones(tokens, width)

    def call() -> None:
        # Not `backward`, which would add to the gradients of the call before.
        torch.autograd.grad(x + F.silu(gate) * norm(x), [x, gate, norm.weight], gradient)

    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = x + F.silu(gate) * norm(x)
    del result
    return Point(curve="values", shape=shape, work=float(sum(kept.values())), call=call)


def _update(num_elements: int) -> Point:
    """The update of one matrix by AdamW; `work` is its parameters."""
    parameter = nn.Parameter(torch.randn(num_elements))
    parameter.grad = torch.randn(num_elements)
    optimizer = torch.optim.AdamW([parameter], lr=1e-4)
    return Point(
        curve="update", shape=(num_elements,), work=float(num_elements), call=optimizer.step
    )


def _attention(shape: tuple[int, int, int, int]) -> Point:
    """Causal attention, both passes; `work` is what a mask leaves, scores computed again."""
    samples, heads, tokens, width = shape
    q, k, v = (torch.randn(*shape, requires_grad=True) for _ in range(3))
    gradient = torch.ones(*shape)

    def call() -> None:
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(attended, [q, k, v], gradient)

    # Two products forward and five backward, of half of the pairs and the diagonal.
    pairs = tokens * (tokens + 1) / 2
    work = 7 * 2.0 * samples * heads * pairs * width
    return Point(curve="attention", shape=shape, work=work, call=call)


def _recurrence(shape: tuple[int, int, int]) -> Point:
    """One LSTM layer, both passes; `work` is the FLOPs of its steps."""
    samples, width, tokens = shape
    layer = nn.LSTM(width, width, batch_first=True)
    x = torch.randn(samples, tokens, width, requires_grad=True)
    gradient = torch.ones(samples, tokens, width)

    def call() -> None:
        torch.autograd.grad(layer(x)[0], [x, *layer.parameters()], gradient)

    work = 2 * 2.0 * samples * width * 4 * width * tokens
    return Point(curve="recurrence", shape=shape, work=work, call=call)


def _collectives(num_bytes: int, ranks: RankContext) -> Iterator[Point]:
    size = ranks.world_size
    whole = torch.zeros(max(num_bytes // 4, size))
    part = torch.zeros(whole.numel() // size)
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
    }
    for curve, call in calls.items():
        work = 4.0 * whole.numel()
        yield Point(curve=curve, shape=(4 * whole.numel(), size), work=work, call=call)
