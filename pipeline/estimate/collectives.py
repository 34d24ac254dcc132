"""From a run and a world size to the collectives of one optimizer step, as DeepSpeed issues them.

Counted is a step in the middle of a run: the first two micro-batches, and the first two after each
evaluation, gather without looking ahead at ZeRO 3 and compare their traces. Evaluation and
checkpoints are left out, and so is that input feeding at ZeRO 3 gathers anew for every token. Tests
compare every call, at 1 to 4 gloo ranks; fp16, which a CPU refuses, is written down from the code.

Source: DeepSpeed 0.19, runtime/engine.py, runtime/zero/stage_1_and_2.py and stage3.py.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.config.batching import BatchPlan, plan_batches
from pipeline.config.schema import RunConfig
from pipeline.estimate.gathers import gathers_of
from pipeline.estimate.parameters import Layout, Parameter, layout_of

Op = Literal["all_reduce", "all_gather", "reduce_scatter"]
When = Literal["forward", "backward", "update", "agree", "log"]
"""The part of a step; `agree` is what the loop tells all ranks after it, `log` what a logged step
adds."""

VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a working weight and of its gradient on the wire."""
STAGE_0_BUCKET_ELEMENTS = 500_000_000
"""Elements after which stage 0 sends its gradients; the config's bucket is for the other stages."""
SUBGROUP_ELEMENTS = 1_000_000_000
"""Elements of one rank that stage 3 updates at a time; each part has a norm of its own."""
PARTITION_MULTIPLE = 2
"""Stages 1 and 2 pad a group of parameters to this times the ranks."""
NUM_TIMES = 2
"""Seconds that each rank tells of itself after a step: for data, in forward passes."""
NUM_VOTES = 5
"""Numbers that ranks add up beside their times: three reasons to stop, whether one applied the
step, and bytes of text."""
LOGGED_JSON_BYTES = 73
"""The text of a rank's two memory metrics, of nine digits each: a digit more is a byte more."""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Equal collectives of one optimizer step, micro-batches and layers together."""

    name: str
    """What travels: gradients, parameters, norm, overflow, losses, votes, ..."""
    op: Op
    bytes: int
    """Of the whole tensor on one call: what all_reduce takes, what all_gather gives, what
    reduce_scatter takes. A ring moves (g - 1) / g of it per rank, twice in all_reduce."""
    times: int
    """Calls in one optimizer step (for `log`: in one logged step)."""
    group_size: int
    """Ranks g that take part. A group of one is asked as well, where DeepSpeed does not look."""
    when: When
    every_steps: int = 1
    """Steps between its appearances; 1 but for `log`."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all calls of a step in which it appears."""
        return self.bytes * self.times


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One kind of call without its number."""

    name: str
    op: Op
    bytes: int
    when: When


def collectives(run: RunConfig, vocab_size: int, world_size: int) -> list[Collective]:
    """List the collectives of one optimizer step on one rank, in the order of their parts.

    Args:
        run: Model, ZeRO stage, buckets, precision, clipping and accumulation (from its batch).
        vocab_size: Entries of the tokenizer.
        world_size: Number of ranks.

    Raises:
        ConfigError: The global batch does not divide over the ranks.
    """
    plan = plan_batches(run.train, world_size)
    layout = layout_of(run.model, vocab_size, run.train.documents.reset_state)
    counted = Counter(_loss_calls(plan))
    counted.update(_parameter_calls(run, vocab_size, plan))
    counted.update(_gradient_calls(run, layout, plan))
    counted.update(_update_calls(run, layout, world_size))
    counted.update(_loop_calls(run, world_size))
    return [
        Collective(
            name=call.name, op=call.op, bytes=call.bytes, times=times, group_size=world_size,
            when=call.when, every_steps=run.tracking.log_every_steps if call.when == "log" else 1,
        )
        for call, times in counted.items()
    ]  # fmt: skip


def _loss_calls(plan: BatchPlan) -> Iterator[_Call]:
    if plan.world_size > 1:
        yield _Call(name="labels", op="all_reduce", bytes=8, when="forward")
    yield _Call(name="losses", op="all_reduce", bytes=16, when="forward")


def _loop_calls(run: RunConfig, world_size: int) -> Iterator[_Call]:
    if world_size == 1:
        return
    votes = 8 * (NUM_VOTES + NUM_TIMES * world_size)
    yield _Call(name="votes", op="all_reduce", bytes=votes, when="agree")
    if run.checkpoint.every_seconds is not None:
        yield _Call(name="checkpoint clock", op="all_reduce", bytes=8, when="agree")
    yield _Call(name="lengths", op="all_reduce", bytes=8 * world_size, when="log")
    texts = LOGGED_JSON_BYTES * world_size
    yield _Call(name="memory", op="all_gather", bytes=texts, when="log")


def _parameter_calls(run: RunConfig, vocab_size: int, plan: BatchPlan) -> dict[_Call, int]:
    """Count the gathers of working weights in front of their use."""
    if run.zero.stage < 3 or plan.world_size == 1:
        return {}
    found: Counter[_Call] = Counter()
    gathers = gathers_of(
        run.model,
        vocab_size,
        bucket_elements(run, layout_of(run.model, vocab_size)),
        run.zero.param_persistence_threshold,
        run.train.activation_checkpointing,
    )
    for gather in gathers:
        elements = sum(padded(count, plan.world_size) for count in gather.elements)
        num_bytes = elements * VALUE_BYTES[run.precision]
        call = _Call(name="parameters", op="all_gather", bytes=num_bytes, when=gather.phase)
        found[call] += plan.accumulation_steps
    return dict(found)


def _gradient_calls(run: RunConfig, layout: Layout, plan: BatchPlan) -> dict[_Call, int]:
    """Count what sums gradients over the ranks.

    Stages 0 and 1 do it once a step, in the order of the parameters; stages 2 and 3 after each
    micro-batch, in the order in which gradients are ready.
    """
    stage, ranks = run.zero.stage, plan.world_size
    if stage == 0:
        sent = _stage_0_elements(layout.parameters)
    elif stage == 3:
        buckets = _fill_buckets(layout.sharded_gradients, bucket_elements(run, layout))
        sent = [sum(padded(p.num_elements, ranks) for p in bucket) for bucket in buckets]
    else:
        sent = _flat_elements(run, layout, ranks)
    op: Op = "reduce_scatter" if stage == 3 else "all_reduce"
    times = plan.accumulation_steps if stage >= 2 else 1
    value_bytes = VALUE_BYTES[run.precision]
    found: Counter[_Call] = Counter()
    for elements in sent:
        num_bytes = elements * value_bytes
        found[_Call(name="gradients", op=op, bytes=num_bytes, when="backward")] += times
    return dict(found)


def _update_calls(run: RunConfig, layout: Layout, world_size: int) -> list[_Call]:
    """List what the update asks of the ranks: is the gradient finite, how long, new weights."""
    stage, value_bytes = run.zero.stage, VALUE_BYTES[run.precision]
    norm, calls = _Call(name="norm", op="all_reduce", bytes=4, when="update"), []
    groups = groups_of(layout)
    if stage == 0:
        has_norm = run.precision == "fp32" and run.train.optimizer.gradient_clipping > 0.0
        return [norm] if has_norm else []
    if run.precision == "fp16" or (run.precision == "bf16" and stage < 3):
        calls.append(_Call(name="overflow", op="all_reduce", bytes=1, when="update"))
    if stage == 3:
        norm = _Call(name="norm", op="all_reduce", bytes=8, when="update")
        calls += [norm] * sum(len(subgroup_elements(group, world_size)) for group in groups)
        if world_size > 1:
            calls += [
                _Call(
                    name="persistent parameters", op="all_gather", when="update",
                    bytes=padded(p.num_elements, world_size) * value_bytes,
                )
                for p in layout.parameters
                if p.num_elements <= run.zero.param_persistence_threshold
            ]  # fmt: skip
        return calls
    calls += [norm] * len(groups)
    if world_size > 1:
        calls += [
            _Call(
                name="parameters", op="all_gather", when="update",
                bytes=group_elements(group, world_size) * value_bytes,
            )
            for group in groups
        ]  # fmt: skip
    return calls


def bucket_elements(run: RunConfig, layout: Layout) -> int:
    """Give the elements of a communication bucket: none is larger than the model."""
    total = sum(parameter.num_elements for parameter in layout.parameters)
    return max(min(run.zero.bucket_elements, total), 1)


def groups_of(layout: Layout) -> list[list[Parameter]]:
    """Give the optimizer's groups: matrices, which decay, and vectors; empty ones left out."""
    matrices = [p for p in layout.parameters if p.is_matrix]
    vectors = [p for p in layout.parameters if not p.is_matrix]
    return [group for group in (matrices, vectors) if group]


