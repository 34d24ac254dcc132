"""From a run directory to ranks on ssh hosts: DeepSpeed's own launcher and a hostfile."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from launch.environment import LAUNCHER_PORT, free_port
from launch.rank_logs import last_lines
from launch.stopping import StopRequest, is_probe
from pipeline.config.cluster import ClusterConfig
from pipeline.errors import ConfigError, LaunchError
from pipeline.tracking.store import Verdict, clear_stopped, read_verdict

POLL_SECONDS = 0.5
END_SECONDS = 40
"""How long `deepspeed` may take to end its ranks: it gives each of them 30 s."""


SECRETS = "MLFLOW"
"""Prefix of variables that `deepspeed` would put on the remote command line and into its log."""


class HostfileLauncher:
    """Starts one rank per slot of a hostfile with `deepspeed` and waits for their verdict."""

    def __init__(self, cluster: ClusterConfig, stop: StopRequest) -> None:
        """Read the hostfile.

        Args:
            cluster: Names the hostfile; threads per rank and accelerator.
            stop: Passed on to the ranks.

        Raises:
            ConfigError: No hostfile is named, or it cannot be used.
        """
        if cluster.hostfile is None:
            raise ConfigError(
                "cluster.launcher=hostfile needs cluster.hostfile: a file of lines `host slots=N`"
            )
        self._cluster = cluster
        self._hostfile = cluster.hostfile.absolute()
        self._slots = read_hostfile(self._hostfile)
        self._stop = stop

    def command(self, run_dir: Path, *, num_workers: int) -> list[str]:
        """Give the `deepspeed` command.

        The first host's name is passed as master address: the launcher's own guess takes the first
        address of that host, which may be on the wrong network. A single host that is not this
        machine needs a word more, or `deepspeed` would start the ranks here.

        Raises:
            ConfigError: The hostfile's slots are not as many as the ranks.
        """
        return self._command(run_dir, num_workers, LAUNCHER_PORT)

    def _command(self, run_dir: Path, num_workers: int, port: int) -> list[str]:
        num_slots = sum(self._slots.values())
        if num_slots != num_workers:
            raise ConfigError(
                f"{self._hostfile} has {num_slots} slots, but num_workers={num_workers}; "
                f"nearest: num_workers={num_slots}"
            )
        address = next(iter(self._slots))
        way: list[str] = []
        if len(self._slots) == 1 and is_here(address):
            address, way = "127.0.0.1", ["--no_ssh_check"]
        elif len(self._slots) == 1:
            way = ["--force_multi"]
        return [
            "deepspeed",
            "--hostfile", str(self._hostfile),
            "--master_addr", address,
            "--master_port", str(port),
            *way,
            "--module", "launch.worker", "--run", str(run_dir),
            *self._worker_options(),
        ]  # fmt: skip

    def _worker_options(self) -> list[str]:
        """Give what ranks cannot take from variables, as `deepspeed` passes almost none on."""
        options = []
        if self._cluster.threads_per_worker != 1:
            options += ["--threads", str(self._cluster.threads_per_worker)]
        if self._cluster.accelerator != "auto":
            options += ["--accelerator", self._cluster.accelerator]
        return options

    def run(
        self, run_dir: Path, *, num_workers: int, stop_after_steps: int | None = None
    ) -> Verdict:
        """Run all ranks of a run directory that every host sees, to their verdict.

        Raises:
            LaunchError: The launcher failed, or left no verdict; its last output is quoted.
        """
        run_dir = run_dir.absolute()
        # Over several hosts only a known port can be let through; here any free one does, so that
        # two runs on one machine do not meet.
        is_local = all(is_here(host) for host in self._slots)
        port = free_port() if is_local else LAUNCHER_PORT
        command = self._command(run_dir, num_workers, port)
        if stop_after_steps is not None:
            command += ["--stop-after-steps", str(stop_after_steps)]
        log = run_dir / "launcher.log"
        # What an earlier attempt left must not pass for the verdict of this one.
        clear_stopped(run_dir)
        with self._stop.reaching(run_dir), log.open("ab") as stream:
            process = subprocess.Popen(
                [find_deepspeed(), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment_without_secrets(),
            )
            code = _wait(process, lambda: is_probe(run_dir) and self._stop.is_made)
        if code is None:
            return read_verdict(run_dir) or "stopped"
        # The launcher exits with 0 when a signal killed its child; only the run directory tells.
        verdict = read_verdict(run_dir) if code == 0 else None
        if verdict is None:
            raise LaunchError(
                f"deepspeed ended with exit code {code} and without a verdict in {run_dir}; "
                f"log: {log}\n{last_lines(log)}"
            )
        return verdict


def read_hostfile(path: Path) -> dict[str, int]:
    """Read hosts and their slots; DeepSpeed alone would run on this machine if the file is missing.

    Raises:
        ConfigError: The file is missing, empty, or has a line that is not `host slots=N`.
    """
    try:
        text = path.read_text()
    except OSError as exc:
        raise ConfigError(f"cannot read cluster.hostfile {path}: {exc.strerror}") from exc
    slots: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        count = words[-1].removeprefix("slots=")
        if len(words) != 2 or not count.isdigit() or int(count) < 1:
            raise ConfigError(f"{path}:{number}: {line!r} is not of the form `host slots=N`")
        if words[0] in slots:
            raise ConfigError(f"{path}:{number}: host {words[0]} stands twice")
        slots[words[0]] = int(count)
    if not slots:
        raise ConfigError(f"{path} names no host; write lines of the form `host slots=N`")
    return slots


def is_here(host: str) -> bool:
    """Tell whether a name of a hostfile is this machine's."""
    return host in ("localhost", "127.0.0.1", "::1", socket.gethostname())


def environment_without_secrets() -> dict[str, str]:
    """Give this process's variables without those of MLflow, of which ranks need none."""
    return {name: value for name, value in os.environ.items() if not name.startswith(SECRETS)}


def find_deepspeed() -> str:
    """Give the `deepspeed` program of this Python's environment.

    Raises:
        LaunchError: It is not installed.
    """
    beside = Path(sys.executable).parent
    found = shutil.which("deepspeed", path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise LaunchError("the deepspeed program is not installed in this environment")
    return found


def _wait(process: subprocess.Popen[bytes], end_early: Callable[[], bool]) -> int | None:
    """Wait for the launcher, and give its exit code, or None when it was ended early.

    A second request to stop ends it as well. The launcher ends its ranks; those of this machine
    that it lost, as it does when a signal kills what it started, are ended here.
    """
    try:
        while not end_early():
            try:
                return process.wait(timeout=POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        return None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
