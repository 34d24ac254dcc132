"""A signal to one rank stops the whole command as agreed, whoever sent it."""

import os
import signal
from pathlib import Path

import pytest

from pipeline.tracking.events import read_events
from pipeline.tracking.store import read_verdict
from tests.launch.test_local import interruptible_train, ranks_below


@pytest.mark.slow
def test_sigterm_to_one_rank_stops_the_command_with_75(tiny_run: Path) -> None:
    with interruptible_train(tiny_run, "one-rank-asked") as (process, run_dir):
        ranks = ranks_below(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGTERM)
        shown, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped with a checkpoint" in shown
    assert read_verdict(run_dir) == "stopped"
    stop = read_events(run_dir / "events.jsonl")[-1]
    assert (stop.kind, stop.values["reason"]) == ("stop", "signal")
