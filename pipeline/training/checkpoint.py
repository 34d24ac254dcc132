"""Saves and restores training on all ranks: each writes its share, rank 0 commits by a rename.

The order of a save: every rank writes and hashes its files in a hidden directory, all learn what
was written, rank 0 writes the manifest and renames the directory. A process that dies anywhere
before the rename leaves nothing that a resume would take.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.config.load import config_hash
from pipeline.config.schema import RunConfig
from pipeline.data.loader import LoaderState
from pipeline.errors import CheckpointError, ConfigError
from pipeline.training.checkpoint_files import (
    DIRECTORY,
    CheckpointManifest,
    FileRecord,
    Kind,
    checkpoint_name,
    find_damage,
    list_checkpoints,
    load_state,
    read_manifest,
    sync_directory,
    write_manifest,
    write_tensors,
)
from pipeline.training.distributed import RankContext, gather_json
from pipeline.training.engine import Engine
from pipeline.training.guard import SkippedSteps
from pipeline.training.randomness import random_state, set_random_state

KINDS: tuple[Kind, ...] = ("weights", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands, besides what the engine holds."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    loader: LoaderState = field(default_factory=LoaderState)
    skipped: SkippedSteps = field(default_factory=SkippedSteps)
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guards remember, as JSON; the same on every rank."""


