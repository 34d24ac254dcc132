"""From a model's layout to the parameters that ZeRO 3 gathers together, pass by pass.

DeepSpeed follows a recorded trace of modules: it gathers what a module lacks, then what comes next
up to a bucket, and lets go of what is not needed within another bucket. The rules are replayed
here, since how much is gathered once and how much twice follows from them alone. The order does not
depend on the ranks.

Source: DeepSpeed 0.19, runtime/zero/partitioned_param_coordinator.py.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from pipeline.config.gpt import GptConfig
from pipeline.config.lstm import LstmConfig
from pipeline.estimate.parameters import Layout, Module, layout_of

Phase = Literal["forward", "backward"]


@dataclass(frozen=True, kw_only=True)
class Gather:
    """One coalesced gather."""

    phase: Phase
    elements: tuple[int, ...]
    """Elements of each parameter in it; each is padded to the ranks on its own."""


@dataclass(frozen=True, kw_only=True)
class _Visit:
    """A hook of DeepSpeed around a module in a pass."""

    module: Module
    phase: Phase
    is_enter: bool


@lru_cache(maxsize=64)
def gathers_of(
    model: GptConfig | LstmConfig,
    vocab_size: int,
    bucket_elements: int,
    persistent_elements: int,
    is_recomputed: bool,
) -> tuple[Gather, ...]:
    """List the gathers of one micro-batch, once DeepSpeed has recorded its trace.

    It has after the first two micro-batches of a run, and again after each evaluation.

    Args:
        model: The config.
        vocab_size: Entries of the tokenizer.
        bucket_elements: Elements that are gathered ahead, kept for reuse, and live at most.
        persistent_elements: Parameters of at most this size are never let go.
        is_recomputed: Whether blocks are run again in the backward pass.
    """
    visits = list(_visits(layout_of(model, vocab_size), is_recomputed=is_recomputed))
    return tuple(_Coordinator(visits, bucket_elements, persistent_elements).replay())


def _visits(layout: Layout, *, is_recomputed: bool) -> Iterator[_Visit]:
    """Give the hooks of a forward and a backward pass in their order."""
    yield from _through(layout.root, "forward")
    yield _Visit(module=layout.root, phase="backward", is_enter=True)
    blocks = {block.name for block in layout.blocks if is_recomputed}
    for module in reversed(layout.root.children):
        if module.name in blocks:
            yield from _again(module)
        else:
            yield from _through(module, "backward")
    # Token ids have no gradient, so the model itself is let go at the end, without a hook.


def _through(module: Module, phase: Phase) -> Iterator[_Visit]:
    yield _Visit(module=module, phase=phase, is_enter=True)
    children = module.children if phase == "forward" else reversed(module.children)
    for child in children:
        yield from _through(child, phase)
    yield _Visit(module=module, phase=phase, is_enter=False)


def _again(block: Module) -> Iterator[_Visit]:
    """Give the hooks of a block's backward pass that runs it again as soon as it lacks a value."""
    path = _last_kept(block)
    run_again = list(_until(path))
    for visit in _through(block, "backward"):
        yield visit
        if visit.module is path[-1] and run_again:
            # Entered for backward; the forward pass inside ends once it has made what was missing.
            yield from run_again
            run_again = []


def _last_kept(block: Module) -> list[Module]:
    """Give the module of a block that keeps values last, behind those around it."""
    if block.keeps_values:
        return [block]
    for child in reversed(block.children):
        path = _last_kept(child) if child.children or child.keeps_values else []
        if path:
            return [block, *path]
    return []


def _until(path: list[Module]) -> Iterator[_Visit]:
    """Give the hooks of a forward pass through the first module that stops inside the last."""
    for around, last in pairwise(path):
        index = max(i for i, child in enumerate(around.children) if child is last)
        for child in around.children[:index]:
            yield from _through(child, "forward")
        yield _Visit(module=last, phase="forward", is_enter=True)
    for child in path[-1].children:
        yield from _through(child, "forward")


class _Coordinator:
    """What DeepSpeed knows of parameters while it follows a trace."""

    def __init__(self, visits: list[_Visit], bucket_elements: int, persistent: int) -> None:
        self._visits = visits
        self._bucket = bucket_elements
        self._trace = [visit.module for visit in visits if visit.is_enter]
        self._size = {p.name: p.num_elements for m in self._trace for p in m.parameters}
        self._kept = {name for name, size in self._size.items() if size <= persistent}
        self._available = set(self._kept)
        self._num_available = 0
        self._queue = deque(
            (p.name, step) for step, module in enumerate(self._trace) for p in module.parameters
        )
        self._fetched_for: dict[str, int] = {}
        self._step = 0

    def replay(self) -> Iterator[Gather]:
        """Give the gathers in order."""
        for visit in self._visits:
            if visit.is_enter:
                yield from self._fetch(visit)
            else:
                self._release(visit.module)

    def _fetch(self, visit: _Visit) -> Iterator[Gather]:
        names = [parameter.name for parameter in visit.module.parameters]
        yield from self._gather([n for n in names if n not in self._available], visit.phase)
        wanted = {n for n in names if self._fetched_for.get(n, -1) < self._step}
        taken: set[str] = set()
        while self._queue and len(taken) < len(wanted):
            name, step = self._queue.popleft()
            self._fetched_for[name] = step
            taken.add(name)
        yield from self._gather(self._next_names(), visit.phase)
        self._step += 1

    def _next_names(self) -> list[str]:
        """Take from the trace what is gathered ahead."""
        limit = min(self._bucket - self._num_available, self._bucket)
        found: list[str] = []
        num_elements = 0
        while self._queue and num_elements < limit:
            name, step = self._queue.popleft()
            self._fetched_for[name] = max(self._fetched_for.get(name, -1), step)
            if name not in self._available and name not in found:
                found.append(name)
                num_elements += self._size[name]
        return found

    def _gather(self, names: list[str], phase: Phase) -> Iterator[Gather]:
        if names:
            sizes = tuple(self._size[name] for name in names)
            self._available |= set(names)
            self._num_available += sum(sizes)
            yield Gather(phase=phase, elements=sizes)

    def _release(self, module: Module) -> None:
        """Let go of what is neither fetched for a later use nor used again soon."""
        candidates = {
            p.name for p in module.parameters if self._fetched_for.get(p.name, -1) <= self._step
        } - self._kept
        passed, step = 0, self._step
        while candidates and step < len(self._trace) and passed < self._bucket:
            for parameter in self._trace[step].parameters:
                candidates.discard(parameter.name)
                passed += parameter.num_elements
            step += 1
        for name in candidates & self._available:
            self._available.discard(name)
            self._num_available -= self._size[name]