def group_elements(group: Sequence[Parameter], world_size: int) -> int:
    """Give the elements of a group of stages 1 and 2, padded so that ranks have equal parts."""
    return padded(sum(p.num_elements for p in group), PARTITION_MULTIPLE * world_size)


def subgroup_elements(group: Sequence[Parameter], world_size: int) -> list[int]:
    """Give the elements of one rank in each part in which stage 3 updates a group."""
    sizes, filled = [], 0
    for parameter in group:
        filled += padded(parameter.num_elements, world_size) // world_size
        if filled >= SUBGROUP_ELEMENTS:
            sizes.append(filled)
            filled = 0
    return [*sizes, filled] if filled > 0 else sizes


def padded(count: int, multiple: int) -> int:
    """Give the smallest multiple that holds a count."""
    return -(-count // multiple) * multiple


def _stage_0_elements(parameters: Sequence[Parameter]) -> list[int]:
    sent, filled = [], 0
    for parameter in parameters:
        filled += parameter.num_elements
        if filled > STAGE_0_BUCKET_ELEMENTS:
            sent.append(filled)
            filled = 0
    return [*sent, filled] if filled else sent


def _fill_buckets(parameters: Sequence[Parameter], limit: int) -> list[list[Parameter]]:
    """Cut parameters into buckets; one that is larger than a bucket has its own."""
    buckets: list[list[Parameter]] = []
    filled = math.inf
    for parameter in parameters:
        if filled + parameter.num_elements > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter)
        filled += parameter.num_elements
    return buckets


