"""From a run and a world size to what fills the memory of one rank at its peak, by component.

A step has three moments at which memory may be fullest: the end of a forward pass, with all
activations; the sum of gradients over the ranks, with a bucket and its copy; and the update, with
flat gradients and AdamW's intermediate results. The table shows the fullest. On a CPU the C library
keeps blocks below 32 MiB that were freed, so the largest amount of them stands beside the large
ones at every moment.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from pipeline.config.batching import plan_batches
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.estimate.activations import Accelerator, MemoryComponent, Place, activations
from pipeline.estimate.collectives import (
    VALUE_BYTES,
    bucket_elements,
    group_elements,
    groups_of,
    subgroup_elements,
)
from pipeline.estimate.parameters import Layout, layout_of
from pipeline.estimate.state import MASTER_BYTES, Offload, RankState, state_bytes

MIB = 2**20
BASE_BYTES = {
    ("cpu", "gpt"): 445 * MIB,
    ("cpu", "lstm_attention"): 465 * MIB,
    ("cuda", "gpt"): 600 * MIB,
    ("cuda", "lstm_attention"): 600 * MIB,
}
"""Interpreter, torch, DeepSpeed and the first use of their kernels. On a CPU measured with
torch 2.13 and DeepSpeed 0.19 on x86: what is resident beyond all tensors. On a GPU a guess of what
context and libraries take, which the allocator does not count."""

RETAINED_BLOCK_BYTES = 32 * MIB
"""Blocks below it are not given back when they are freed. Source: glibc, mallopt(3),
M_MMAP_THRESHOLD, which grows up to here."""

CUDA_FRAGMENTATION_FRACTION = 0.05
"""Allowance for what the caching allocator holds and cannot use; not measured."""

UPDATE_COPIES = {"cpu": 2, "cuda": 0}
"""Intermediate results of AdamW as large as the tensor that it updates: a root and its quotient;
the fused kernel of CUDA makes none."""


@dataclass(frozen=True, kw_only=True)
class _Moments:
    """Bytes that stand beside the model state, moment by moment."""

    forward: float
    """Activations, logits of a chunk, and what ZeRO 3 has gathered."""
    reduction: float
    """Bucket, its copy, and at stage 2 gradients of micro-batches before."""
    update: float
    """Flat gradients and AdamW's intermediate results."""

    @property
    def largest(self) -> float:
        """The fullest of them."""
        return max(self.forward, self.reduction, self.update)


def memory_table(
    run: RunConfig,
    vocab_size: int,
    world_size: int,
    accelerator: Accelerator = "cpu",
    offload: Offload = "none",
) -> list[MemoryComponent]:
    """List what one rank holds at its peak; the sum over a place is the peak there.

    Args:
        run: The run; its `train.micro_batch_samples` sets the activations.
        vocab_size: Entries of the tokenizer.
        world_size: Number of ranks.
        accelerator: What the ranks compute on.
        offload: What lies in the host's memory beside a GPU; legal with `accelerator="cuda"`.

    Raises:
        ConfigError: Offload at a stage that has none, or on a CPU; or the global batch does not
            divide over the ranks.
    """
    _check_offload(run, accelerator, offload)
    layout, state = layout_of(run.model, vocab_size), state_bytes(run, vocab_size, world_size)
    parts = activations(run, vocab_size, accelerator)
    held = sum(part.bytes for part in parts) + _gathered(run, layout, world_size)
    accumulates = plan_batches(run.train, world_size).accumulation_steps > 1
    is_updated_on_host = offload != "none"
    moments = _Moments(
        forward=held,
        reduction=_reduction(run, layout, state, world_size, accelerator),
        update=(
            0.0 if is_updated_on_host else _update(run, layout, state, world_size, accelerator)
        ),
    )
    # Gradients of a lone micro-batch take the place of its activations; later ones find both.
    gradients = state.gradients if run.zero.stage < 2 else 0
    table = [
        *_state_components(run, state, offload),
        *_buffers(run, layout),
        *_at_the_peak(run, layout, world_size, parts, moments),
        _retained(
            run, layout, world_size, held if accumulates else held - gradients, moments, accelerator
        ),
    ]
    base = MemoryComponent(
        name="framework base", bytes=BASE_BYTES[accelerator, run.model.family], exact=False,
        note="measured constant" if accelerator == "cpu" else "assumed constant",
    )  # fmt: skip
    table.append(base)
    if accelerator == "cuda":
        filled = peak_bytes(table) - base.bytes
        table.append(
            MemoryComponent(
                name="fragmentation", bytes=CUDA_FRAGMENTATION_FRACTION * filled, exact=False,
                note="5% of what the allocator holds, not measured",
            )
        )  # fmt: skip
    return [component for component in table if component.bytes > 0]


