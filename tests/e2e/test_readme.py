"""Every command of the README does what it says: run for real where that is cheap, else dry.

The two scripts are run by CI, `ray job submit` by `test_ray_job.py`, the ranks of `deepspeed` by
the launchers' contract.
"""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cli import main
from launch.environment import free_port
from launch.hostfile import HostfileLauncher
from launch.run_dirs import init_run
from launch.stopping import StopRequest
from pipeline.config.cluster import ClusterConfig
from pipeline.config.load import load_run
from pipeline.data.prepare import prepare
from pipeline.data.shards import load_manifest
from pipeline.tracking.events import EventWriter

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SCRIPTS = ("bash launch/quickstart.sh", "bash launch/test.sh")
RUN_FOR_REAL = ("doctor", "inspect", "ui")
"""Verbs with a test of their own below."""


def commands() -> Iterator[str]:
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield line.strip()


def words_of(verb: str) -> list[str]:
    """The words of the README's only command with a verb, behind the verb."""
    found = [line for line in commands() if line.startswith(f"python -m launch {verb}")]
    assert len(found) == 1
    return shlex.split(found[0])[4:]


def is_for_launch(command: str) -> bool:
    return " -m launch " in command and shlex.split(command)[3] not in RUN_FOR_REAL


def test_the_readme_opens_with_the_two_scripts() -> None:
    assert tuple(commands())[:2] == SCRIPTS


def test_no_command_of_the_readme_is_untested() -> None:
    others = [line for line in commands() if " -m launch " not in line and line not in SCRIPTS]
    assert [line.split()[0] for line in others] == ["source", "deepspeed"]


@pytest.mark.parametrize("command", list(filter(is_for_launch, commands())))
def test_a_command_of_the_readme_is_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "my_corpus"
    corpus.mkdir()
    (corpus / "text.jsonl").write_text('{"text": "to be"}\n')
    run_dir = tmp_path / "gpt-hosts"
    run_dir.mkdir()
    here = command.replace("my_corpus/", f"{corpus}/").replace("runs/gpt-hosts", str(run_dir))
    words = shlex.split(here)
    if words[:3] == ["ray", "job", "submit"]:
        assert words[3:6] == ["--working-dir", ".", "--"]
        words = words[6:]
    assert words[:3] == ["python", "-m", "launch"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TANDEM_OUTPUT", str(tmp_path))
    assert main([*words[3:], "--dry-run"]) == 0


def test_the_deepspeed_command_is_the_one_that_the_hostfile_launcher_runs(tmp_path: Path) -> None:
    (command,) = (line for line in commands() if line.startswith("deepspeed"))
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("node1 slots=1\nnode2 slots=1\n")
    cluster = ClusterConfig(launcher="hostfile", hostfile=hosts)
    launcher = HostfileLauncher(cluster, StopRequest(print))
    run = launcher.command(Path("runs/gpt-hosts"), num_workers=2)
    port = run.index("--master_port")
    assert [*run[:port], *run[port + 2 :]] == command.replace("hosts.txt", str(hosts)).split()


def test_doctor_finds_nothing_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words_of("doctor")]) == 0
    assert "deepspeed" in capsys.readouterr().out


@pytest.fixture
def run_dir(tiny_run: Path, migrated_store: Path, tmp_path: Path) -> Path:
    """A run that has written one step, its shards shared with other tests."""
    shutil.copy(migrated_store, tmp_path)
    shards = tiny_run.parent / "runs" / "data"
    run = load_run(tiny_run, [f"output_dir={tmp_path}", f"data.output_dir={shards}"])
    made = init_run(run, prepare)
    with EventWriter(made / "events.jsonl", attempt=1) as events:
        events.write("start", 0)
        events.write("train", 1, {"train/loss": 5.0})
    return made


@pytest.mark.slow
def test_inspect_shows_what_shards_hold(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared_dir = load_run(run_dir / "run.yaml").data.prepared_dir
    words = [
        word.replace("runs/data/FINGERPRINT", str(prepared_dir)) for word in words_of("inspect")
    ]
    assert words == [str(prepared_dir)]
    assert main(["inspect", *words]) == 0
    # Few words leave nothing to merge before the 300 entries that the run asks for.
    vocab_size = load_manifest(prepared_dir).vocab_size
    assert f"vocabulary {vocab_size}" in capsys.readouterr().out


@pytest.mark.slow
def test_ui_prints_the_page_of_the_newest_runs_and_serves_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["sync", str(run_dir)]) == 0
    monkeypatch.setenv("TANDEM_OUTPUT", str(run_dir.parent))
    port = free_port()
    command = [sys.executable, "-m", "launch", "ui", *words_of("ui"), "--port", str(port)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            page = server.stdout.readline()
            assert re.search(rf"http://127\.0\.0\.1:{port}/#/experiments/\d+/runs\?workflow", page)
            assert answers(f"http://127.0.0.1:{port}/health")
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=30)


def answers(address: str) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            time.sleep(0.3)
    return False
