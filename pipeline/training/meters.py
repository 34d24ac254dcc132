"""From the timings of single steps to throughput, their spread, and where the wall time went."""

import os
import statistics
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import psutil

from pipeline.training.distributed import RankContext

WARMUP_STEPS = 3
"""First steps of an attempt that no median counts: ZeRO 3 records its order of gathers in the
first, the optimizer's state comes into being, and allocators and caches fill."""

EXCESS_STEPS = 10
"""Steps after the first whose median says what the first would have taken without its start-up;
few, so that the account need not look at all steps each time."""


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """Seconds of one optimizer step on this rank, and its tokens over all ranks."""

    step_seconds: float
    """From before the loader to after the update and the ranks' agreement."""
    data_wait_seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    slowest_rank_ratio: float
    """Largest over mean time of the ranks in loader and forward passes, where none waits for
    another but under ZeRO 3."""
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A median with its number of measurements and interquartile range."""

    value: float
    num: int
    spread: float | None


def median_and_spread(values: Sequence[float]) -> Spread:
    """Summarise measurements; the interquartile range of a single one is absent."""
    if len(values) < 2:
        return Spread(value=values[0], num=1, spread=None)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(value=middle, num=len(values), spread=high - low)


class StepMeter:
    """Keeps the timings of the steps of one attempt."""

    def __init__(self, world_size: int, flops_per_token: float, peak_flops: float | None) -> None:
        """Start without steps.

        Args:
            world_size: Number of ranks.
            flops_per_token: Training FLOPs of one token, by the closed form.
            peak_flops: FLOPs per second that one rank's device can do; None where unknown.
        """
        self._world_size = world_size
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        # Eight bytes a number: the medians of a long run need every step.
        self._columns = {field.name: array("d") for field in fields(StepTiming)}
        self._traced: set[int] = set()
        self._logged = 0
        self._skipped_seconds = 0.0
        self._lost_seconds = 0.0

    def add(self, timing: StepTiming, *, is_traced: bool = False, is_applied: bool = True) -> None:
        """Keep the timing of a step.

        Args:
            timing: What it took.
            is_traced: A profiler slowed it down, so that no median counts it; totals do.
            is_applied: Whether the step changed the weights.
        """
        if is_traced:
            self._traced.add(self.num_steps)
        if not is_applied:
            self._skipped_seconds += timing.step_seconds - timing.data_wait_seconds
        for name, value in asdict(timing).items():
            self._columns[name].append(value)

    @property
    def num_steps(self) -> int:
        """Steps of this attempt, warm-up included."""
        return len(self._columns["step_seconds"])

    def window(self) -> dict[str, float]:
        """Give the medians of the steps since the last call, for a training event.

        Empty where a profiler slowed down all of them.

        The first window starts after the warm-up, unless it holds nothing else.
        """
        first, self._logged = self._logged, self.num_steps
        if self.num_steps > WARMUP_STEPS:
            first = max(first, WARMUP_STEPS)
        return {name: spread.value for name, spread in self._summarise(first).items()}

    def summary(self) -> dict[str, Spread]:
        """Give the medians over all steps after the warm-up; empty when there are none."""
        return self._summarise(WARMUP_STEPS)

    def total_seconds(self, field: str) -> float:
        """Sum one field over all steps of the attempt, warm-up included."""
        return sum(self._columns[field])

    def lose(self, seconds: float) -> None:
        """Count this much of the steps' time as lost: a rewind has undone what it was spent on."""
        self._lost_seconds += seconds

    def spent(self) -> dict[str, float]:
        """Split the seconds of all steps of the attempt by what they went into.

        Returns:
            `train` for steps that the run keeps, `first_step` for what the first took more than
            those after it, `data_wait`, `skipped` and `lost`.
        """
        wait = self.total_seconds("data_wait_seconds")
        spent = {
            "data_wait": wait,
            "first_step": self._first_excess_seconds(),
            "skipped": self._skipped_seconds,
            "lost": self._lost_seconds,
        }
        train = self.total_seconds("step_seconds") - sum(spent.values())
        return {"train": train, **spent}

    def _first_excess_seconds(self) -> float:
        steps, waits = (
            self._columns[name][: EXCESS_STEPS + 1]
            for name in ("step_seconds", "data_wait_seconds")
        )
        busy = [step - wait for step, wait in zip(steps, waits, strict=True)]
        return max(0.0, busy[0] - statistics.median(busy[1:])) if len(busy) > 1 else 0.0

    def _summarise(self, first: int) -> dict[str, Spread]:
        """Give the medians over the steps of the attempt from `first` on, counted from 0."""
        counted = [step for step in range(first, self.num_steps) if step not in self._traced]
        if not counted:
            return {}
        measured = {name: [column[i] for i in counted] for name, column in self._columns.items()}
        num_tokens = measured.pop("num_tokens")
        rates = [n / s for n, s in zip(num_tokens, measured["step_seconds"], strict=True)]
        columns: dict[str, Sequence[float]] = {
            "perf/tokens_per_second": rates,
            "perf/tokens_per_second_per_worker": [rate / self._world_size for rate in rates],
            **{f"perf/{name}": column for name, column in measured.items()},
        }
        if self._peak_flops is not None:
            peak = self._peak_flops * self._world_size
            columns["perf/mfu_fraction"] = [rate * self._flops_per_token / peak for rate in rates]
        return {name: median_and_spread(values) for name, values in columns.items()}


class WallClock:
    """Adds up the wall time of an attempt by what it went into."""

    def __init__(self) -> None:
        """Start the attempt now."""
        self._begin = time.perf_counter()
        self._phases: dict[str, float] = {}

    def include_process_start(self, ranks: RankContext) -> None:
        """Begin the attempt with the process, where a launcher started it for this run alone.

        Loading torch and DeepSpeed takes seconds. A Ray worker, which brings its process group, and
        a process that trains by itself may have done something else before.
        """
        if ranks.owns_group and "RANK" in os.environ:
            self._begin -= max(0.0, process_age_seconds() - self.seconds)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's wall time as `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            self._phases[name] = self._phases.get(name, 0.0) + spent

    def mark_start(self) -> None:
        """Count the wall time so far, but for the phases in it, as `init`."""
        self._phases["init"] = self.seconds - sum(self._phases.values())

    @property
    def seconds(self) -> float:
        """Wall time of the attempt so far."""
        return time.perf_counter() - self._begin

    def spent(self) -> dict[str, float]:
        """Give the seconds of each phase, `other` for the rest, and `wall`, their sum."""
        wall = self.seconds
        other = wall - sum(self._phases.values())
        return {**self._phases, "other": max(0.0, other), "wall": wall}


def process_age_seconds() -> float:
    """Give how long this process has run, by the clock that nobody sets."""
    # The name in brackets may hold spaces; the 22nd field of all is the 20th after it.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class HostMonitor:
    """Measures the host that this process runs on."""

    def __init__(self) -> None:
        """Start the interval of the first measurement."""
        psutil.cpu_percent(interval=None)

    def values(self) -> dict[str, float]:
        """Give processor load since the last call, and memory, of the whole host."""
        memory = psutil.virtual_memory()
        return {
            "system/cpu_fraction": psutil.cpu_percent(interval=None) / 100.0,
            "system/memory_available_bytes": float(memory.available),
            "memory_used_bytes": float(memory.used),
            "load_average": psutil.getloadavg()[0],
        }
