"""From a run and its machines to the fastest layout that fits, or to what would make it fit.

A layout is what may change without changing what is trained: micro-batch, ZeRO stage and activation
checkpointing. Accumulation follows from the global batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.estimate.forecast import Fit, Machines, predict_fit
from pipeline.estimate.step_time import StepTime, step_time

LARGEST_MICRO_BATCH_SAMPLES = 1024
"""Larger micro-batches are not tried: products are as efficient as they get long before."""


EQUAL_FRACTION = 0.05
"""Difference in predicted step time below which two layouts count as equal: below the median error
of the model."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one global batch and the training state lie on the ranks."""

    micro_batch_samples: int
    zero_stage: int
    activation_checkpointing: bool

    @property
    def overrides(self) -> list[str]:
        """The layout as `a.b=c` for a command line."""
        return [
            f"train.micro_batch_samples={self.micro_batch_samples}",
            f"zero.stage={self.zero_stage}",
            f"train.activation_checkpointing={str(self.activation_checkpointing).lower()}",
        ]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout, what it needs and how fast it is."""

    layout: Layout
    accumulation_steps: int
    fit: Fit
    step: StepTime


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to change about a run that does not fit."""

    single: list[tuple[str, Fit]]
    """Single changes that suffice, as `a.b=c`, each with what is then needed."""
    best: Candidate | None
    """The fastest layout that fits; None where none does."""
    least_bytes: float
    """What the smallest layout needs on these ranks."""
    num_ranks: int | None
    """Fewest ranks, a power of two times these, on which one fits; None where more do not help."""


def layout_of(run: RunConfig) -> Layout:
    """Give the layout that a run states."""
    return Layout(
        micro_batch_samples=run.train.micro_batch_samples,
        zero_stage=run.zero.stage,
        activation_checkpointing=run.train.activation_checkpointing,
    )


def with_layout(run: RunConfig, layout: Layout) -> RunConfig:
    """Give the run with another layout."""
    train = run.train.model_copy(
        update={
            "micro_batch_samples": layout.micro_batch_samples,
            "activation_checkpointing": layout.activation_checkpointing,
        }
    )
    zero = run.zero.model_copy(update={"stage": layout.zero_stage})
    return run.model_copy(update={"train": train, "zero": zero})


def layouts(run: RunConfig, num_ranks: int) -> Iterator[Layout]:
    """Give every layout of a run's global batch over the ranks.

    Args:
        run: The run.
        num_ranks: World size.

    Raises:
        ConfigError: Not even one sample a rank divides the global batch.
    """
    samples = samples_per_rank(run, num_ranks)
    most = min(samples, LARGEST_MICRO_BATCH_SAMPLES)
    # Stages change nothing on one rank but the copy of the weights that stages 1 to 3 keep.
    stages = sorted({0, 1, run.zero.stage}) if num_ranks == 1 else [0, 1, 2, 3]
    for micro in range(1, most + 1):
        if samples % micro:
            continue
        for stage in stages:
            if run.train.compile and stage == 3:
                continue  # refused by the run's own check
            for checkpointing in (False, True):
                yield Layout(
                    micro_batch_samples=micro,
                    zero_stage=stage,
                    activation_checkpointing=checkpointing,
                )


def samples_per_rank(run: RunConfig, num_ranks: int) -> int:
    """Give the samples of one optimizer step on one rank.

    Raises:
        ConfigError: The global batch does not divide over the ranks.
    """
    samples = run.train.global_batch_tokens // run.train.sequence_tokens
    if samples % num_ranks:
        near = [n for n in range(num_ranks, 0, -1) if samples % n == 0][:1]
        raise ConfigError(
            f"{samples} samples of a global batch (train.global_batch_tokens="
            f"{run.train.global_batch_tokens}) do not divide over {num_ranks} ranks; nearest: "
            f"{near[0]} ranks, or a batch of a multiple of "
            f"{num_ranks * run.train.sequence_tokens} tokens"
        )
    return samples // num_ranks


