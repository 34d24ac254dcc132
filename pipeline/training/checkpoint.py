"""Saves and restores training on all ranks: each writes its share, rank 0 commits.

A save copies the state to the CPU, in which training waits; a thread then writes beside training,
and the ranks agree at later step boundaries on what is done. Every collective is on the main
thread. Until the commit nothing stands that a resume would take.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from pipeline.config.load import lineage_hash
from pipeline.config.schema import RunConfig
from pipeline.data.loader import LoaderState
from pipeline.errors import CheckpointError, ConfigError, TrainingDiverged
from pipeline.tracking.environment import code_hash
from pipeline.training.checkpoint_commit import (
    candidates,
    claim,
    point,
    read_pointer,
    sweep,
)
from pipeline.training.checkpoint_files import (
    DIRECTORY,
    CheckpointManifest,
    file_damage,
    load_stored_state,
    read_stored_manifest,
)
from pipeline.training.checkpoint_objects import ObjectStore
from pipeline.training.checkpoint_save import Commit, Saver
from pipeline.training.checkpoint_space import PARAMETER_BYTES, check_space
from pipeline.training.checkpoint_store import CheckpointStore, LocalStore
from pipeline.training.distributed import RankContext, gather_json, sum_over_ranks
from pipeline.training.engine import Engine
from pipeline.training.guard import SkippedSteps
from pipeline.training.randomness import set_random_state

Facts = Callable[[], Mapping[str, Any]]
"""Gives fields for the event of a save, asked for when the save begins."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands, besides what the engine holds."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    loader: LoaderState = field(default_factory=LoaderState)
    skipped: SkippedSteps = field(default_factory=SkippedSteps)
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guards remember, as JSON; the same on every rank."""
    event_seq: int | None = None
    """Last event of the run's log, on the rank that writes it."""


def open_store(run_dir: Path, run: RunConfig) -> CheckpointStore:
    """Open where a run's checkpoints are: in its directory, or at `checkpoint.store`.

    Raises:
        CheckpointError: There is no driver for the URL.
    """
    if run.checkpoint.store is None:
        return LocalStore(run_dir / DIRECTORY)
    return ObjectStore(run.checkpoint.store)