def peak_bytes(table: Iterable[MemoryComponent], place: Place = "device") -> float:
    """Sum the components of one place."""
    return sum(component.bytes for component in table if component.place == place)


def _check_offload(run: RunConfig, accelerator: Accelerator, offload: Offload) -> None:
    if offload == "none":
        return
    if accelerator == "cpu":
        raise ConfigError(
            f"offload={offload} moves state to the host, where ranks on a CPU have it already; "
            "legal: none"
        )
    least = 3 if offload == "optimizer_and_parameters" else 1
    if run.zero.stage < least:
        raise ConfigError(
            f"offload={offload} needs zero.stage >= {least}, got {run.zero.stage}; "
            f"nearest: zero.stage={least}, or offload=none"
        )


def _state_components(run: RunConfig, state: RankState, offload: Offload) -> list[MemoryComponent]:
    stage = run.zero.stage
    optimizer_place: Place = "device" if offload == "none" else "host"
    parameter_place: Place = "host" if offload == "optimizer_and_parameters" else "device"
    is_flat = stage in (1, 2)
    parts: list[tuple[str, float, Place, str]] = [
        ("parameters", state.parameters, parameter_place, "working weights, flat and padded"
         if is_flat else "working weights"),
        ("moments", state.moments, optimizer_place, "AdamW's two, float32"),
        ("master weights", state.master_weights, optimizer_place, "float32"),
    ]  # fmt: skip
    if stage != 2:
        # Stage 2 builds its part anew in each pass; it is among what stands at a moment.
        place: Place = optimizer_place if stage == 3 else "device"
        parts.append(("gradients", state.gradients, place, "whole" if stage < 2 else "own part"))
    if offload != "none":
        # The host's update wants them in float32, as large as the weights that it updates.
        parts.append(("offloaded gradients", state.master_weights, "host", "float32, own part"))
    return [
        MemoryComponent(name=name, bytes=size, exact=name != "offloaded gradients", note=note,
                        place=place)
        for name, size, place, note in parts
    ]  # fmt: skip


def _buffers(run: RunConfig, layout: Layout) -> list[MemoryComponent]:
    """Give what DeepSpeed keeps between the moments: at stage 3 a bucket that is never freed."""
    if run.zero.stage < 3:
        return []
    size = bucket_elements(run, layout) * VALUE_BYTES[run.precision]
    return [
        MemoryComponent(
            name="gradient bucket", bytes=size, exact=False, note="zero.bucket_elements"
        )
    ]


def _gathered(run: RunConfig, layout: Layout, world_size: int) -> float:
    """Give what ZeRO 3 has gathered at most: a bucket, and a part of it in its raw form."""
    if run.zero.stage < 3 or world_size == 1:
        return 0.0
    return bucket_elements(run, layout) * VALUE_BYTES[run.precision]


def _reduction(
    run: RunConfig,
    layout: Layout,
    state: RankState,
    world_size: int,
    accelerator: Accelerator,
) -> float:
    """Give what stands while gradients are summed over the ranks."""
    stage, size = run.zero.stage, VALUE_BYTES[run.precision]
    total = sum(p.num_elements for p in layout.parameters) * size
    bucket = bucket_elements(run, layout) * size
    if stage == 0:
        return total  # one flat copy
    if stage == 3:
        return bucket
    kept = _own_gradients(run, layout, state, world_size)
    num_buckets = 2 if accelerator == "cuda" else 1  # one fills while the other is sent
    before = (
        kept if stage == 2 and plan_batches(run.train, world_size).accumulation_steps > 1 else 0
    )
    return num_buckets * bucket + max(bucket, kept) + before


