"""From a run, a world size and the hardware to the seconds of one optimizer step, by their parts.

Products and collectives are counted; how long they take is modelled. Every constant stands here,
in `roofline`, in `network` or in the cluster file, with its unit and its source.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.batching import BatchPlan, plan_batches
from pipeline.config.hardware import HardwareConfig
from pipeline.config.schema import RunConfig
from pipeline.estimate.collectives import Collective, When, collectives
from pipeline.estimate.network import lay_out, total_seconds
from pipeline.estimate.products import attends_plainly, matrix_products
from pipeline.estimate.roofline import Rates, compute_seconds, rates_of

VALUE_PASSES = {"fp32": 3.25, "bf16": 6.0, "fp16": 6.0}
"""Times that each activation kept for backward crosses the memory outside of products, as values
and as gradients. Counted from the operations of both passes, each run on its own: 54 values of
width d for the 18 d that a GELU block keeps. 16-bit formats take more, because norms, rotations and
sums run in float32, twice as wide, between casts: from 3.25 where kernels hold those casts, to 8 in
an eager Llama block that does not."""

COMPILED_SHARE = 0.5
"""Part of `VALUE_PASSES` that is left where `torch.compile` fuses what stands between two products,
so that values are written once and read once, as their gradients are."""

RECOMPUTED_SHARE = 0.4
"""Part of `VALUE_PASSES` of a forward pass, which checkpointed blocks take again: 22 of 54."""

LOGIT_BYTES = 24
"""Bytes that the loss moves for one logit outside of the head's products: float32 copy, maximum,
sum, softmax and gradient. Counted from `pipeline/models/loss.py`."""

OPERATIONS_PER_PRODUCT = 5
"""Operations that the host issues for each product, its own included: norms, activations, sums,
casts, and their gradients. Counted on a block of each family."""

BACKWARD_SHARE = 2 / 3
"""Of both passes: two products for each one of forward. Source: Kaplan et al. 2020, section 2.1."""

STAGE_UPDATES = {"cuda": (1.0, 1.0, 1.0, 1.0), "cpu": (1.0, 1.6, 1.6, 2.3)}
"""How much longer the update of a parameter takes at each ZeRO stage, which flattens gradients and
copies masters to working weights. On a CPU measured on Transformers and LSTMs of 4.2 M to 5.5 M
parameters on one rank: 33, 55, 50 and 76 ms; on CUDA not measured."""

UPDATE_BYTES = {"cuda": 40, "cpu": 100}
"""Bytes that AdamW moves for one parameter of the rank's share: fused, 16 read and 12 written, a
copy for the forward pass, and the gradient twice for norm and clipping; on a CPU the same as a
dozen separate operations. Counted from `torch.optim.AdamW`."""

TOKEN_BYTES = 4
"""Of one token in a shard, at most."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What the software does with products and collectives."""

    fused_attention: bool
    skips_masked: bool
    """Whether fused attention leaves out pairs that a mask removes: ours does for causal order
    alone, and computes all pairs where a window, documents or ALiBi need a mask as a tensor."""
    compiled: bool
    overlap_fraction: float
    """Share of the collectives in forward and backward passes that may hide behind computing."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step of one rank, all modelled, and what they rest on."""

    products: float
    attention: float
    recurrence: float
    """Steps of recurrences."""
    recurrence_floor: float
    """The part of `recurrence` that is latency: no more devices, no smaller batch take it away."""
    between: float
    """Norms, activations and sums between the products, and the loss: bound by memory."""
    dispatch: float
    """What the host needs beyond the device's work to issue operations."""
    update: float
    """The optimizer."""
    communication: float
    """All collectives, hidden ones included."""
    exposed: float
    """The part of `communication` that computing does not hide."""
    data_wait: float
    """Reading tokens from storage that is stated; 0 else."""
    tokens: int
    """Tokens of the global batch."""

    @property
    def compute(self) -> float:
        """Forward and backward passes."""
        return self.products + self.attention + self.recurrence + self.between + self.dispatch

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.compute + self.update + self.exposed + self.data_wait

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.tokens / self.seconds


def execution_of(run: RunConfig, hardware: HardwareConfig) -> Execution:
    """Give what our engine does; plain attention is for bf16 on a CPU, and additive everywhere."""
    is_plain = attends_plainly(run, hardware.kind)
    is_plain |= getattr(run.model, "attention", "scaled_dot") == "additive"
    return Execution(
        fused_attention=not is_plain,
        skips_masked=not has_explicit_mask(run),
        compiled=run.train.compile,
        overlap_fraction=hardware.overlap_fraction,
    )


def has_explicit_mask(run: RunConfig) -> bool:
    """Tell whether attention is given its mask as a tensor, so that no kernel skips any pair."""
    window = run.model.window_tokens
    return (
        getattr(run.model, "positions", None) == "alibi"
        or run.train.documents.mask_attention
        or (window is not None and window < run.train.sequence_tokens)
    )