def _flat_elements(run: RunConfig, layout: Layout, world_size: int) -> list[int]:
    """Give the elements of each sum of stages 1 and 2.

    A parameter beyond a bucket is sent in pieces that end at the borders of the ranks' parts.
    """
    groups, limit = groups_of(layout), bucket_elements(run, layout)
    order = layout.gradients if run.zero.stage == 2 else [p for group in groups for p in group]
    places = {
        name: (begin, part)
        for group in groups
        for part in [group_elements(group, world_size) // world_size]
        for name, begin in _begins(group)
    }
    sent = []
    for bucket in _fill_buckets(order, limit):
        elements = sum(p.num_elements for p in bucket)
        if elements <= limit:
            sent.append(elements)
        else:
            sent += _cut(elements, *places[bucket[0].name], limit)
    return sent


def _begins(group: Sequence[Parameter]) -> Iterator[tuple[str, int]]:
    """Give where each parameter begins in its flat group."""
    begin = 0
    for parameter in group:
        yield parameter.name, begin
        begin += parameter.num_elements


def _cut(elements: int, begin: int, part: int, limit: int) -> Iterator[int]:
    """Give the pieces of a parameter beyond a bucket."""
    end, at, filled = begin + elements, begin, 0
    while at < end:
        border = min((at // part + 1) * part, end)
        filled, at = filled + border - at, border
        if filled > limit or at == end:
            yield filled
            filled = 0
