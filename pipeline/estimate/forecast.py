"""From a run and a cluster to what it will take: memory, speed, time, cost, goodput."""

import math
from dataclasses import dataclass

from pipeline.config.batching import BatchPlan, plan_batches
from pipeline.config.cluster import ClusterConfig
from pipeline.config.hardware import HardwareConfig, Precision
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.estimate.activations import MemoryComponent
from pipeline.estimate.chain import dependent_operations
from pipeline.estimate.failures import SECONDS_PER_HOUR, Goodput, predict_goodput
from pipeline.estimate.memory import memory_table, peak_bytes
from pipeline.estimate.step_time import StepTime, step_time

PUBLISHED_ERROR_FRACTION = 0.08
"""Median error of predicted tokens per second over published runs on GPUs that set no constant.
Source: docs/estimate.md, tested by tests/estimate/test_published.py."""

FOREIGN_ERROR_FRACTION = 0.30
"""The same over published runs of systems none of whose runs set a constant of the device."""

MEASURED_ERROR_FRACTION = 0.16
"""The same over runs of ours on the CPU of configs/cluster/cpu-2-cores.yaml. Source: the same."""

MEMORY_ERROR_FRACTION = 0.11
"""Most by which a rank's predicted memory was above the measured one. Source: docs/estimate.md."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The ranks of a run and the hardware that they are on."""

    hardware: HardwareConfig
    num_ranks: int
    threads_per_rank: int = 1
    """Cores of one rank; 1 with GPUs."""

    @property
    def ranks_per_node(self) -> int:
        """Ranks of a full host."""
        return max(1, self.hardware.devices_per_node // self.threads_per_rank)

    @property
    def memory_bytes(self) -> float:
        """Memory of one rank: its GPU's, or its share of the host's with CPUs."""
        if self.hardware.kind == "cuda":
            return self.hardware.memory_bytes
        crowded = math.ceil(self.num_ranks / self.hardware.num_nodes)
        return self.hardware.memory_bytes / max(min(self.num_ranks, self.ranks_per_node), crowded)

    @property
    def num_devices(self) -> int:
        """Devices in use, which are paid for."""
        return self.num_ranks * self.threads_per_rank

    def peak_flops_per_second(self, precision: Precision) -> float:
        """Peak of all devices in use.

        Raises:
            KeyError: None is stated for the number format; `step_time` has said so before.
        """
        return self.hardware.peak_flops_per_second[precision] * self.num_devices


def machines_of(cluster: ClusterConfig, num_ranks: int) -> Machines | None:
    """Give the ranks of a cluster on its hardware; None where it states none.

    Args:
        cluster: Hardware, and threads of a rank on CPUs.
        num_ranks: World size.
    """
    if cluster.hardware is None:
        return None
    threads = cluster.threads_per_worker if cluster.hardware.kind == "cpu" else 1
    return Machines(hardware=cluster.hardware, num_ranks=num_ranks, threads_per_rank=threads)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether a rank's memory suffices."""

    table: list[MemoryComponent]
    needed_bytes: float
    capacity_bytes: float

    @property
    def is_enough(self) -> bool:
        """Whether all of it fits."""
        return self.needed_bytes <= self.capacity_bytes


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run costs."""

    amount: float
    currency: str


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will take on its machines."""

    plan: BatchPlan
    fit: Fit
    step: StepTime
    dependent_operations: int
    """Products of one micro-batch that have to follow each other; exact."""
    flops_per_token: float
    """Training FLOPs of one token by the closed form; exact."""
    num_parameters: int
    mfu_fraction: float
    """Model FLOPs per second over the peak of all devices."""
    goodput: Goodput
    seconds: float
    """To the token budget, checkpoints and failures included; evaluation and start are not."""
    cost: Cost | None
    """None where the cluster states no price."""


def vocab_size_of(run: RunConfig) -> int:
    """Give the rows of the embedding table before anything is prepared.

    Raises:
        ConfigError: A tokenizer that is to be loaded leaves the size open.
    """
    if run.model.vocab_size is not None:
        return run.model.vocab_size
    if run.data.tokenizer.path is None:
        return run.data.tokenizer.vocab_size
    raise ConfigError(
        f"the vocabulary of {run.data.tokenizer.path} is not known before it is loaded; set "
        "model.vocab_size to its number of entries"
    )


def predict_fit(run: RunConfig, vocab_size: int, machines: Machines) -> Fit:
    """Compare what a rank needs with what it has.

    Args:
        run: The run.
        vocab_size: Rows V of the embedding table.
        machines: Ranks and hardware.
    """
    table = memory_table(run, vocab_size, machines.num_ranks, machines.hardware.kind)
    return Fit(
        table=table,
        needed_bytes=peak_bytes(table),
        capacity_bytes=machines.memory_bytes,
    )


def forecast(run: RunConfig, vocab_size: int, machines: Machines) -> Forecast:
    """Predict everything about a run.

    Args:
        run: The run.
        vocab_size: Rows V of the embedding table.
        machines: Ranks and hardware.

    Raises:
        ConfigError: The batch does not divide over the ranks, there are more ranks than devices, or
            a figure of the hardware is missing.
    """
    hardware, num_ranks = machines.hardware, machines.num_ranks
    check_devices(machines)
    plan = plan_batches(run.train, num_ranks)
    step = step_time(run, vocab_size, num_ranks, hardware, machines.threads_per_rank)
    count = run.model.num_parameters(vocab_size).total
    per_token = run.model.flops_per_token(vocab_size, run.train.sequence_tokens)
    goodput = predict_goodput(run, count, num_ranks, hardware, step.seconds)
    seconds = run.train.total_steps * step.seconds / goodput.fraction
    peak = machines.peak_flops_per_second(run.precision)
    return Forecast(
        plan=plan,
        fit=predict_fit(run, vocab_size, machines),
        step=step,
        dependent_operations=dependent_operations(run),
        flops_per_token=per_token,
        num_parameters=count,
        mfu_fraction=step.tokens_per_second * per_token / peak,
        goodput=goodput,
        seconds=seconds,
        cost=_cost(machines, seconds),
    )


def check_devices(machines: Machines) -> None:
    """Refuse more ranks than there are devices.

    Raises:
        ConfigError: Too many ranks or threads.
    """
    stated, wanted = machines.hardware.num_devices, machines.num_devices
    if wanted > stated:
        raise ConfigError(
            f"{machines.num_ranks} ranks of {machines.threads_per_rank} devices need {wanted}, but "
            f"hardware has num_nodes={machines.hardware.num_nodes} x devices_per_node="
            f"{machines.hardware.devices_per_node}={stated}; nearest: "
            f"{stated // machines.threads_per_rank} ranks"
        )


def _cost(machines: Machines, seconds: float) -> Cost | None:
    price = machines.hardware.price
    if price is None:
        return None
    hours = machines.num_devices * seconds / SECONDS_PER_HOUR
    return Cost(amount=hours * price.amount, currency=price.currency)
