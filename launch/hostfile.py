"""From a run directory to ranks on ssh hosts: DeepSpeed's own launcher and a hostfile."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from launch.environment import LAUNCHER_PORT, free_port
from launch.rank_environment import environment_of_deepspeed, rank_environment_file
from launch.rank_logs import last_lines
from launch.rank_record import clear_records, first_failure, read_records
from launch.remote_hosts import check_hosts, check_shell_safe, end_ranks
from launch.stopping import StopRequest, is_probe
from pipeline.config.cluster import ClusterConfig
from pipeline.errors import ConfigError, LaunchError
from pipeline.tracking.store import Verdict, clear_stopped, read_verdict

POLL_SECONDS = 0.5
PROJECT_DIR = Path(__file__).resolve().parent.parent


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
            ConfigError: The hostfile's slots are not as many as the ranks, or a shell on the hosts
                would misread the run directory.
        """
        return self._command(run_dir, num_workers, LAUNCHER_PORT)

    def commands_by_host(self, run_dir: Path, *, num_workers: int) -> dict[str, list[str]]:
        """Give the commands, one a host, that start the ranks where ssh is not to be had.

        Raises:
            ConfigError: As `command`.
        """
        self._check(run_dir, num_workers)
        return {
            host: [
                *self._start(next(iter(self._slots)), LAUNCHER_PORT),
                "--no_ssh", "--node_rank", str(number),
                *self._worker(run_dir),
            ]
            for number, host in enumerate(self._slots)
        }  # fmt: skip

    def _command(self, run_dir: Path, num_workers: int, port: int) -> list[str]:
        self._check(run_dir, num_workers)
        address = next(iter(self._slots))
        way: list[str] = []
        if len(self._slots) == 1 and is_here(address):
            address, way = "127.0.0.1", ["--no_ssh_check"]
        elif len(self._slots) == 1:
            way = ["--force_multi"]
        return [*self._start(address, port), *way, *self._worker(run_dir)]

    def _check(self, run_dir: Path, num_workers: int) -> None:
        check_shell_safe(run_dir)
        num_slots = sum(self._slots.values())
        if num_slots != num_workers:
            raise ConfigError(
                f"{self._hostfile} has {num_slots} slots, but num_workers={num_workers}; "
                f"nearest: num_workers={num_slots}"
            )

    def _start(self, address: str, port: int) -> list[str]:
        place = ["--master_addr", address, "--master_port", str(port)]
        return ["deepspeed", "--hostfile", str(self._hostfile), *place]

    def _worker(self, run_dir: Path) -> list[str]:
        """Give what every rank runs; threads and device are arguments, as they must not be lost."""
        options = ["--module", "launch.worker", "--run", str(run_dir)]
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
            LaunchError: A host lacks something, or a rank failed: its place, step and cause are
                named, and the launcher's last output is quoted.
        """
        run_dir = run_dir.absolute()
        # Over several hosts only a known port can be let through; here any free one does, so that
        # two runs on one machine do not meet.
        is_local = all(is_here(host) for host in self._slots)
        port = free_port() if is_local else LAUNCHER_PORT
        command = self._command(run_dir, num_workers, port)
        if stop_after_steps is not None:
            command += ["--stop-after-steps", str(stop_after_steps)]
        environment = environment_of_deepspeed(PROJECT_DIR)
        hosts = [] if is_local else list(self._slots)
        if hosts:
            check_hosts(hosts, run_dir, environment)
        # What an earlier attempt left must not pass for what this one says.
        clear_stopped(run_dir)
        clear_records(run_dir)
        with ExitStack() as stack:
            stack.enter_context(self._stop.reaching(run_dir))
            stack.enter_context(rank_environment_file(run_dir))
            code = None
            try:
                code = self._wait_for(command, run_dir, environment)
            finally:
                # Also where the launcher lost its ranks: when a signal killed what it started.
                if hosts and (code != 0 or read_verdict(run_dir) is None):
                    end_ranks(hosts, run_dir, environment)
        verdict = read_verdict(run_dir)
        if code is None:
            return verdict or "stopped"
        # The launcher exits with 0 when a signal killed its child; only the run directory tells.
        if code != 0 or verdict is None:
            raise _explain(code, run_dir)
        return verdict

    def _wait_for(
        self, command: list[str], run_dir: Path, environment: Mapping[str, str]
    ) -> int | None:
        """Run `deepspeed` to its end; None when it was ended early."""
        with (run_dir / "launcher.log").open("ab") as stream:
            process = subprocess.Popen(
                [find_deepspeed(), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Every host has this directory, and no file of DeepSpeed's stands in it.
                cwd=run_dir,
                env=environment,
            )
        return _wait(process, lambda: is_probe(run_dir) and self._stop.is_made)


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
        if not re.fullmatch(r"[\w:][\w.:-]*", words[0], re.ASCII):
            raise ConfigError(f"{path}:{number}: {words[0]!r} is not the name of a host")
        if words[0] in slots:
            raise ConfigError(f"{path}:{number}: host {words[0]} stands twice")
        slots[words[0]] = int(count)
    if not slots:
        raise ConfigError(f"{path} names no host; write lines of the form `host slots=N`")
    return slots


def is_here(host: str) -> bool:
    """Tell whether a name of a hostfile is this machine's."""
    return host in ("localhost", "127.0.0.1", "::1", socket.gethostname())


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


def _explain(code: int, run_dir: Path) -> LaunchError:
    log = run_dir / "launcher.log"
    ending = (
        f"deepspeed ended with exit code {code} and without a verdict in {run_dir}; "
        f"log: {log}\n{last_lines(log)}"
    )
    if not read_records(run_dir):
        return LaunchError(ending)
    failure = first_failure(run_dir)
    error = LaunchError(f"{failure}\n{ending}")
    error.exit_code = failure.exit_code
    return error


def _wait(process: subprocess.Popen[bytes], end_early: Callable[[], bool]) -> int | None:
    """Wait for the launcher, and give its exit code, or None when it was ended early.

    A second request to stop ends it as well. It is killed: asked to end, DeepSpeed's launcher would
    kill other runs of this user on the hosts too. What it started on this machine ends here.
    """
    try:
        while not end_early():
            try:
                return process.wait(timeout=POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