class Checkpointer:
    """Writes and reads the checkpoints of one run; every method is collective.

    A context manager: at its end no writer is left.
    """

    def __init__(
        self,
        run_dir: Path,
        run: RunConfig,
        data_fingerprint: str,
        model: torch.nn.Module,
        ranks: RankContext,
        store: CheckpointStore | None = None,
    ) -> None:
        """Plan which rank writes which parameter.

        Args:
            run_dir: The run directory.
            run: Its config.
            data_fingerprint: Of the shards the run reads.
            model: The model before an engine takes it, with whole parameters.
            ranks: This rank among the others.
            store: Where checkpoints are; None opens what the run says.
        """
        self._run_dir = run_dir
        self._store = store or open_store(run_dir, run)
        self._run = run
        self._data_fingerprint = data_fingerprint
        self._ranks = ranks
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        self._share = split_evenly(sizes, ranks.world_size)[ranks.rank]
        self._names = set(sizes)
        self._code_hash = code_hash()
        self._checkpoint_bytes = PARAMETER_BYTES * sum(sizes.values())
        self._saver = Saver(self._store, ranks, run.checkpoint, self._checkpoint_bytes)
        self._token: str | None = None
        self._saved_step: int | None = None
        self._begun = time.monotonic()

    def check_space(self) -> None:
        """Check before training that its checkpoints find room.

        Raises:
            CheckpointError: They do not; raised on all ranks.
        """
        self._on_first(lambda: check_space(self._store, self._checkpoint_bytes, self._run))

    def advance(
        self,
        engine: Engine,
        state: TrainState,
        attempt: int,
        facts: Facts,
    ) -> list[Commit]:
        """Do at a step boundary what is due: learn that a save is committed, begin the next.

        Args:
            engine: Whose state to save.
            state: Where the run stands.
            attempt: Which start of the run this is, from 1.
            facts: Gives fields for the event of a save that begins now.

        Returns:
            The checkpoints that were committed since the last call, on every rank.

        Raises:
            CheckpointError: A rank could not write, its weights are not finite, or another attempt
                owns the checkpoints; raised on all ranks, earlier checkpoints are untouched.
        """
        policy = self._run.checkpoint
        is_due = policy.every_steps is not None and state.step % policy.every_steps == 0
        is_due = is_due or state.step in policy.keep_steps
        if policy.every_seconds is not None:
            # The clock of rank 0 decides, as clocks differ.
            is_over = time.monotonic() - self._begun >= policy.every_seconds
            vote = float(is_over and self._ranks.rank == 0)
            is_due = sum_over_ranks([vote], self._ranks)[0] > 0.0 or is_due
        if not is_due:
            return self._saver.settle(waits=False)
        if not policy.asynchronous:
            return self.save(engine, state, attempt, facts)
        committed = self._saver.drain()
        if state.step != self._saved_step:
            self._begin(engine, state, attempt, facts())
        return committed

    def save(
        self,
        engine: Engine,
        state: TrainState,
        attempt: int,
        facts: Facts = dict,
    ) -> list[Commit]:
        """Write a checkpoint of this step, unless it has one, and wait until it stands.

        Args, Returns and Raises as `advance`.
        """
        committed = self._saver.drain()
        if state.step != self._saved_step:
            self._begin(engine, state, attempt, facts())
        return committed + self._saver.drain()

    def restore(self, engine: Engine, on_event: Callable[[str], None]) -> TrainState | None:
        """Continue from the checkpoint that `latest` names, else from the newest that is intact.

        Args:
            engine: Takes the state.
            on_event: Told of each checkpoint that is passed over, and why; on every rank.

        Returns:
            Where the run stands, or None if it has no checkpoint.

        Raises:
            CheckpointError: There are checkpoints and none is intact.
            ConfigError: The checkpoint belongs to another config or other data.
        """
        self._saver.drain()
        self._own()
        ranks = self._ranks
        names: list[str] = self._on_first(lambda: candidates(self._store))
        for name in names:
            problems = [p for p in gather_json(find_damage(self._store, name, ranks), ranks) if p]
            if problems:
                on_event(f"checkpoint {name} is passed over: {'; '.join(problems)}")
                continue
            return self._take(engine, name)
        if names:
            place = self._run.checkpoint.store or self._run_dir / DIRECTORY
            raise CheckpointError(
                f"{place} has {len(names)} checkpoints and none is intact; restore one from a "
                "copy, or delete the directory to train from the start"
            )
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            # Ranks raise this one together, so they can still agree; the last good state is worth
            # it. After others a collective might wait for ranks that are gone.
            if isinstance(error, TrainingDiverged):
                self._saver.drain()
        finally:
            self._saver.close()

    def _take(self, engine: Engine, name: str) -> TrainState:
        manifest = read_stored_manifest(self._store, name)
        self._check_belongs(name, manifest)
        state = take_state(engine, self._store, name, manifest, self._ranks)
        self._on_first(lambda: self._point_at(name))
        self._saved_step = manifest.step
        self._saver.verified.add(name)
        return replace(state, event_seq=manifest.event_seq)

    def _point_at(self, name: str) -> None:
        """Mend a pointer whose checkpoint was passed over."""
        assert self._token is not None, "a restore claims first"
        if read_pointer(self._store) != name:
            point(self._store, self._token, name)

    def _own(self) -> None:
        """Claim the checkpoints once, and clear what earlier attempts left unfinished."""
        if self._token is None:
            self._token = self._on_first(lambda: claim(self._store))
            self._on_first(lambda: sweep(self._store))

    def _begin(
        self, engine: Engine, state: TrainState, attempt: int, facts: Mapping[str, Any]
    ) -> None:
        """Copy the state to the CPU and let the writer go on with it."""
        begun = time.perf_counter()
        self._own()
        fields = {
            "step": state.step,
            "tokens": state.step * self._run.train.global_batch_tokens,
            "samples": state.loader.num_samples,
            "skipped_total": state.skipped.total,
            "skipped_in_a_row": state.skipped.in_a_row,
            "guard": state.guard,
            "event_seq": state.event_seq,
            "attempt": attempt,
            "config_hash": lineage_hash(self._run),
            "code_hash": self._code_hash,
            "data_fingerprint": self._data_fingerprint,
            "family": self._run.model.family,
            "zero_stage": self._run.zero.stage,
            "world_size": self._ranks.world_size,
            "owner": self._token,
        }
        self._saver.begin(engine.export_state(self._share), fields, facts, begun)
        self._saved_step = state.step
        self._begun = time.monotonic()

    def _on_first(self, action: Callable[[], Any]) -> Any:
        """Run an action on rank 0; give all its result, or raise on all what it raised."""
        reply: dict[str, Any] = {}
        if self._ranks.rank == 0:
            try:
                reply = {"value": action()}
            except (OSError, CheckpointError) as exc:
                reply = {"error": str(exc)}
        reply = gather_json(reply, self._ranks)[0]
        if "error" in reply:
            raise CheckpointError(reply["error"])
        return reply["value"]

    def _check_belongs(self, checkpoint: str, manifest: CheckpointManifest) -> None:
        if manifest.config_hash != lineage_hash(self._run):
            raise ConfigError(
                f"{checkpoint} was written by another config than {self._run_dir / 'run.yaml'}; "
                "give the changed run a name of its own"
            )
        if manifest.data_fingerprint != self._data_fingerprint:
            raise ConfigError(
                f"{checkpoint} was trained on data {manifest.data_fingerprint}, this run reads "
                f"{self._data_fingerprint}"
            )
        stored = {name for file in manifest.files for name in file.tensors}
        if stored != self._names:
            raise CheckpointError(
                f"{checkpoint} does not hold this model: {sorted(stored ^ self._names)[:5]} differ"
            )


def find_damage(store: CheckpointStore, name: str, ranks: RankContext) -> str | None:
    """Check the manifest of a checkpoint and this rank's share of its files; None if well."""
    try:
        manifest = read_stored_manifest(store, name)
        sizes = store.entries(name)
        for file in manifest.files[ranks.rank :: ranks.world_size]:
            if (damage := file_damage(store, name, file, sizes)) is not None:
                return damage
    except (OSError, CheckpointError) as exc:
        return str(exc)
    return None


def take_state(
    engine: Engine,
    store: CheckpointStore,
    name: str,
    manifest: CheckpointManifest,
    ranks: RankContext,
) -> TrainState:
    """Put a checkpoint into the engine and the generators; give where it stood; collective."""
    engine.import_state(load_stored_state(store, name, manifest))
    set_random_state(manifest.random_states, ranks)
    return TrainState(
        step=manifest.step,
        loader=LoaderState(num_samples=manifest.samples),
        skipped=SkippedSteps(total=manifest.skipped_total, in_a_row=manifest.skipped_in_a_row),
        guard=manifest.guard,
    )


def split_evenly(sizes: dict[str, int], num_shares: int) -> list[set[str]]:
    """Split names into shares of about equal size, the same on every rank.

    Largest first, each into the smallest share so far; one tensor is never cut.
    """
    shares: list[set[str]] = [set() for _ in range(num_shares)]
    loads = [0] * num_shares
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        target = loads.index(min(loads))
        shares[target].add(name)
        loads[target] += sizes[name]
    return shares
