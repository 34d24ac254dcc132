"""What a machine can do, in figures: peaks, memory, links, latencies, price, failures.

Two kinds of figures stand side by side. What a data sheet or an invoice states is exact for the
machine it names. How much of it programs reach (fields that end in `_fraction`, and the seconds
that one more call takes) is a model's constant: one value a machine, never one a run.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.section import Section

Precision = Literal["fp32", "bf16", "fp16"]
Operation = Literal["all_reduce", "all_gather", "reduce_scatter"]

LOOK_UP = {
    "device": "the name of the device, as in nvidia-smi -L or lscpu",
    "kind": "cpu or cuda",
    "num_nodes": "hosts of the cluster",
    "devices_per_node": "GPUs of a host (nvidia-smi -L), or its cores (lscpu)",
    "peak_flops_per_second": "dense FLOPs per second by number format, in the vendor's data sheet; "
    "half of a figure that is for sparse matrices",
    "memory_bytes": "memory of one GPU (nvidia-smi), or of a whole host with CPUs (free -b)",
    "memory_bytes_per_second": "memory bandwidth of one device, in the vendor's data sheet",
    "cache_bytes": "size of the last cache, in the vendor's data sheet (lscpu on a CPU)",
    "product_fraction": "FLOPs of the best large matrix product over the peak, by a benchmark of "
    "matrix products",
    "attention_fraction": "FLOPs of fused causal attention over the peak, by a benchmark of it",
    "memory_fraction": "bandwidth of a large copy over that of the data sheet",
    "call_seconds": "time of the smallest matrix product, by a benchmark",
    "dispatch_seconds": "time in which the host issues one operation, by a profile",
    "recurrent_step_seconds": "time of one step of one small LSTM layer, by a benchmark",
    "intra_node": "the link between devices of one host, in the vendor's data sheet",
    "inter_node": "the network of one host, in its adapters' data sheet",
    "bytes_per_second": "bytes that leave one side of the link in a second, one direction",
    "latency_seconds": "time of the smallest message, by a benchmark such as nccl-tests",
    "amount": "the invoice, or the price list of the host",
    "currency": "the invoice",
}
"""Field to what it is and where to find it, for the message about one that is missing."""


class HardwareSection(Section):
    """A part of the hardware whose missing figures are named together, each with its source."""

    @model_validator(mode="before")
    @classmethod
    def _figures_are_there(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping):
            return fields
        missing = [
            f"{name} ({LOOK_UP[name]})"
            for name, field in cls.model_fields.items()
            if field.is_required() and name not in fields
        ]
        if missing:
            raise ValueError(
                f"figures are missing: {'; '.join(missing)}. None is guessed: look them up, or "
                "leave `hardware` out, without which nothing but `estimate` changes"
            )
        return fields


class Link(HardwareSection):
    """A link between devices or hosts."""

    bytes_per_second: float = Field(gt=0.0)
    """One direction; of one device inside a host, of all adapters of a host between hosts."""
    latency_seconds: float = Field(ge=0.0)
    """Of one hop of a ring."""
    fraction: float = Field(default=0.8, gt=0.0, le=1.0)
    """Share of the bandwidth that collectives reach; 0.8, because protocols take about a fifth.
    Source: NVIDIA/nccl-tests issue 212 (370 of 450 GB/s on H100)."""
    fraction_by_operation: dict[Operation, Annotated[float, Field(gt=0.0, le=1.0)]] = Field(
        default_factory=dict
    )
    """The same for one kind of collective, where it was measured and differs: gloo passes what it
    gathers through more copies than what it sums."""

    def fraction_of(self, operation: Operation) -> float:
        """Give the share that a collective reaches."""
        return self.fraction_by_operation.get(operation, self.fraction)


class Price(HardwareSection):
    """What an hour of one device costs."""

    amount: float = Field(gt=0.0)
    """For one device and one hour."""
    currency: str = Field(min_length=1)
    """Of the amount, as in USD."""


class Failures(Section):
    """How often a device fails, and what that takes."""

    mean_hours_between: float = Field(default=50_000.0, gt=0.0)
    """Hours of one device between failures that end a run. 50,000: 419 unexpected interruptions of
    16,384 GPUs in 54 days. Source: Llama team 2024, The Llama 3 Herd of Models, section 3.3.4."""
    restart_seconds: float = Field(default=300.0, ge=0.0)
    """From a failure to the first step of the next attempt: detection, placement, loading. Stated
    without a source: it is a matter of the cluster's scheduler."""