class Checkpointer:
    """Writes and reads the checkpoints of one run directory; every method is collective."""

    def __init__(
        self,
        run_dir: Path,
        run: RunConfig,
        data_fingerprint: str,
        model: torch.nn.Module,
        ranks: RankContext,
    ) -> None:
        """Plan which rank writes which parameter.

        Args:
            run_dir: The run directory.
            run: Its config.
            data_fingerprint: Of the shards the run reads.
            model: The model before an engine takes it, with whole parameters.
            ranks: This rank among the others.
        """
        self._run_dir = run_dir
        self._root = run_dir / DIRECTORY
        self._run = run
        self._data_fingerprint = data_fingerprint
        self._ranks = ranks
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        self._share = split_evenly(sizes, ranks.world_size)[ranks.rank]
        self._names = set(sizes)
        self._saved_step: int | None = None

    def save(self, engine: Engine, state: TrainState, attempt: int) -> Path:
        """Write and commit a checkpoint, then remove later ones and those beyond `checkpoint.keep`.

        Args:
            engine: Whose state to save.
            state: Where the run stands.
            attempt: Which start of the run this is, from 1.

        Returns:
            The committed directory.

        Raises:
            CheckpointError: A rank could not write, or its weights are not finite; earlier
                checkpoints are untouched.
        """
        final = self._root / checkpoint_name(state.step)
        if state.step == self._saved_step:
            return final
        temporary = self._root / f".tmp-{final.name}-{attempt}"
        try:
            self._agree(lambda: self._make(temporary))
            written = self._write_share(engine, temporary)
            self._agree(lambda: self._commit(final, temporary, written, state, attempt))
        except CheckpointError:
            if self._ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._saved_step = state.step
        return final

    def restore(self, engine: Engine, on_event: Callable[[str], None]) -> TrainState | None:
        """Continue from the newest checkpoint whose files are all intact.

        Args:
            engine: Takes the state.
            on_event: Told of each checkpoint that is passed over, and why; on every rank.

        Returns:
            Where the run stands, or None if it has no checkpoint.

        Raises:
            CheckpointError: There are checkpoints and none is intact.
            ConfigError: The checkpoint belongs to another config or other data.
        """
        names: list[str] = gather_json([p.name for p in list_checkpoints(self._run_dir)],
                                       self._ranks)[0]  # fmt: skip
        for name in names:
            checkpoint = self._root / name
            problems = [p for p in gather_json(self._find_damage(checkpoint), self._ranks) if p]
            if problems:
                on_event(f"checkpoint {name} is passed over: {'; '.join(problems)}")
                continue
            manifest = read_manifest(checkpoint)
            self._check_belongs(checkpoint, manifest)
            engine.import_state(load_state(checkpoint, manifest))
            set_random_state(manifest.random_states, self._ranks)
            self._saved_step = manifest.step
            return TrainState(
                step=manifest.step,
                loader=LoaderState(num_samples=manifest.samples),
                skipped=SkippedSteps(
                    total=manifest.skipped_total, in_a_row=manifest.skipped_in_a_row
                ),
                guard=manifest.guard,
            )
        if names:
            raise CheckpointError(
                f"{self._root} has {len(names)} checkpoints and none is intact; restore one from a "
                "copy, or delete the directory to train from the start"
            )
        return None

    def _make(self, temporary: Path) -> None:
        if self._ranks.rank == 0:
            for leftover in self._root.glob(".tmp-*"):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)

    def _write_share(self, engine: Engine, temporary: Path) -> list[dict[str, Any]]:
        state = engine.export_state(self._share)
        suffix = f"{self._ranks.rank:05d}-of-{self._ranks.world_size:05d}.safetensors"
        groups = dict(zip(KINDS, (state.parameters, state.exp_avg, state.exp_avg_sq), strict=True))

        def write() -> dict[str, Any]:
            files = [
                write_tensors(temporary / f"{kind}-{suffix}", kind, tensors)
                for kind, tensors in groups.items()
                if len(tensors) > 0
            ]
            sync_directory(temporary)
            return {
                "files": [file.model_dump() for file in files],
                "optimizer_step": state.step,
                "random": random_state(self._ranks),
            }

        return self._agree(write)

    def _commit(
        self,
        final: Path,
        temporary: Path,
        written: list[dict[str, Any]],
        state: TrainState,
        attempt: int,
    ) -> None:
        if self._ranks.rank != 0:
            return
        files = [FileRecord.model_validate(f) for share in written for f in share["files"]]
        manifest = CheckpointManifest(
            step=state.step,
            tokens=state.step * self._run.train.global_batch_tokens,
            optimizer_step=written[0]["optimizer_step"],
            samples=state.loader.num_samples,
            skipped_total=state.skipped.total,
            skipped_in_a_row=state.skipped.in_a_row,
            guard=state.guard,
            config_hash=config_hash(self._run),
            data_fingerprint=self._data_fingerprint,
            family=self._run.model.family,
            zero_stage=self._run.zero.stage,
            world_size=self._ranks.world_size,
            attempt=attempt,
            random_states=[share["random"] for share in written],
            files=files,
        )
        write_manifest(temporary, manifest)
        if final.exists():
            # A damaged one of this step, which an earlier attempt passed over.
            _discard(final)
        temporary.rename(final)
        sync_directory(self._root)
        found = list_checkpoints(self._run_dir)
        position = found.index(final)
        # Newer ones were damaged, or restore would have taken them; counted, they would crowd out
        # an intact one.
        for checkpoint in [*found[:position], *found[position + self._run.checkpoint.keep :]]:
            _discard(checkpoint)

    def _agree(self, action: Callable[[], Any]) -> list[Any]:
        """Run an action on every rank; give all results, or raise on every rank if one failed."""
        try:
            reply: dict[str, Any] = {"value": action()}
        except (OSError, CheckpointError) as exc:
            reply = {"error": f"rank {self._ranks.rank}: {exc}"}
        replies = gather_json(reply, self._ranks)
        errors = [r["error"] for r in replies if "error" in r]
        if errors:
            raise CheckpointError(f"no checkpoint was written: {'; '.join(errors)}")
        return [r["value"] for r in replies]

    def _find_damage(self, checkpoint: Path) -> str | None:
        """Check the manifest and this rank's share of the files."""
        try:
            manifest = read_manifest(checkpoint)
        except CheckpointError as exc:
            return str(exc)
        for file in manifest.files[self._ranks.rank :: self._ranks.world_size]:
            if (damage := find_damage(checkpoint, file)) is not None:
                return damage
        return None

    def _check_belongs(self, checkpoint: Path, manifest: CheckpointManifest) -> None:
        if manifest.config_hash != config_hash(self._run):
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


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint so that one half removed never counts as one."""
    hidden = checkpoint.with_name(f".tmp-discarded-{checkpoint.name}")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)
