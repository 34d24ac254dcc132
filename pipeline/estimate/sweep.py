"""From runs and a range of hosts to their weak and strong scaling, and where a recurrence bites."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from pipeline.config.batching import plan_batches
from pipeline.config.hardware import HardwareConfig
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.estimate.forecast import Machines, predict_fit
from pipeline.estimate.search import layout_of, samples_per_rank, with_layout
from pipeline.estimate.step_time import StepTime, step_time

Scaling = Literal["weak", "strong"]
"""weak: each rank keeps its batch; strong: the global batch stays and is cut finer."""

CHAIN_BITES_FRACTION = 0.5
"""Share of a step in the latency of one micro-batch's recurrence from which the chain is said to
bite: more devices then speed up less than half of it."""


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One run at one number of hosts."""

    label: str
    scaling: Scaling
    num_nodes: int
    num_ranks: int
    micro_batch_samples: int
    accumulation_steps: int
    step: StepTime
    fits: bool
    efficiency_fraction: float
    """Tokens per second of a rank over those at the fewest hosts."""

    @property
    def chain_fraction(self) -> float:
        """Share of the step that is the latency of recurrent steps."""
        return self.step.recurrence_floor / self.step.seconds

    @property
    def least_seconds(self) -> float:
        """Latency of one micro-batch's recurrent steps, which every step takes at least."""
        return self.step.recurrence_floor / self.accumulation_steps

    @property
    def exposed_fraction(self) -> float:
        """Share of the step in collectives that nothing hides."""
        return self.step.exposed / self.step.seconds


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A point that cannot be run, and why."""

    label: str
    scaling: Scaling
    num_nodes: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All points, and those that cannot be."""

    points: list[SweepPoint]
    gaps: list[Gap]

    def of(self, label: str, scaling: Scaling) -> list[SweepPoint]:
        """Give one line of the picture."""
        return [p for p in self.points if p.label == label and p.scaling == scaling]

    def bites_at(self, label: str) -> SweepPoint | None:
        """Give the first point of strong scaling at which the chain bites."""
        for point in self.of(label, "strong"):
            if point.least_seconds > CHAIN_BITES_FRACTION * point.step.seconds:
                return point
        return None


def parse_range(text: str) -> list[int]:
    """Read `nodes=1..128` (powers of two from the first, and the last) or `nodes=1,3,6`.

    Raises:
        ConfigError: It is neither.
    """
    found = re.fullmatch(r"nodes=(?:(\d+)\.\.(\d+)|(\d+(?:,\d+)*))", text)
    if found is None:
        raise ConfigError(f"--sweep {text!r} is neither nodes=FIRST..LAST nor nodes=1,2,4")
    if found[3] is not None:
        counts = sorted({int(part) for part in found[3].split(",")})
        first, last = counts[0], counts[-1]
    else:
        first, last = int(found[1]), int(found[2])
        doubled = (first * 2**power for power in range(last.bit_length()))
        counts = [*(count for count in doubled if count < last), last]
    if not 1 <= first <= last:
        raise ConfigError(f"--sweep {text!r}: hosts rise from at least 1; nearest: nodes=1..8")
    return counts


def sweep(
    runs: Mapping[str, RunConfig],
    vocab_sizes: Mapping[str, int],
    hardware: HardwareConfig,
    node_counts: Sequence[int],
    threads_per_rank: int = 1,
) -> Sweep:
    """Predict each run at each number of hosts, all of whose devices are used.

    Args:
        runs: Label to run. For weak scaling its global batch is that of the fewest hosts.
        vocab_sizes: Label to the rows V of the run's embedding table.
        hardware: One host and the links.
        node_counts: Numbers of hosts, rising.
        threads_per_rank: Cores of one rank; 1 with GPUs.
    """
    points: list[SweepPoint] = []
    gaps: list[Gap] = []
    scalings: tuple[Scaling, ...] = ("weak", "strong")
    for label, run in runs.items():
        for scaling in scalings:
            line = Line(label=label, run=run, vocab_size=vocab_sizes[label], scaling=scaling)
            for found in _predict_line(line, hardware, node_counts, threads_per_rank):
                if isinstance(found, Gap):
                    gaps.append(found)
                else:
                    points.append(found)
    return Sweep(points=points, gaps=gaps)


@dataclass(frozen=True, kw_only=True)
class Line:
    """What one line of the picture shows."""

    label: str
    run: RunConfig
    vocab_size: int
    scaling: Scaling


def _predict_line(
    line: Line, hardware: HardwareConfig, node_counts: Sequence[int], threads_per_rank: int
) -> Iterator[SweepPoint | Gap]:
    first_rate: float | None = None
    for count in node_counts:
        machines = _machines(hardware, count, threads_per_rank)
        growth = Fraction(count, node_counts[0] if line.scaling == "weak" else count)
        try:
            run = _cut(line.run, machines.num_ranks, growth)
        except ConfigError as exc:
            yield Gap(label=line.label, scaling=line.scaling, num_nodes=count, reason=str(exc))
            continue
        step = step_time(
            run, line.vocab_size, machines.num_ranks, machines.hardware, threads_per_rank
        )
        rate = step.tokens_per_second / machines.num_ranks
        first_rate = first_rate or rate
        yield SweepPoint(
            label=line.label,
            scaling=line.scaling,
            num_nodes=count,
            num_ranks=machines.num_ranks,
            micro_batch_samples=run.train.micro_batch_samples,
            accumulation_steps=plan_batches(run.train, machines.num_ranks).accumulation_steps,
            step=step,
            fits=predict_fit(run, line.vocab_size, machines).is_enough,
            efficiency_fraction=rate / first_rate,
        )


def _machines(hardware: HardwareConfig, num_nodes: int, threads_per_rank: int) -> Machines:
    """Give all ranks of a number of hosts."""
    if num_nodes > 1 and hardware.inter_node is None:
        raise ConfigError(
            f"hardware.inter_node is missing, and {num_nodes} hosts send over it; state its "
            "bytes_per_second (all adapters of a host, one direction, data sheet) and "
            "latency_seconds (a benchmark such as nccl-tests)"
        )
    machines = hardware.with_nodes(num_nodes)
    return Machines(
        hardware=machines,
        num_ranks=max(1, machines.num_devices // threads_per_rank),
        threads_per_rank=threads_per_rank,
    )


def _cut(run: RunConfig, num_ranks: int, growth: Fraction) -> RunConfig:
    """Give the run with a global batch that grew, in micro-batches no larger than its own.

    Raises:
        ConfigError: The batch does not divide over the ranks.
    """
    tokens = run.train.global_batch_tokens * growth
    sample = run.train.sequence_tokens
    if tokens.denominator > 1 or int(tokens) % sample:
        raise ConfigError(f"{float(tokens):g} tokens are no whole number of samples of {sample}")
    grown = run.model_copy(
        update={"train": run.train.model_copy(update={"global_batch_tokens": int(tokens)})}
    )
    samples = samples_per_rank(grown, num_ranks)
    most = min(samples, run.train.micro_batch_samples)
    micro = next(size for size in range(most, 0, -1) if samples % size == 0)
    layout = replace(layout_of(grown), micro_batch_samples=micro)
    return with_layout(grown, layout)
