"""A request to stop holds for the whole command, whatever it was doing when the request came."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch.stopping import STOP_FILE, StopRequest
from pipeline.tracking.store import read_verdict

ROOT = Path(__file__).resolve().parents[2]


def test_a_request_outlives_the_run_it_was_made_in(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    said: list[str] = []
    stop = StopRequest(said.append)
    with stop.listening():
        with stop.reaching(first):
            os.kill(os.getpid(), signal.SIGTERM)
            assert (first / STOP_FILE).exists()
        assert not (first / STOP_FILE).exists()
        assert stop.is_made
        with stop.reaching(second):
            assert (second / STOP_FILE).exists()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert len(said) == 1
    assert "with a checkpoint" in said[0]


def test_a_request_of_an_earlier_command_is_dropped(tmp_path: Path) -> None:
    (tmp_path / STOP_FILE).touch()
    with StopRequest(print).reaching(tmp_path):
        assert not (tmp_path / STOP_FILE).exists()


def test_a_stopped_probe_is_promised_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "probe.yaml").touch()
    said: list[str] = []
    stop = StopRequest(said.append)
    with stop.reaching(tmp_path):
        stop.make()
        assert not (tmp_path / STOP_FILE).exists()
    assert len(said) == 1
    assert "starts over" in said[0]
    assert "checkpoint" not in said[0]


def test_signals_taken_by_somebody_else_are_taken_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest(print)
    with stop.listening():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with stop.reaching(tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
    assert stop.is_made
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_ctrl_c_in_the_last_step_of_a_cell_keeps_the_next_cell_from_starting(
    tiny_run: Path, tmp_path: Path
) -> None:
    run = yaml.safe_load(tiny_run.read_text())
    data = run["data"] | {"output_dir": str(tiny_run.parent / "runs" / "data")}
    study = {
        "name": "two-cells",
        "output_dir": str(tmp_path),
        "cluster": {"num_workers": 1, "accelerator": "cpu"},
        "base": {"data": data} | {name: run[name] for name in ("train", "eval", "tracking")},
        "families": {"gpt": {"model": run["model"]}},
        "seeds": [0, 1],
        "probes": [],
    }
    config = tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump(study))
    runs = tmp_path / "two-cells" / "runs"
    command = [sys.executable, "-m", "launch", "study", str(config)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        # Held still while its ranks end, the launcher gets the signal when nothing can stop any
        # more, and before it looks at the next cell.
        deadline = time.monotonic() + 90
        while not list(runs.glob("*/events.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        while not list(runs.glob("*/result.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        shown, _ = process.communicate(timeout=60)
    assert process.returncode == 75, shown
    assert [read_verdict(run_dir) for run_dir in runs.iterdir()] == ["complete"]