def search(run: RunConfig, vocab_size: int, machines: Machines) -> Candidate | None:
    """Find the fastest layout that fits, or a simpler one that is as good as that.

    Of those within `EQUAL_FRACTION` of the fastest it takes the run's own, else the lowest ZeRO
    stage, then no checkpointing, then the least memory: the model cannot tell them apart.

    Args:
        run: Model and global batch.
        vocab_size: Rows V of the embedding table.
        machines: Ranks and hardware.

    Returns:
        The layout; None where none fits.
    """
    fitting = []
    for layout in layouts(run, machines.num_ranks):
        candidate = with_layout(run, layout)
        fit = predict_fit(candidate, vocab_size, machines)
        if fit.is_enough:
            fitting.append(_timed(candidate, layout, fit, vocab_size, machines))
    if not fitting:
        return None
    fastest = min(found.step.seconds for found in fitting)
    equal = [found for found in fitting if found.step.seconds <= fastest * (1 + EQUAL_FRACTION)]
    return min(
        equal,
        key=lambda found: (
            found.layout != layout_of(run),
            found.layout.zero_stage,
            found.layout.activation_checkpointing,
            found.fit.needed_bytes,
        ),
    )


def advise(run: RunConfig, vocab_size: int, machines: Machines, best: Candidate | None) -> Advice:
    """Say what would make a run fit.

    Args:
        run: A run that does not fit.
        vocab_size: Rows V of the embedding table.
        machines: Ranks and hardware.
        best: What `search` found.
    """
    stated = layout_of(run)
    single = []
    for layout in layouts(run, machines.num_ranks):
        changed = [
            override
            for override, before in zip(layout.overrides, stated.overrides, strict=True)
            if override != before
        ]
        if len(changed) != 1:
            continue
        fit = predict_fit(with_layout(run, layout), vocab_size, machines)
        if fit.is_enough:
            single.append((changed[0], fit))
    return Advice(
        single=_largest_of_each(single),
        best=best,
        least_bytes=_least(run, vocab_size, machines).needed_bytes,
        num_ranks=None if best is not None else _enough_ranks(run, vocab_size, machines),
    )


def _largest_of_each(single: list[tuple[str, Fit]]) -> list[tuple[str, Fit]]:
    """Keep of each field the change that leaves least memory unused."""
    by_field: dict[str, tuple[str, Fit]] = {}
    for override, fit in single:
        field = override.partition("=")[0]
        if field not in by_field or fit.needed_bytes > by_field[field][1].needed_bytes:
            by_field[field] = (override, fit)
    return list(by_field.values())


def _timed(
    run: RunConfig, layout: Layout, fit: Fit, vocab_size: int, machines: Machines
) -> Candidate:
    step = step_time(
        run, vocab_size, machines.num_ranks, machines.hardware, machines.threads_per_rank
    )
    accumulation = samples_per_rank(run, machines.num_ranks) // layout.micro_batch_samples
    return Candidate(layout=layout, accumulation_steps=accumulation, fit=fit, step=step)


def _least(run: RunConfig, vocab_size: int, machines: Machines) -> Fit:
    """Give the need of the smallest layout: one sample a micro-batch, of any stage and either way
    of keeping activations, as none is the smallest everywhere."""
    fits = [
        predict_fit(with_layout(run, layout), vocab_size, machines)
        for layout in layouts(run, machines.num_ranks)
        if layout.micro_batch_samples == 1
    ]
    return min(fits, key=lambda fit: fit.needed_bytes)


def _enough_ranks(run: RunConfig, vocab_size: int, machines: Machines) -> int | None:
    samples = run.train.global_batch_tokens // run.train.sequence_tokens
    num_ranks = 2 * machines.num_ranks
    while num_ranks <= samples:
        more = replace(machines, num_ranks=num_ranks)
        if samples % num_ranks == 0 and _least(run, vocab_size, more).is_enough:
            return num_ranks
        num_ranks *= 2
    return None