def step_time(
    run: RunConfig,
    vocab_size: int,
    num_ranks: int,
    hardware: HardwareConfig,
    threads_per_rank: int = 1,
    execution: Execution | None = None,
) -> StepTime:
    """Predict one optimizer step.

    Args:
        run: Model, batch, ZeRO stage and precision.
        vocab_size: Rows V of the embedding table.
        num_ranks: World size.
        hardware: Figures of the machines.
        threads_per_rank: Cores of one rank; 1 with GPUs.
        execution: What the software does; None takes ours.

    Raises:
        ConfigError: The batch does not divide over the ranks, or a figure is missing.
    """
    execution = execution or execution_of(run, hardware)
    plan = plan_batches(run.train, num_ranks)
    rates = rates_of(hardware, run.precision, threads_per_rank)
    products = matrix_products(run, vocab_size, plan.micro_batch_samples, hardware.kind)
    computed = compute_seconds(
        products, rates, fused_attention=execution.fused_attention,
        skips_masked=execution.skips_masked,
    )  # fmt: skip
    between = between_seconds(run, vocab_size, rates, execution)
    busy = computed.products + computed.attention + computed.recurrence + between
    issued = computed.num_calls * OPERATIONS_PER_PRODUCT * hardware.dispatch_seconds
    ranks_per_node = max(1, hardware.devices_per_node // threads_per_rank)
    # A rank's own threads are in its rates already: those were measured with all of them.
    num_beside = min(num_ranks, ranks_per_node)
    kept_speed = hardware.crowding(num_beside * threads_per_rank if num_beside > 1 else 1)
    times = plan.accumulation_steps / kept_speed
    sent = sent_seconds(collectives(run, vocab_size, num_ranks), hardware, ranks_per_node)
    pass_seconds = max(busy, issued) * times
    hidden = execution.overlap_fraction * hidden_seconds(
        run.zero.stage, sent, pass_seconds, plan.accumulation_steps
    )
    return StepTime(
        products=computed.products * times,
        attention=computed.attention * times,
        recurrence=computed.recurrence * times,
        recurrence_floor=computed.recurrence_floor * times,
        between=between * times,
        dispatch=max(0.0, issued - busy) * times,
        update=update_seconds(run, vocab_size, num_ranks, hardware, threads_per_rank) / kept_speed,
        communication=sum(sent.values()),
        exposed=sum(sent.values()) - hidden,
        data_wait=data_seconds(plan, hardware),
        tokens=plan.global_batch_tokens,
    )


def hidden_seconds(
    stage: int, sent: Mapping[When, float], pass_seconds: float, num_micro_batches: int
) -> float:
    """Give the seconds of collectives that have computing beside them.

    Stage 0 sums gradients after the last backward pass, stage 1 in the course of it, stages 2 and 3
    in every one; what stage 3 gathers it gathers ahead.

    Args:
        stage: ZeRO stage.
        sent: Seconds of a step's collectives by part.
        pass_seconds: Computing of all micro-batches.
        num_micro_batches: Of one step.

    Source: DeepSpeed 0.19, runtime/engine.py, allreduce_gradients and stage_1_and_2.py,
    reduce_ready_partitions_and_remove_grads.
    """
    if stage == 0:
        return 0.0
    if stage == 1:
        last = BACKWARD_SHARE * pass_seconds / num_micro_batches
        return min(sent.get("backward", 0.0), last)
    return min(sent.get("forward", 0.0) + sent.get("backward", 0.0), pass_seconds)


def between_seconds(run: RunConfig, vocab_size: int, rates: Rates, execution: Execution) -> float:
    """Give the seconds of one micro-batch outside of products, bound by memory.

    Args:
        run: Model and micro-batch.
        vocab_size: Rows V of the embedding table.
        rates: Of the device.
        execution: Whether operations are fused.
    """
    samples, length = run.train.micro_batch_samples, run.train.sequence_tokens
    kept = run.model.activation_bytes(samples, length, vocab_size, rates.bytes_per_value)
    passes = VALUE_PASSES[run.precision] * (COMPILED_SHARE if execution.compiled else 1.0)
    if run.train.activation_checkpointing:
        passes *= 1.0 + RECOMPUTED_SHARE
    moved = passes * kept + LOGIT_BYTES * samples * length * vocab_size
    return moved / rates.memory_bytes_per_second


def update_seconds(
    run: RunConfig, vocab_size: int, num_ranks: int, hardware: HardwareConfig, num_threads: int
) -> float:
    """Give the seconds of the optimizer on one rank's share, bound by memory.

    Args:
        run: Model and ZeRO stage; from stage 1 on each rank updates its share.
        vocab_size: Rows V of the embedding table.
        num_ranks: World size.
        hardware: Memory bandwidth and kind of device.
        num_threads: Cores of one rank.
    """
    share = run.model.num_parameters(vocab_size).total / (num_ranks if run.zero.stage > 0 else 1)
    bandwidth = hardware.update_bytes_per_second or (
        hardware.memory_bytes_per_second * hardware.memory_fraction
    )
    num_bytes = UPDATE_BYTES[hardware.kind] * STAGE_UPDATES[hardware.kind][run.zero.stage]
    return share * num_bytes / (bandwidth * num_threads)


def sent_seconds(
    issued: list[Collective], hardware: HardwareConfig, ranks_per_node: int
) -> dict[When, float]:
    """Give the seconds of a step's collectives, by the part of the step in which they are issued.

    Args:
        issued: The collectives.
        hardware: Links.
        ranks_per_node: Ranks of a full host.
    """
    seconds: dict[When, float] = {}
    for collective in issued:
        topology = lay_out(hardware, collective.group_size, ranks_per_node)
        taken = total_seconds(collective, topology)
        seconds[collective.when] = seconds.get(collective.when, 0.0) + taken
    return seconds


def data_seconds(plan: BatchPlan, hardware: HardwareConfig) -> float:
    """Give the seconds in which a step's tokens come from storage; the loader does not read ahead.

    Args:
        plan: Tokens of a step.
        hardware: Its storage; where none is stated, tokens lie in the page cache.
    """
    if hardware.storage_bytes_per_second is None:
        return 0.0
    return plan.global_batch_tokens * TOKEN_BYTES / hardware.storage_bytes_per_second
