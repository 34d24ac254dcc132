"""From a fault plan to faults that strike named ranks, steps and phases, each proven by a log.

A plan is a JSON list of `Fault`s in a file that TANDEM_FAULT_PLAN names. It is refused unless
TANDEM_ALLOW_FAULTS=1 is set as well, so that no plan reaches a real run by an inherited variable.
Before a fault strikes, a line goes to `<plan>.fired.jsonl` and to disk: a test that finds no line
there has tested nothing.
"""

import ctypes
import errno
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from pipeline.errors import ConfigError

PLAN_VARIABLE = "TANDEM_FAULT_PLAN"
ALLOW_VARIABLE = "TANDEM_ALLOW_FAULTS"

Phase = Literal[
    "data.next", "forward", "loss", "allreduce", "backward", "optimizer", "agree", "track.log",
    "evaluate", "checkpoint.write", "checkpoint.rename", "checkpoint.commit", "exit",
]  # fmt: skip
"""Where ranks pass by, in the order of a step; `loss` is a value that passes."""
Action = Literal[
    "kill", "terminate", "stop", "sleep", "hold_gil", "exit", "raise", "enospc", "allocate",
    "multiply",
]  # fmt: skip

ARGUMENTS: dict[Action, set[str]] = {
    "sleep": {"seconds"},
    "hold_gil": {"seconds"},
    "exit": {"code"},
    "allocate": {"bytes"},
    "multiply": {"factor"},
}
"""What an action needs in `args`; those left out need nothing."""


class Fault(BaseModel):
    """One thing that goes wrong; where a field is None, anything matches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Names it in the log of fired faults."""
    phase: Phase
    action: Action
    args: dict[str, float] = Field(default_factory=dict)
    """`seconds` of sleep and hold_gil, `code` of exit, `bytes` of allocate, `factor` of multiply,
    which may be nan."""
    rank: int | None = None
    host: str | None = None
    attempt: int | None = None
    """Which start of the run, from 1."""
    step: int | None = None
    """The optimizer step in progress, from 1; a checkpoint's is that of its state."""
    nth: int = Field(default=1, ge=1)
    """Strikes at the nth match in a process, and once in each."""

    @model_validator(mode="after")
    def _has_its_arguments(self) -> Self:
        needed = ARGUMENTS.get(self.action, set())
        if set(self.args) != needed:
            raise ValueError(
                f"args of {self.action} are {sorted(self.args)}, it takes {sorted(needed)}"
            )
        if (self.action == "multiply") != (self.phase == "loss"):
            raise ValueError(f"action={self.action} at phase={self.phase}: multiply goes with loss")
        return self


class FaultPlan:
    """The faults of one rank in one attempt."""

    def __init__(self, faults: list[Fault], log: Path, rank: int, attempt: int) -> None:
        """Keep the faults that can strike here.

        Args:
            faults: Of the whole plan.
            log: Takes a line for each fault that strikes.
            rank: This rank.
            attempt: Which start of the run this is, from 1.
        """
        place = {"rank": rank, "host": socket.gethostname(), "attempt": attempt}
        self._waiting = [
            fault
            for fault in faults
            if all(getattr(fault, name) in (None, value) for name, value in place.items())
        ]
        self._passed = dict.fromkeys((fault.id for fault in self._waiting), 0)
        self._place = place
        self._log = log

    def strike(self, phase: Phase, step: int) -> float:
        """Let the fault of this place strike, if there is one.

        Args:
            phase: Where the rank is.
            step: The optimizer step in progress.

        Returns:
            What a value that passes here is to be multiplied with; 1.0 unless a fault says so.
        """
        for fault in [f for f in self._waiting if f.phase == phase and f.step in (None, step)]:
            self._passed[fault.id] += 1
            if self._passed[fault.id] == fault.nth:
                self._waiting.remove(fault)
                self._prove(fault, step)
                ACTIONS[fault.action](fault)
                return fault.args.get("factor", 1.0)
        return 1.0

    def note_samples(self, step: int, sample_ids: list[int]) -> None:
        """Write down what this rank reads for a step, so that checkers need not trust its log."""
        line = self._place | {"step": step, "sample_ids": sample_ids}
        _append(self._log.with_suffix(".samples.jsonl"), line, is_durable=False)

    def _prove(self, fault: Fault, step: int) -> None:
        seen = {"phase": fault.phase, "step": step, "monotonic_seconds": time.monotonic()}
        _append(self._log.with_suffix(".fired.jsonl"), {"id": fault.id} | self._place | seen)


def load_plan(run_dir: Path, rank: int, attempt: int) -> FaultPlan | None:
    """Read the plan that the environment names.

    Args:
        run_dir: The run directory, in which no plan may lie: its log must outlive the run.
        rank: This rank.
        attempt: Which start of the run this is, from 1.

    Returns:
        None where the environment names none.

    Raises:
        ConfigError: The plan is not allowed, cannot be read, or is not a plan.
    """
    if not os.environ.get(PLAN_VARIABLE):
        return None
    path = Path(os.environ[PLAN_VARIABLE]).absolute()
    if os.environ.get(ALLOW_VARIABLE) != "1":
        raise ConfigError(
            f"{PLAN_VARIABLE}={path} asks for faults, but {ALLOW_VARIABLE} is not 1; unset the "
            "first for a real run, or set the second in a test of faults"
        )
    if path.is_relative_to(run_dir.absolute()):
        raise ConfigError(f"{PLAN_VARIABLE}={path} lies in the run directory; put it elsewhere")
    try:
        faults = TypeAdapter(list[Fault]).validate_json(path.read_bytes())
    except OSError as exc:
        raise ConfigError(f"cannot read {PLAN_VARIABLE}={path}: {exc.strerror}") from exc
    except ValidationError as exc:
        raise ConfigError(f"{path} is not a fault plan: {exc}") from exc
    return FaultPlan(faults, path, rank, attempt)


def _append(path: Path, line: dict[str, Any], *, is_durable: bool = True) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, json.dumps(line).encode() + b"\n")
        if is_durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _signal_self(number: signal.Signals) -> Callable[[Fault], None]:
    return lambda _: os.kill(os.getpid(), number)


def _hold_gil(fault: Fault) -> None:
    """Sleep without giving up the interpreter's lock, as a hung native library does."""
    end = time.monotonic() + fault.args["seconds"]
    # A signal whose handler returns ends libc's sleep early.
    while (left := end - time.monotonic()) > 0:
        ctypes.PyDLL(None).sleep(int(left) + 1)


def _raise(fault: Fault) -> None:
    raise RuntimeError(f"injected fault {fault.id}")


def _refuse_space(fault: Fault) -> None:
    raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (injected fault {fault.id})")


def _allocate(fault: Fault) -> None:
    """Write to so much memory; a limit below that ends the process."""
    bytearray(b"1") * int(fault.args["bytes"])


ACTIONS: dict[Action, Callable[[Fault], None]] = {
    "kill": _signal_self(signal.SIGKILL),
    "terminate": _signal_self(signal.SIGTERM),
    "stop": _signal_self(signal.SIGSTOP),
    "sleep": lambda fault: time.sleep(fault.args["seconds"]),
    "hold_gil": _hold_gil,
    "exit": lambda fault: os._exit(int(fault.args["code"])),
    "raise": _raise,
    "enospc": _refuse_space,
    "allocate": _allocate,
    "multiply": lambda _: None,
}
