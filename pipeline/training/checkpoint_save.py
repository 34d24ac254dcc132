"""Saves under way: a rank's thread writes beside training, and the ranks agree on what is done.

The thread calls no collective: ranks would mix them up with training's. It only writes files and,
on rank 0, commits; the main thread learns at a step boundary whether all are done.
"""

import contextlib
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from pipeline.config.checkpoint import CheckpointConfig
from pipeline.errors import CheckpointError
from pipeline.training.checkpoint_commit import commit, prune, staged_name
from pipeline.training.checkpoint_files import CheckpointManifest, checkpoint_name
from pipeline.training.checkpoint_space import describe_room, describe_standing, is_full
from pipeline.training.checkpoint_store import CheckpointStore
from pipeline.training.checkpoint_tensors import FileRecord, Kind, write_tensors
from pipeline.training.distributed import RankContext, gather_json, sum_over_ranks
from pipeline.training.engine import EngineState
from pipeline.training.phases import enter
from pipeline.training.randomness import random_state

KINDS: tuple[Kind, ...] = ("weights", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A checkpoint that stands, for the event that tells of it."""

    step: int
    values: dict[str, Any]
    """`name`; `seconds` from its begin until it was known to stand; `blocked_seconds`, the part in
    which training waited; and what the caller wanted kept from the moment of the save."""


@dataclass(kw_only=True)
class PendingSave:
    """A save that is not committed yet."""

    fields: Mapping[str, Any]
    """Of the manifest, as they were when the save began."""
    event: Mapping[str, Any]
    """Fields of the event, likewise."""
    begun: float
    """`time.perf_counter()` then."""
    future: Future[Any]
    """The writer's share, or once `is_committing` rank 0's commit."""
    blocked_seconds: float
    is_committing: bool = False

    @property
    def name(self) -> str:
        """Name of the checkpoint."""
        return checkpoint_name(self.fields["step"])


class Saver:
    """Takes one save at a time from the staged state to its commit; all but `close` collective."""

    def __init__(
        self,
        store: CheckpointStore,
        ranks: RankContext,
        policy: CheckpointConfig,
        checkpoint_bytes: int,
    ) -> None:
        """Start the writer.

        Args:
            store: Where checkpoints are.
            ranks: This rank among the others.
            policy: Which checkpoints stay.
            checkpoint_bytes: Size of one over all ranks.
        """
        self._checkpoint_bytes = checkpoint_bytes
        self._store = store
        self._ranks = ranks
        self._policy = policy
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: PendingSave | None = None
        self.verified: set[str] = set()
        """Checkpoints whose hashes are known to be right."""

    def begin(
        self, state: EngineState, fields: Mapping[str, Any], event: Mapping[str, Any], begun: float
    ) -> None:
        """Hand this rank's share to the writer; no other save may be under way.

        Args:
            state: The share, which nobody changes any more.
            fields: Of the manifest: all but files, generators and the optimizer's step.
            event: Fields for `Commit.values`.
            begun: `time.perf_counter()` when training stopped for this save.
        """
        assert self._pending is None, "one save at a time"
        random = random_state(self._ranks)
        self._pending = PendingSave(
            fields=fields,
            event=event,
            begun=begun,
            future=self._writer.submit(self._write, state, fields, random),
            blocked_seconds=time.perf_counter() - begun,
        )

    def drain(self) -> list[Commit]:
        """Wait until no save is under way; as `settle` else."""
        committed: list[Commit] = []
        while self._pending is not None:
            committed += self.settle(waits=True)
        return committed

    def settle(self, waits: bool) -> list[Commit]:
        """Take the save under way one stage further if all ranks have finished the present one.

        Args:
            waits: Whether to wait for this rank's writer first.

        Returns:
            The checkpoint, once it stands.

        Raises:
            CheckpointError: The writer of any rank failed; raised on all, none writes any more.
        """
        pending = self._pending
        if pending is None:
            return []
        begin = time.perf_counter()
        if waits:
            wait([pending.future])
        is_done = pending.future.done()
        has_failed = is_done and pending.future.exception() is not None
        num_done, num_failed = sum_over_ranks([float(is_done), float(has_failed)], self._ranks)
        if num_failed > 0:
            self._give_up(pending)
        is_committed = pending.is_committing and num_done == self._ranks.world_size
        if not pending.is_committing and num_done == self._ranks.world_size:
            self._begin_commit(pending)
        pending.blocked_seconds += time.perf_counter() - begin
        if not is_committed:
            return []
        self._pending = None
        values = {
            "name": pending.name,
            "seconds": time.perf_counter() - pending.begun,
            "blocked_seconds": pending.blocked_seconds,
            **pending.event,
        }
        return [Commit(step=pending.fields["step"], values=values)]

    def close(self) -> None:
        """Wait for this rank's writer and end it; what is not committed by then never is."""
        self._writer.shutdown(wait=True)

    def _write(
        self, state: EngineState, fields: Mapping[str, Any], random: dict[str, str]
    ) -> dict[str, Any]:
        """Write this rank's tensors; give what the manifest needs of it, as JSON."""
        token = fields["owner"]
        staged = staged_name(self._store, checkpoint_name(fields["step"]), token)
        suffix = f"{self._ranks.rank:05d}-of-{self._ranks.world_size:05d}"
        if self._store.rename is None:
            # One that has lost the run must not write over files of the one that has it.
            suffix = f"{suffix}-{token}"
        enter("checkpoint.write", fields["step"])
        groups = dict(zip(KINDS, (state.parameters, state.exp_avg, state.exp_avg_sq), strict=True))
        paths = {kind: f"{staged}/{kind}-{suffix}.safetensors" for kind in KINDS}
        files = write_tensors(
            self._store, {paths[kind]: (kind, group) for kind, group in groups.items() if group}
        )
        return {
            "files": [file.model_dump() for file in files],
            "optimizer_step": state.step,
            "random": random,
        }

    def _begin_commit(self, pending: PendingSave) -> None:
        """Give rank 0's writer what all ranks have written."""
        shares = gather_json(pending.future.result(), self._ranks)
        pending.is_committing = True
        if self._ranks.rank == 0:
            pending.future = self._writer.submit(self._commit, pending, shares)

    def _commit(self, pending: PendingSave, shares: list[dict[str, Any]]) -> None:
        manifest = CheckpointManifest(
            **pending.fields,
            optimizer_step=shares[0]["optimizer_step"],
            random_states=[share["random"] for share in shares],
            files=[FileRecord.model_validate(f) for share in shares for f in share["files"]],
        )
        commit(self._store, manifest.owner, pending.name, manifest)
        self.verified.add(pending.name)
        policy = self._policy
        prune(self._store, pending.name, policy.keep, self.verified, policy.keep_steps)

    def _give_up(self, pending: PendingSave) -> None:
        """Raise on every rank what any writer met, once all have stopped."""
        error = pending.future.exception()
        said = None if error is None else f"rank {self._ranks.rank}: {error}"
        replies = gather_json([said, is_full(error)], self._ranks)
        self._pending = None
        what = [said for said, _ in replies if said is not None]
        if self._ranks.rank == 0:
            what += self._clear(pending, any(is_full for _, is_full in replies))
        what = gather_json(what, self._ranks)[0]
        raise CheckpointError(f"saving {pending.name} failed: {'; '.join(what)}") from error

    def _clear(self, pending: PendingSave, is_disk_full: bool) -> list[str]:
        """Remove a save that failed; say what a person has to know."""
        said = []
        # The place may be out of reach altogether, which is what was said already.
        with contextlib.suppress(OSError, CheckpointError):
            if self._store.rename is not None:
                # On a full disk the files of a failed save would fail the next one too.
                self._store.remove(staged_name(self._store, pending.name, pending.fields["owner"]))
            if is_disk_full:
                said.append(describe_room(self._store, self._checkpoint_bytes))
            said.append(describe_standing(self._store))
        return said
