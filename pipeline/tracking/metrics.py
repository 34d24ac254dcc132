"""The only list of metric names: what each one means, in which unit, and what its step axis is."""

from dataclasses import dataclass
from typing import Literal

from pipeline.errors import TrackingError


@dataclass(frozen=True)
class Metric:
    """Unit and meaning of one metric name."""

    unit: str
    """Unit of the value; `1` for a count or a plain ratio."""
    meaning: str
    """One line for people."""
    better: Literal["lower", "higher"] | None = None
    """Which direction is an improvement, where there is one."""
    axis: str = "step"
    """What the step axis counts: optimizer steps unless said otherwise."""


SPLITS_DONE = "splits done"
"""What the step axis of preparing counts: parts of the source whose shards are written."""

METRICS: dict[str, Metric] = {
    "train/loss": Metric("nats/token", "training loss over the global batch", "lower"),
    "train/bits_per_byte": Metric("bits/byte", "training loss per raw text byte", "lower"),
    "train/grad_norm": Metric("1", "global gradient norm before clipping"),
    "train/learning_rate": Metric("1", "learning rate of the step"),
    "eval/loss": Metric("nats/token", "loss over all validation tokens", "lower"),
    "eval/bits_per_byte": Metric("bits/byte", "validation loss per raw text byte", "lower"),
    "eval/position_loss": Metric(
        "nats/token", "validation loss at one position of the sample", "lower", "position"
    ),
    "perf/tokens_per_second": Metric("tokens/s", "trained tokens over all ranks", "higher"),
    "perf/tokens_per_second_per_worker": Metric("tokens/s", "trained tokens of a rank", "higher"),
    "perf/step_seconds": Metric("s", "wall time of an optimizer step", "lower"),
    "perf/forward_seconds": Metric("s", "forward passes, head gradient included", "lower"),
    "perf/backward_seconds": Metric("s", "backward passes of a step", "lower"),
    "perf/optimizer_seconds": Metric("s", "clipping and update of a step", "lower"),
    "perf/comm_seconds": Metric("s", "communication of a step", "lower"),
    "perf/comm_bytes": Metric("bytes", "bytes that one rank sends in a step", "lower"),
    "perf/data_wait_seconds": Metric("s", "waiting for the loader in a step", "lower"),
    "perf/slowest_rank_ratio": Metric("1", "slowest rank's time over the mean", "lower"),
    "perf/mfu_fraction": Metric("1", "model FLOPs over the hardware's peak", "higher"),
    "perf/goodput_fraction": Metric("1", "share of wall time in kept steps", "higher"),
    "memory/peak_bytes": Metric("bytes", "peak memory of a rank", "lower"),
    "memory/reserved_bytes": Metric("bytes", "memory the allocator holds", "lower"),
    "memory/model_state_bytes": Metric(
        "bytes", "parameters, gradients and optimizer state of a rank", "lower"
    ),
    "memory/resident_bytes": Metric("bytes", "resident memory of a rank's process", "lower"),
    "memory/rank_parameter_bytes": Metric("bytes", "parameters held by a rank", "lower", "rank"),
    "memory/rank_gradient_bytes": Metric("bytes", "gradients held by a rank", "lower", "rank"),
    "memory/rank_optimizer_bytes": Metric("bytes", "optimizer state of a rank", "lower", "rank"),
    "estimate/step_seconds": Metric("s", "time of a step as estimated before the run"),
    "estimate/step_error_fraction": Metric("1", "estimated over measured time of a step, less 1"),
    "estimate/peak_bytes": Metric("bytes", "peak memory of a rank as estimated before the run"),
    "estimate/peak_error_fraction": Metric("1", "estimated over measured peak memory, less 1"),
    "estimate/state_bytes": Metric("bytes", "model state of a rank as estimated before the run"),
    "estimate/state_error_fraction": Metric("1", "estimated over measured model state, less 1"),
    "progress/tokens": Metric("tokens", "tokens trained so far"),
    "progress/flops": Metric("FLOPs", "model FLOPs spent so far"),
    "progress/seconds": Metric("s", "wall time spent so far, over all attempts"),
    "progress/attempt": Metric("1", "how often the run was started"),
    "data/documents": Metric("1", "documents written so far", axis=SPLITS_DONE),
    "data/text_bytes": Metric("bytes", "UTF-8 text of the documents written", axis=SPLITS_DONE),
    "data/tokens": Metric("tokens", "tokens written, document ends included", axis=SPLITS_DONE),
    "data/text_bytes_per_second": Metric(
        "bytes/s", "text tokenized by this attempt over its time", "higher", SPLITS_DONE
    ),
    "data/tokens_per_second": Metric(
        "tokens/s", "tokens written by this attempt over its time", "higher", SPLITS_DONE
    ),
    "data/bytes_per_token": Metric(
        "bytes/token", "text bytes over the tokens that stand for text", "higher", SPLITS_DONE
    ),
    "data/dropped_documents": Metric(
        "1", "documents left out by filters and deduplication", axis=SPLITS_DONE
    ),
    "data/quarantined": Metric(
        "1", "documents, and files left out whole, that could not be read", axis=SPLITS_DONE
    ),
    "source/tokens": Metric("tokens", "tokens of a mixed source trained so far"),
    "source/epochs": Metric("1", "passes over a mixed source so far"),
    "system/cpu_fraction": Metric("1", "busy share of all cores of the host"),
    "system/memory_available_bytes": Metric("bytes", "memory free for use on the host"),
    "scaling/tokens_per_second": Metric(
        "tokens/s",
        "throughput over all ranks, the most that were timed",
        "higher",
        "sequence tokens",
    ),
    "scaling/step_seconds": Metric(
        "s", "time of a training step on the most ranks that were timed", "lower", "sequence tokens"
    ),
    "scaling/position_loss": Metric("nats/token", "validation loss", "lower", "position"),
    "scaling/loss": Metric("nats/token", "final validation loss", "lower", "parameters"),
    "scaling/bits_per_byte": Metric(
        "bits/byte", "final validation bits per byte", "lower", "parameters"
    ),
    "scaling/loss_by_tokens": Metric("nats/token", "validation loss", "lower", "tokens"),
    "scaling/tokens_per_second_by_parameters": Metric(
        "tokens/s", "throughput over all ranks", "higher", "parameters"
    ),
    "scaling/tokens_per_second_by_ranks": Metric(
        "tokens/s",
        "throughput at the longest sequence timed at every world size",
        "higher",
        "ranks",
    ),
    "scaling/step_seconds_by_ranks": Metric(
        "s", "time of a step at the longest sequence timed at every world size", "lower", "ranks"
    ),
    "scaling/peak_bytes_by_parameters": Metric(
        "bytes", "peak memory of a rank", "lower", "parameters"
    ),
    "scaling/model_state_bytes_zero0": Metric(
        "bytes", "model state of a rank, nothing split", "lower", "ranks"
    ),
    "scaling/model_state_bytes_zero1": Metric(
        "bytes", "model state of a rank, optimizer split", "lower", "ranks"
    ),
    "scaling/model_state_bytes_zero2": Metric(
        "bytes", "model state of a rank, gradients split too", "lower", "ranks"
    ),
    "scaling/model_state_bytes_zero3": Metric(
        "bytes", "model state of a rank, parameters split too", "lower", "ranks"
    ),
}
"""Every metric name of events, results and study summaries; names use only `[a-z0-9_/]`.

In MLflow the host stands after the first slash of `system/...`, and the source after that of
`source/...`, so that hosts and sources stay apart.
"""


def check_metric(name: str) -> Metric:
    """Give the entry of a metric name.

    Raises:
        TrackingError: The name is not in `METRICS`.
    """
    try:
        return METRICS[name]
    except KeyError:
        raise TrackingError(
            f"unknown metric {name!r}; names stand in pipeline/tracking/metrics.py"
        ) from None


def result_name(name: str) -> str:
    """Give MLflow's name for the one value of a metric that `result.json` states for a whole run.

    It differs from the metric's own name, so that a median does not end a curve, and has one
    slash, because MLflow makes a section of all that stands before the last one.
    """
    return "result/" + name.replace("/", "_", 1)
