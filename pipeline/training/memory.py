"""From a failed allocation to one line that says what to change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.config.schema import RunConfig
from pipeline.errors import LaunchError

GIB = 2**30
CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
"""How torch's RuntimeError begins where the host has no memory; there is no type for it."""


class OutOfMemory(LaunchError):
    """A rank could not allocate what it needs."""


@contextmanager
def explaining_memory(
    rank: int, run: RunConfig, peak_bytes: Callable[[], float | None]
) -> Iterator[None]:
    """Turn a failed allocation inside the block into one line about it.

    Args:
        rank: This rank.
        run: Tells what could be changed.
        peak_bytes: Gives this rank's peak memory, or None where it is not known.

    Raises:
        OutOfMemory: Host or device memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as exc:
        if not is_out_of_memory(exc):
            raise
        raise OutOfMemory(describe_out_of_memory(rank, run, peak_bytes(), exc)) from exc


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is a failed allocation, on the host or on a device."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error))
    )


def describe_out_of_memory(
    rank: int, run: RunConfig, peak_bytes: float | None, error: BaseException
) -> str:
    """Say in one line which rank had how much, what it asked for, and what to change.

    Args:
        rank: That failed.
        run: Tells what could be changed.
        peak_bytes: The rank's peak memory so far; None where it is not known.
        error: The failed allocation.
    """
    where = "GPU" if type(error).__name__ == "OutOfMemoryError" else "host"
    peak = "" if peak_bytes is None else f" with a peak of {peak_bytes / GIB:.2f} GiB"
    lines = str(error).strip().splitlines()
    asked = f" ({lines[0][:200]})" if lines else ""
    return f"rank {rank} ran out of {where} memory{peak}{asked}; {suggest_less_memory(run)}"


def suggest_less_memory(run: RunConfig) -> str:
    """Say which fields make a rank need less memory, and what they are now."""
    micro = run.train.micro_batch_samples
    changes = [f"lower train.micro_batch_samples (now {micro})"] if micro > 1 else []
    if run.zero.stage < 3:
        changes.append(f"raise zero.stage (now {run.zero.stage}) where there are several ranks")
    if not run.train.activation_checkpointing:
        changes.append("set train.activation_checkpointing=true")
    return ", ".join(changes or ["use a smaller model or shorter samples, or more ranks"])