def _own_gradients(run: RunConfig, layout: Layout, state: RankState, world_size: int) -> float:
    """Give the bytes of gradients of a rank's own part, cut ones whole."""
    if run.zero.stage == 2:
        return state.gradients
    return min(
        state.gradients,
        sum(group_elements(group, world_size) for group in groups_of(layout))
        / world_size
        * VALUE_BYTES[run.precision],
    )


def _update(
    run: RunConfig, layout: Layout, state: RankState, world_size: int, accelerator: Accelerator
) -> float:
    """Give what stands while AdamW updates the group of matrices, or at stage 3 a part of it."""
    copies = UPDATE_COPIES[accelerator]
    if run.zero.stage == 0:
        return copies * MASTER_BYTES * max(p.num_elements for p in layout.parameters)
    groups = groups_of(layout)
    if run.zero.stage == 3:
        largest: float = max(max(subgroup_elements(group, world_size)) for group in groups)
    else:
        largest = max(group_elements(group, world_size) for group in groups) / world_size
    # The flat gradient of the group; the parts that it was made of stand until the last group.
    flat = (1 + copies) * MASTER_BYTES * largest
    return flat + (0.0 if run.zero.stage == 3 else _own_gradients(run, layout, state, world_size))


def _at_the_peak(
    run: RunConfig,
    layout: Layout,
    world_size: int,
    parts: list[MemoryComponent],
    moments: _Moments,
) -> list[MemoryComponent]:
    """Give the components of the fullest moment."""
    if moments.largest == moments.forward:
        gathered = _gathered(run, layout, world_size)
        note = "working weights of the modules at hand"
        found = MemoryComponent(name="gathered parameters", bytes=gathered, exact=False, note=note)
        return [*parts, found]
    if moments.largest == moments.update:
        note = "flat gradient and AdamW's intermediate results"
        return [MemoryComponent(name="update", bytes=moments.update, exact=False, note=note)]
    note = "buckets of gradients and their copies"
    return [MemoryComponent(name="reduction", bytes=moments.reduction, exact=False, note=note)]


def _retained(
    run: RunConfig,
    layout: Layout,
    world_size: int,
    held: float,
    moments: _Moments,
    accelerator: Accelerator,
) -> MemoryComponent:
    """Give the small blocks that a CPU's C library keeps although they are free at the peak.

    Where the fullest moment asks for small blocks itself, it takes these.
    """
    found = MemoryComponent(
        name="freed blocks", bytes=0.0, exact=False, note="small ones, which the C library keeps"
    )
    if accelerator == "cuda" or moments.largest == moments.forward:
        return found
    size = VALUE_BYTES[run.precision]
    small = [p.num_elements * size for p in layout.parameters]
    before = sum(block for block in small if block < RETAINED_BLOCK_BYTES)
    if run.zero.stage in (0, 1):
        # The weights as they were built, or later gradients, which the table has already.
        before = 0
    num_tokens = run.train.micro_batch_samples * run.train.sequence_tokens
    widest = 4 * run.model.width * num_tokens * size
    kept = held if widest < RETAINED_BLOCK_BYTES else 0.0
    is_small = _largest_block(run, layout, world_size, moments) < RETAINED_BLOCK_BYTES
    taken = moments.largest if is_small else 0.0
    return replace(found, bytes=max(before - taken, kept - taken, 0.0))


def _largest_block(run: RunConfig, layout: Layout, world_size: int, moments: _Moments) -> float:
    """Give the bytes of the largest tensor that the reduction or the update makes."""
    stage, groups = run.zero.stage, groups_of(layout)
    if moments.largest == moments.reduction:
        elements = sum(p.num_elements for p in layout.parameters)
        return VALUE_BYTES[run.precision] * (
            elements if stage == 0 else bucket_elements(run, layout)
        )
    if stage == 0:
        return MASTER_BYTES * max(p.num_elements for p in layout.parameters)
    if stage == 3:
        return MASTER_BYTES * max(max(subgroup_elements(group, world_size)) for group in groups)
    return MASTER_BYTES * max(group_elements(group, world_size) for group in groups) / world_size
