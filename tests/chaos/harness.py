"""From a run and a fault plan to what the ranks did: real processes, started again as a user would.

Every attempt goes through the run lock and the local launcher, as `python -m launch train` does.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.local import LocalLauncher
from launch.run_lock import alone_in
from launch.stopping import StopRequest
from pipeline.config.cluster import ClusterConfig
from pipeline.config.load import dump_yaml, read_run
from pipeline.config.schema import RunConfig
from pipeline.errors import LaunchError
from pipeline.tracking.events import Event, read_events, surviving_events
from pipeline.tracking.store import Verdict
from pipeline.training.checkpoint_files import list_checkpoints, read_manifest
from pipeline.training.distributed import TIMEOUT_VARIABLE
from pipeline.training.faults import ALLOW_VARIABLE, PLAN_VARIABLE
from tests.training.cases import GLOBAL_BATCH_SAMPLES, SEQUENCE_TOKENS, small_run, write_run

NUM_STEPS = 12
INTERVAL = 4
"""Steps between checkpoints; small, so that a lost interval is cheap."""
GROUP_TIMEOUT_SECONDS = 60
"""Far below the default, so that a fault that nobody notices fails its test in time."""


def chaos_run(family: str = "gpt", stage: int = 1, **fields: Any) -> RunConfig:
    batch_tokens = GLOBAL_BATCH_SAMPLES * SEQUENCE_TOKENS
    train = {"total_tokens": NUM_STEPS * batch_tokens, "optimizer": {"learning_rate": 3e-3}}
    sections = {
        "eval": {"every_steps": 6},
        "checkpoint": {"every_steps": INTERVAL},
        "tracking": {"log_every_steps": 1},
    }
    return small_run(family, stage, train=train, **(sections | fields))


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How one attempt ended, as the launcher tells it."""

    verdict: str | None
    error: LaunchError | None
    ended_seconds: float
    """By the monotonic clock."""
    ended_unix_seconds: float


@dataclass(frozen=True, kw_only=True)
class History:
    """What a run did, over all its attempts, from its own log and from the harness's."""

    run_dir: Path
    endings: list[Ending]
    fired: list[dict[str, Any]]
    read: list[dict[str, Any]]
    """One line for each rank, step and attempt: which samples it read."""
    events: list[Event] = field(repr=False)

    @property
    def losses(self) -> dict[int, str]:
        """Loss of each step that the final state descends from, every bit of it."""
        lineage = surviving_events(self.events)
        return {
            e.step: float(e.values["train/loss"]).hex()
            for e in lineage
            if e.kind == "train" and "train/loss" in e.values
        }

    @property
    def samples(self) -> dict[int, list[int]]:
        """Samples of each step that the final state descends from, over all ranks, in order."""
        found: dict[int, list[int]] = {}
        for step, attempt in self.kept_attempts.items():
            mine = [r for r in self.read if (r["attempt"], r["step"]) == (attempt, step)]
            found[step] = sorted(number for line in mine for number in line["sample_ids"])
        return found

    @property
    def kept_attempts(self) -> dict[int, int]:
        """The attempt whose update each step kept."""
        begins = [e for e in self.events if e.kind in ("start", "resume")]
        kept: dict[int, int] = {}
        for begin in begins:
            kept = {step: attempt for step, attempt in kept.items() if step <= begin.step}
            steps = {r["step"] for r in self.read if r["attempt"] == begin.attempt}
            kept |= dict.fromkeys(sorted(steps), begin.attempt)
        return kept

    @property
    def wasted_steps(self) -> int:
        """Steps that were taken and taken again."""
        taken = {(r["attempt"], r["step"]) for r in self.read}
        return len(taken) - len(self.kept_attempts)

    @property
    def detection_seconds(self) -> list[float]:
        """From each fault that ended an attempt to the launcher's word on it."""
        failed = {n: end for n, end in enumerate(self.endings, 1) if end.error is not None}
        struck = {line["attempt"]: line["monotonic_seconds"] for line in self.fired}
        return [end.ended_seconds - struck[n] for n, end in failed.items() if n in struck]

    @property
    def recovery_seconds(self) -> list[float]:
        """From each fault that ended an attempt to the first step that the next one took."""
        found = []
        train = [e for e in self.events if e.kind == "train"]
        # The last one of an attempt is what ended it.
        struck = {line["attempt"]: line["monotonic_seconds"] for line in self.fired}
        for number, moment in struck.items():
            next_steps = [e for e in train if e.attempt == number + 1]
            if self.endings[number - 1].error is not None and next_steps:
                offset = self.endings[0].ended_unix_seconds - self.endings[0].ended_seconds
                found.append(next_steps[0].time_unix_seconds - offset - moment)
        return found

    @property
    def weights(self) -> dict[str, str]:
        """Hash of each file of the newest checkpoint."""
        manifest = read_manifest(list_checkpoints(self.run_dir)[0])
        return {file.name: file.sha256 for file in manifest.files}


