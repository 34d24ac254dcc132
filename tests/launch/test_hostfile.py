"""Hostfiles are read strictly: DeepSpeed alone would fall back to this machine."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from launch.hostfile import HostfileLauncher, read_hostfile
from launch.stopping import StopRequest
from launch.worker import set_environment
from pipeline.config.cluster import ClusterConfig
from pipeline.errors import ConfigError, LaunchError


def test_slots_are_read_by_host(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two machines\nnode-a slots=4\n\nnode-b slots=2  # small\n")
    assert read_hostfile(path) == {"node-a": 4, "node-b": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no host"),
        ("node-a slots=0", ":1: 'node-a slots=0' is not of the form"),
        ("node-a slots=1\nnode-b", ":2: 'node-b' is not of the form"),
        ("node-a slots=1\nnode-a slots=1", ":2: host node-a stands twice"),
        ("$(touch${IFS}x) slots=1", ":1: '$(touch${IFS}x)' is not the name of a host"),
        ("-oProxyCommand=x slots=1", ":1: '-oProxyCommand=x' is not the name of a host"),
    ],
)
def test_a_wrong_hostfile_is_refused_by_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert message in str(caught.value)


def test_ranks_and_slots_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("node-a slots=4\nnode-b slots=2\n")
    launcher = HostfileLauncher(
        ClusterConfig(launcher="hostfile", hostfile=path), StopRequest(print)
    )
    with pytest.raises(ConfigError, match="nearest: num_workers=6"):
        launcher.command(tmp_path, num_workers=2)
    assert launcher.command(tmp_path, num_workers=6)[:3] == ["deepspeed", "--hostfile", str(path)]


def launcher_for(
    tmp_path: Path, hosts: str, stop: StopRequest | None = None, **fields: object
) -> HostfileLauncher:
    path = tmp_path / "hosts"
    path.write_text(hosts)
    cluster = ClusterConfig.model_validate({"launcher": "hostfile", "hostfile": path, **fields})
    return HostfileLauncher(cluster, stop or StopRequest(print))


def test_a_single_host_is_this_machine_only_under_a_local_name(tmp_path: Path) -> None:
    elsewhere = launcher_for(tmp_path, "node-a slots=2\n").command(tmp_path, num_workers=2)
    assert "--force_multi" in elsewhere
    here = launcher_for(tmp_path, "localhost slots=2\n").command(tmp_path, num_workers=2)
    assert "--force_multi" not in here
    assert here[here.index("--master_addr") + 1] == "127.0.0.1"


def test_threads_and_accelerator_reach_the_ranks_as_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = launcher_for(tmp_path, "node-a slots=2\n", threads_per_worker=3, accelerator="cpu")
    command = launcher.command(tmp_path, num_workers=2)
    assert command[-4:] == ["--threads", "3", "--accelerator", "cpu"]
    # As DeepSpeed's launcher leaves them on a host with GPUs.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    for name in ("PYTORCH_NVML_BASED_CUDA_CHECK", "PYTHONUNBUFFERED"):
        monkeypatch.setenv(name, "1")
    set_environment("cpu", 3)
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    set_environment("auto", None)
    assert os.environ["OMP_NUM_THREADS"] == "2"


ANSWERS = """
import sys
hosts, command = sys.argv[sys.argv.index("-w") + 1].split(","), sys.argv[-1]
if "echo here" in command:
    for host in hosts:
        for word in ({words}):
            print(f"{{host}}: {{word}}")
    sys.exit()
if "pkill" in command:
    open({ended!r}, "w").write(command)
    sys.exit()
"""
"""What every `pdsh` of these tests does first: say that all is there, and note what it ends."""


def make_programs(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    pdsh: str,
    words: tuple[str, ...] = ("has-0", "has-1", "here"),
) -> None:
    """Put an `ssh` that reaches every host and a `pdsh` of one's own first on PATH."""
    programs = directory / "bin"
    programs.mkdir()
    answers = ANSWERS.format(words=words, ended=str(directory / "ended"))
    for name, body in {"ssh": "", "pdsh": answers + pdsh}.items():
        program = programs / name
        program.write_text(f"#!{sys.executable}\n{body}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")