class HardwareConfig(HardwareSection):
    """One kind of device, how many there are, and the links between them."""

    device: str = Field(min_length=1)
    """Name for people."""
    kind: Literal["cpu", "cuda"]
    """What it is for torch. A CPU's device is one core, and the cores of a host share its memory's
    size."""
    num_nodes: int = Field(ge=1)
    """Hosts."""
    devices_per_node: int = Field(ge=1)
    """Devices of one host."""
    peak_flops_per_second: dict[Precision, Annotated[float, Field(gt=0.0)]]
    """Dense peak of one device by number format; what is missing cannot be estimated."""
    memory_bytes: float = Field(gt=0.0)
    """Memory of one GPU; with CPUs of the whole host, which ranks share."""
    memory_bytes_per_second: float = Field(gt=0.0)
    """Bandwidth of one device's memory; of one core with CPUs."""
    cache_bytes: float = Field(gt=0.0)
    """Last cache before the memory: a recurrence reads its matrix from it, step after step."""
    product_fraction: float = Field(gt=0.0, le=1.0)
    """Share of the peak that large matrix products reach."""
    attention_fraction: float = Field(gt=0.0, le=1.0)
    """Share of the peak that fused attention reaches."""
    memory_fraction: float = Field(gt=0.0, le=1.0)
    """Share of the bandwidth that operations between the products reach."""
    call_seconds: float = Field(ge=0.0)
    """What every product takes beside its work: start, ramp and tail. With it a product of F FLOPs
    reaches F / (F + rate x call_seconds) of the rate. Source of the form: Hockney 1983 (n_1/2)."""
    dispatch_seconds: float = Field(ge=0.0)
    """What the host takes to issue one operation; it hides behind the device's work, and bounds a
    device that has little. 0 for a CPU, where `call_seconds` holds it."""
    recurrent_step_seconds: float = Field(ge=0.0)
    """What each step of a recurrence takes at least: its product and its gates cannot start before
    the step before has ended."""
    recurrent_fraction: float | None = Field(default=None, gt=0.0, le=1.0)
    """Share of the peak that the products of recurrent steps reach, which are thin; None takes
    `product_fraction`."""
    update_bytes_per_second: float | None = Field(default=None, gt=0.0)
    """What the optimizer reaches, whose tensors are larger than those between the products; None
    takes the bandwidth times `memory_fraction`."""
    crowded_fraction: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of its speed that a device keeps while all devices of its host compute, which the cores
    of a CPU do on one memory and cache; 1 for GPUs, which have their own."""
    overlap_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the time of collectives in forward and backward passes that may hide behind
    products; 0 where ranks compute and send with the same cores."""
    intra_node: Link | None = None
    """Between devices of a host; needed with more than one."""
    inter_node: Link | None = None
    """Between hosts; needed with more than one."""
    storage_bytes_per_second: float | None = Field(default=None, gt=0.0)
    """What all hosts together write to the place of checkpoints; tokens are taken to be read as
    fast. None leaves both out."""
    price: Price | None = None
    """Of one device and hour; None leaves the cost out."""
    failures: Failures | None = None
    """How often devices fail; None leaves goodput at 1."""

    @model_validator(mode="after")
    def _links_are_there(self) -> Self:
        for is_needed, name in (
            (self.devices_per_node > 1, "intra_node"),
            (self.num_nodes > 1, "inter_node"),
        ):
            if is_needed and getattr(self, name) is None:
                raise ValueError(
                    f"figures are missing: {name} ({LOOK_UP[name]}), with its bytes_per_second and "
                    f"latency_seconds, because num_nodes={self.num_nodes} x "
                    f"devices_per_node={self.devices_per_node}"
                )
        return self

    @property
    def num_devices(self) -> int:
        """Devices of all hosts."""
        return self.num_nodes * self.devices_per_node

    def crowding(self, num_busy: int) -> float:
        """Give the share of its speed that a device keeps beside others of its host.

        Args:
            num_busy: Devices of the host that compute, this one included.
        """
        others = min(num_busy, self.devices_per_node) - 1
        return 1.0 - (1.0 - self.crowded_fraction) * others / max(1, self.devices_per_node - 1)

    def with_nodes(self, num_nodes: int) -> "HardwareConfig":
        """Give the same hosts in another number.

        Raises:
            ValidationError: More than one host, and no link between hosts is stated.
        """
        return HardwareConfig.model_validate(self.model_dump() | {"num_nodes": num_nodes})