@dataclass(frozen=True)
class Chaos:
    """Makes runs below one directory, breaks them, and starts them again."""

    root: Path
    prepared_dir: Path
    patch: pytest.MonkeyPatch

    def make(self, name: str, run: RunConfig) -> Path:
        return write_run(self.root / name, self.prepared_dir, run)

    def plan(self, run_dir: Path, *faults: dict[str, Any]) -> None:
        """Set the faults of the attempts that follow."""
        path = plan_path(run_dir)
        path.write_text(json.dumps(faults))
        self.patch.setenv(PLAN_VARIABLE, str(path))
        self.patch.setenv(ALLOW_VARIABLE, "1")
        self.patch.setenv(TIMEOUT_VARIABLE, str(GROUP_TIMEOUT_SECONDS))

    def survive(self, run_dir: Path, *faults: dict[str, Any], num_workers: int = 2) -> History:
        """Start a run again and again until it is complete, or has had its attempts."""
        self.plan(run_dir, *faults)
        endings: list[Ending] = []
        # One for each fault, and the last.
        while len(endings) <= len(faults) and not (endings and endings[-1].verdict == "complete"):
            endings.append(attempt(run_dir, num_workers=num_workers))
        return history(run_dir, endings)


def attempt(run_dir: Path, *, num_workers: int = 2, stop_after_steps: int | None = None) -> Ending:
    """Run the ranks once, as the train command does."""
    verdict, error = None, None
    try:
        with alone_in(run_dir):
            verdict = run_ranks(run_dir, num_workers, stop_after_steps)
    except LaunchError as exc:
        error = exc
    return Ending(
        verdict=verdict, error=error,
        ended_seconds=time.monotonic(), ended_unix_seconds=time.time(),
    )  # fmt: skip


def run_ranks(run_dir: Path, num_workers: int = 2, stop_after_steps: int | None = None) -> Verdict:
    """Run the ranks once, whoever owns the directory."""
    launcher = LocalLauncher(ClusterConfig(accelerator="cpu"), StopRequest(print))
    return launcher.run(run_dir, num_workers=num_workers, stop_after_steps=stop_after_steps)


def fault(phase: str, action: str, **fields: Any) -> dict[str, Any]:
    """Describe a fault of the first attempt, unless the fields say otherwise."""
    return {"id": f"{action}-{phase}", "phase": phase, "action": action, "attempt": 1, **fields}


def plan_path(run_dir: Path) -> Path:
    return run_dir.parent / f"{run_dir.name}.json"


def history(run_dir: Path, endings: list[Ending]) -> History:
    plan = plan_path(run_dir)
    return History(
        run_dir=run_dir,
        endings=endings,
        fired=_lines(plan.with_suffix(".fired.jsonl")),
        read=_lines(plan.with_suffix(".samples.jsonl")),
        events=read_events(run_dir / "events.jsonl"),
    )


def rewrite(run_dir: Path, **fields: Any) -> None:
    """Change fields of a run that is to be resumed, as its user may."""
    run = read_run(run_dir)
    changed = RunConfig.model_validate(run.model_dump() | fields)
    (run_dir / "run.yaml").write_text(dump_yaml(changed))


def ranks_alive() -> list[int]:
    """Give the processes of ranks and watchdogs that this process's launchers left."""
    return [
        child.pid
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE
        and ("pipeline.training.watchdog" in _command(child) or _is_rank(child))
    ]


@contextmanager
def nothing_left() -> Iterator[None]:
    """Check that the block leaves no rank, no watchdog and no shared memory behind."""
    before = set(Path("/dev/shm").iterdir())
    yield
    deadline = time.monotonic() + 10
    while (left := ranks_alive()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"processes outlived their run: {left}"
    made = {path for path in Path("/dev/shm").iterdir() if "torch" in path.name} - before
    assert not made, f"shared memory outlived its run: {made}"


def _is_rank(child: psutil.Process) -> bool:
    # Ranks are leaders of sessions of their own among the forks of the fork server.
    return "multiprocessing" in _command(child) and os.getsid(child.pid) == child.pid


def _command(child: psutil.Process) -> str:
    return " ".join(child.cmdline())


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