def test_a_host_that_lacks_something_stops_the_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_programs(tmp_path, monkeypatch, "", words=("has-1", "here"))
    with pytest.raises(LaunchError) as caught:
        launcher_for(tmp_path, "node-a slots=1\nnode-b slots=1\n").run(tmp_path, num_workers=2)
    for host in ("node-a", "node-b"):
        assert f"{host} does not have the run directory {tmp_path}" in str(caught.value)
    assert not (tmp_path / "launcher.log").exists()
    assert not (tmp_path / ".seen-by-hosts").exists()


@pytest.mark.parametrize("name", ["a b", "x;touch y", "$(id)", "100%h"])
def test_a_path_that_a_remote_shell_would_read_is_refused(tmp_path: Path, name: str) -> None:
    launcher = launcher_for(tmp_path, "node-a slots=2\n")
    with pytest.raises(ConfigError, match="which a shell on the hosts would read"):
        launcher.command(tmp_path / name, num_workers=2)


def test_every_host_has_a_command_of_its_own_where_there_is_no_ssh(tmp_path: Path) -> None:
    launcher = launcher_for(tmp_path, "node-a slots=4\nnode-b slots=4\n", accelerator="cpu")
    commands = launcher.commands_by_host(tmp_path, num_workers=8)
    assert list(commands) == ["node-a", "node-b"]
    for number, words in enumerate(commands.values()):
        assert words[words.index("--master_addr") + 1] == "node-a"
        assert words[words.index("--node_rank") + 1] == str(number)
        assert words.index("--no_ssh") < words.index("--module")
        assert words[-4:] == ["--run", str(tmp_path), "--accelerator", "cpu"]


@pytest.mark.slow
def test_no_token_leaves_this_machine_or_enters_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen.json"
    record = f"json.dump([sys.argv, dict(os.environ)], open({str(seen)!r}, 'w'))"
    make_programs(tmp_path, monkeypatch, f"import json, os, sys; {record}")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a-planted-token")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:a-planted-token@tracking")
    with pytest.raises(LaunchError, match="without a verdict") as caught:
        launcher_for(tmp_path, "node-a slots=2\n").run(tmp_path, num_workers=2)
    arguments, variables = json.loads(seen.read_text())
    assert arguments[arguments.index("-w") + 1] == "node-a"
    assert not [name for name in variables if name.startswith("MLFLOW")]
    assert variables["DS_ENV_FILE"] == os.devnull
    assert "BatchMode=yes" in variables["PDSH_SSH_ARGS_APPEND"]
    log = (tmp_path / "launcher.log").read_text()
    assert "cmd = pdsh" in log
    for text in (log, seen.read_text(), str(caught.value)):
        assert "a-planted-token" not in text


ORPHAN = """
import os, signal, subprocess, sys
from pathlib import Path
Path({pid_file!r}).write_text(str(subprocess.Popen(["sleep", "60"]).pid))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_launcher_that_lost_its_ranks_and_exits_well_is_a_failure_that_ends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = tmp_path / "pid"
    make_programs(tmp_path, monkeypatch, ORPHAN.format(pid_file=str(pid_file)))
    (tmp_path / "stopped.json").write_text("{}")
    with pytest.raises(LaunchError, match="exit code 0 and without a verdict"):
        launcher_for(tmp_path, "node-a slots=2\n").run(tmp_path, num_workers=2)
    assert (tmp_path / "ended").read_text().startswith("pkill -KILL -f -- '--run [/]")
    orphan = int(pid_file.read_text())
    deadline = time.monotonic() + 5
    while is_alive(orphan) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(orphan)


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


LONG_WORK = """
import time
from pathlib import Path
Path({started!r}).touch()
time.sleep(600)
"""


@pytest.mark.slow
def test_a_stopped_probe_is_ended_without_waiting_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "started"
    make_programs(tmp_path, monkeypatch, LONG_WORK.format(started=str(started)))
    (tmp_path / "probe.yaml").touch()
    stop = StopRequest(print)
    launcher = launcher_for(tmp_path, "node-a slots=2\n", stop)

    def stop_when_started() -> None:
        while not started.exists():
            time.sleep(0.05)
        stop.make()

    threading.Thread(target=stop_when_started, daemon=True).start()
    assert launcher.run(tmp_path, num_workers=2) == "stopped"
    assert started.exists()
    # DeepSpeed itself would end every run of this user there.
    assert "deepspeed.launcher.launch" not in (tmp_path / "ended").read_text()
