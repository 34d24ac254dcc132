"""From the steps that a run names to a torch trace of each rank, and on CUDA to memory snapshots.

A trace is in Chrome's format: https://ui.perfetto.dev opens it. A snapshot is what
https://pytorch.org/memory_viz opens. Both stand in `profile/` of the run directory, under their
final names only when complete; a name has the steps that were traced, which are fewer than those
named where a run stopped between them.
"""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.tracking.replica_files import PROFILE_DIRECTORY
from pipeline.training.distributed import RankContext

MAX_MEMORY_EVENTS = 1_000_000
"""Latest allocations that a snapshot tells of, with their call stacks: some 100 MB."""


class StepProfiler:
    """Traces the named steps of one rank; use it as a context manager around the loop."""

    def __init__(self, run_dir: Path, steps: tuple[int, int] | None, ranks: RankContext) -> None:
        """Start without a trace.

        Args:
            run_dir: Takes the files.
            steps: First and last step to trace, from 1; None traces nothing.
            ranks: This rank among the others.
        """
        self._directory = run_dir / PROFILE_DIRECTORY
        self._steps = steps
        self._ranks = ranks
        self._is_cuda = ranks.device.type == "cuda"
        self._trace: profile | None = None
        self._traced = (0, 0)
        self._has_history = False
        self._is_open = False

    def begin(self, step: int) -> None:
        """Begin to trace before a step, if it is one of those named.

        Memory is recorded from the first step that has them ahead, so that a snapshot also tells of
        what was allocated before they began.
        """
        is_ahead = self._steps is not None and step <= self._steps[1]
        if self._is_cuda and is_ahead and not self._has_history:
            torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
            self._has_history = True
        if not self.covers(step):
            return
        self._traced = (step if self._trace is None else self._traced[0], step)
        if self._trace is None:
            activities = [ProfilerActivity.CPU]
            if self._is_cuda:
                activities.append(ProfilerActivity.CUDA)
            self._trace = profile(activities=activities)
            self._trace.start()

    def end(self, step: int) -> None:
        """Write the trace after the last of the steps."""
        if self._steps is not None and step == self._steps[1]:
            self._finish()

    def covers(self, step: int) -> bool:
        """Tell whether a step is traced, so that its times say nothing about the others."""
        return self._steps is not None and self._steps[0] <= step <= self._steps[1]

    def __enter__(self) -> Self:
        if self._is_cuda:
            # The snapshot is taken where memory ran out: once the error has left the step, the
            # tensors that filled the memory are gone.
            observe = torch._C._cuda_attach_out_of_memory_observer  # type: ignore[attr-defined]
            observe(self._note_out_of_memory)
        self._is_open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_open = False
        self._finish()

    def _finish(self) -> None:
        """Write what was traced, also if the run stopped or failed before the last step."""
        try:
            if self._trace is not None:
                self._write_trace(self._trace)
        finally:
            self._trace = None
            if self._has_history:
                torch.cuda.memory._record_memory_history(enabled=None)
                self._has_history = False

    def _write_trace(self, trace: profile) -> None:
        trace.stop()
        first, last = self._traced
        name = f"steps-{first}-{last}-rank-{self._ranks.rank}"
        self._write(f"trace-{name}.json.gz", trace.export_chrome_trace)
        if self._is_cuda:
            self._write(f"memory-{name}.pickle", _dump_snapshot)

    def _note_out_of_memory(self, *sizes: Any) -> None:
        """Called by the allocator with the device and the bytes that were wanted and there."""
        del sizes
        name = f"memory-out-of-memory-rank-{self._ranks.rank}.pickle"
        # An observer cannot be taken off again, and a process may train another run.
        if self._is_open and not (self._directory / name).exists():
            self._write(name, _dump_snapshot)

    def _write(self, name: str, write: Callable[[str], Any]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        # The end of the name says whether the trace is compressed.
        unfinished = self._directory / f".tmp-{name}"
        write(str(unfinished))
        unfinished.rename(self._directory / name)


def _dump_snapshot(path: str) -> None:
    torch.cuda.memory._dump_snapshot(path)  # type: ignore[no-untyped-call]
