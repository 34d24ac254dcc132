"""From a rank that is about to train to one whose phases are followed and watched."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from launch.rank_logs import LOG_NAME
from pipeline.config.load import read_run
from pipeline.tracking.events import next_attempt
from pipeline.training.heartbeat import Heartbeat
from pipeline.training.journal import EVENTS
from pipeline.training.phases import following
from pipeline.training.watchdog import Settings

DIRECTORY = ".heartbeats"
RECORDER_EVENTS = 2000
"""Collectives that NCCL's flight recorder keeps; the value of PyTorch's tutorial."""


@contextmanager
def watched(run_dir: Path) -> Iterator[None]:
    """Follow this rank while the block runs; the first rank of a host starts its watchdog.

    Args:
        run_dir: The run directory.

    Raises:
        ConfigError: The environment names a fault plan that cannot be used.
    """
    rank = int(os.environ.get("RANK", "0"))
    attempt = next_attempt(run_dir / EVENTS)
    limit_seconds = read_run(run_dir).guard.watchdog_seconds
    heartbeat = Heartbeat(run_dir / DIRECTORY, rank, attempt)
    # Written by C code, which needs neither the interpreter's lock nor the main thread.
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    watchdog = None
    if limit_seconds is not None and sys.platform == "linux":
        settings = _settings(run_dir, limit_seconds)
        _listen_for_recorder(settings, run_dir)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            watchdog = _start_watchdog(settings)
    try:
        with following(run_dir, heartbeat, attempt):
            yield
    finally:
        heartbeat.close()
        if watchdog is not None:
            watchdog.kill()
            watchdog.wait()


def _settings(run_dir: Path, limit_seconds: float) -> Settings:
    return Settings(
        directory=str(run_dir / DIRECTORY),
        limit_seconds=limit_seconds,
        report=str(run_dir / f"hangs.{os.uname().nodename}.jsonl"),
        logs=str(run_dir / LOG_NAME),
        recorder=str(run_dir / DIRECTORY / ".nccl-"),
    )


def _start_watchdog(settings: Settings) -> subprocess.Popen[bytes]:
    """Start it in a fresh interpreter: a fork of a rank would keep its sockets and memory."""
    project = str(Path(__file__).resolve().parent.parent)
    return subprocess.Popen(
        [sys.executable, "-S", "-m", "pipeline.training.watchdog", json.dumps(asdict(settings))],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": project},
        start_new_session=True,
    )


def _listen_for_recorder(settings: Settings, run_dir: Path) -> None:
    """Have NCCL record collectives, and write them when the watchdog asks for it.

    Source: torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp and FlightRecorder.cpp.
    """
    if os.environ.get("DS_ACCELERATOR") == "cuda":
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDER_EVENTS))
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(run_dir / "nccl-rank-"))
        os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_PIPE_FILE", settings.recorder)
