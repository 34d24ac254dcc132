"""Two hosts that reach each other by ssh train as one machine does, and say what they lack."""

import json
import re
import secrets
import subprocess
import time
from pathlib import Path

import pytest

from launch.rank_environment import environment_of_deepspeed
from pipeline.tracking.store import read_result
from tests.hosts.machines import ROOT, Machine
from tests.hosts.runs import local_losses, losses_of, new_run

pytestmark = [pytest.mark.netns, pytest.mark.slow]

HOSTS = ["node1", "node2"]
RUN_SECONDS = 150


@pytest.fixture(scope="module")
def ssh_hosts(
    hosts: dict[str, Machine], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Machine]:
    """The hosts, each with an sshd that lets the others in by key."""
    place = tmp_path_factory.mktemp("ssh")
    make_key(place / "id")
    known = []
    for name, host in hosts.items():
        key = place / f"{name}.key"
        make_key(key)
        known.append(f"{name},{host.address} {key.with_suffix('.key.pub').read_text()}")
        config = place / f"{name}.conf"
        config.write_text(
            f"Port 22\nListenAddress {host.address}\nHostKey {key}\nPidFile {place}/{name}.pid\n"
            f"AuthorizedKeysFile {place}/id.pub\nStrictModes no\nUsePAM no\n"
        )
        started = host.run(["/usr/sbin/sshd", "-f", config], timeout_seconds=20)
        assert started.returncode == 0, started.stderr
    (place / "known").write_text("".join(known))
    (place / "config").write_text(
        f"Host *\nIdentityFile {place}/id\nIdentitiesOnly yes\nUserKnownHostsFile {place}/known\n"
    )
    # ssh takes its files from the home of /etc/passwd, whatever HOME says.
    (place / "bin").mkdir()
    shim = place / "bin" / "ssh"
    shim.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {place}/config "$@"\n')
    shim.chmod(0o755)
    for host in hosts.values():
        host.variables["PATH"] = f"{shim.parent}:{host.environment()['PATH']}"
    return hosts


def make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


@pytest.fixture(scope="module")
def hostfile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostfile") / "hosts"
    path.write_text("node1 slots=1\nnode2 slots=1\n")
    return path


def train_command(run_dir: Path, hostfile: Path, verb: str = "train") -> list[str]:
    words = ["python", "-m", "launch", verb, str(run_dir), "--launcher", "hostfile"]
    words += ["--workers", "2", f"cluster.hostfile={hostfile}", "cluster.accelerator=cpu"]
    return words


@pytest.mark.parametrize(("family", "stage"), [("gpt", 3), ("lstm_attention", 1)])
def test_two_ssh_hosts_give_the_losses_of_one_machine_and_show_no_secret(
    family: str, stage: int, ssh_hosts: dict[str, Machine], hostfile: Path, tiny_run: Path
) -> None:
    run_dir = new_run(tiny_run, f"ssh-{family}", family, stage)
    canary = secrets.token_hex(16)
    planted = {"MLFLOW_TRACKING_TOKEN": canary, "TANDEM_CANARY": canary}
    home = ssh_hosts["node1"].place / "home"
    (home / ".deepspeed_env").write_text(f"PLANTED={canary}\n")
    process = ssh_hosts["node1"].start(
        train_command(run_dir, hostfile), run_dir / "console.log", planted
    )
    seen = watch_command_lines(process, run_dir)
    console = (run_dir / "console.log").read_text()
    assert process.returncode == 0, console + (run_dir / "launcher.log").read_text()[-3000:]

    assert any("pdsh" in line for line in seen)
    assert not [line for line in seen if canary in line]
    assert sorted(json.loads(path.read_text())["host"] for path in run_dir.glob("rank-*.json")) == [
        "node1",
        "node2",
    ]
    for path in run_dir.rglob("*"):
        assert not path.is_file() or canary.encode() not in path.read_bytes(), path
    result = read_result(run_dir)
    assert (result.world_size, result.zero_stage, result.family) == (2, stage, family)
    assert losses_of(run_dir) == local_losses(tiny_run, f"ssh-{family}-local", family, stage)


def watch_command_lines(process: subprocess.Popen[bytes], run_dir: Path) -> set[str]:
    """Collect what any user of the hosts could read of a run's processes until it ends."""
    seen = set()
    deadline = time.monotonic() + RUN_SECONDS
    while process.poll() is None:
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(run_dir) in line:
                seen.add(line)
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"the run did not end: {(run_dir / 'console.log').read_text()}")
        time.sleep(0.5)
    return seen


def test_a_rank_gets_the_launchers_variables_and_its_failure_names_rank_host_and_cause(
    ssh_hosts: dict[str, Machine], hostfile: Path, tiny_run: Path
) -> None:
    run_dir = new_run(tiny_run, "ssh-interface", "gpt", 1)
    shown = ssh_hosts["node1"].run(
        train_command(run_dir, hostfile), RUN_SECONDS, {"GLOO_SOCKET_IFNAME": "eth9"}
    )
    assert shown.returncode == 1, shown.stdout + shown.stderr
    failure = r"rank \d of ssh-interface on node\d before its first step failed with .*eth9"
    assert_found(failure, shown.stderr)
    assert not (run_dir / "rank-environment.json").exists()


def test_a_host_that_lacks_the_storage_or_does_not_answer_is_named_before_the_start(
    ssh_hosts: dict[str, Machine], hostfile: Path, tiny_run: Path
) -> None:
    run_dir = new_run(tiny_run, "ssh-storage", "gpt", 1)
    shards = tiny_run.parent / "runs" / "data"
    with ssh_hosts["node2"].without(run_dir):
        shown = ssh_hosts["node1"].run(train_command(run_dir, hostfile), RUN_SECONDS)
    assert shown.returncode == 1
    assert f"node2 does not have the run directory {run_dir}" in shown.stderr
    with ssh_hosts["node2"].without(shards):
        shown = ssh_hosts["node1"].run(train_command(run_dir, hostfile), RUN_SECONDS)
    assert_found("node2 does not have the shards .*data", shown.stderr)
    assert "node1 does not" not in shown.stderr
    hostfile_with_a_stranger = hostfile.with_name("stranger")
    hostfile_with_a_stranger.write_text("node1 slots=1\nnode9 slots=1\n")
    shown = ssh_hosts["node1"].run(train_command(run_dir, hostfile_with_a_stranger), RUN_SECONDS)
    assert_found("node9 does not answer by ssh: .*not known", shown.stderr)
    assert not list(run_dir.glob("rank-*.json")), "ranks were started"


def assert_found(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


def test_hosts_without_ssh_run_the_commands_that_init_shows(
    hosts: dict[str, Machine], hostfile: Path, tiny_run: Path
) -> None:
    run_dir = new_run(tiny_run, "no-ssh", "gpt", 1)
    shown = hosts["node1"].run([*train_command(run_dir, hostfile, "init"), "--json"], 60)
    assert shown.returncode == 0, shown.stderr
    commands = json.loads(shown.stdout)["command_by_host"]
    assert list(commands) == HOSTS
    # Else `deepspeed` would load MLflow in four processes, as it does wherever it finds it.
    lean = {"PYTHONPATH": environment_of_deepspeed(ROOT)["PYTHONPATH"]}
    started = {
        name: hosts[name].start(words, run_dir / f"{name}.log", lean)
        for name, words in commands.items()
    }
    for name, process in started.items():
        assert process.wait(timeout=RUN_SECONDS) == 0, (run_dir / f"{name}.log").read_text()[-3000:]
    assert losses_of(run_dir) == local_losses(tiny_run, "no-ssh-local", "gpt", 1)
