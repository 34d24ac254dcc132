"""From the names of a hostfile to what stands on those hosts: asked and ended by pdsh, over ssh."""

import re
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from launch.run_dirs import shared_shards_of
from pipeline.errors import ConfigError, LaunchError

TOKEN_FILE = ".seen-by-hosts"
ANSWER_SECONDS = 60
"""How long all hosts together may take to answer; ssh itself gives up on one after 10 s."""


def check_hosts(hosts: Sequence[str], run_dir: Path, environment: Mapping[str, str]) -> None:
    """Check that each host answers, sees the run directory and the shards, and has this Python.

    DeepSpeed only asks whether the first one answers, and the ranks would wait for each other.

    Args:
        hosts: Names as ssh knows them.
        run_dir: The run directory; takes a token for as long as this lasts.
        environment: Variables of pdsh.

    Raises:
        LaunchError: Some host does not; each is named with what it lacks.
    """
    token = uuid.uuid4().hex
    wanted = {
        f"the run directory {run_dir}": f"grep -q {token} {shlex.quote(str(run_dir / TOKEN_FILE))}",
        f"the Python {sys.executable}": f"test -x {shlex.quote(sys.executable)}",
    }
    if (shards := shared_shards_of(run_dir)) is not None:
        wanted[f"the shards {shards}"] = f"test -r {shlex.quote(str(shards / 'manifest.json'))}"
    # Each test says its number when it holds, so that silence names what is missing.
    questions = [f"{test} && echo has-{number}" for number, test in enumerate(wanted.values())]
    (run_dir / TOKEN_FILE).write_text(token)
    try:
        answer = _on_all(hosts, "; ".join([*questions, "echo here"]), environment)
    finally:
        (run_dir / TOKEN_FILE).unlink(missing_ok=True)
    problems = []
    for host in hosts:
        said = re.findall(rf"(?m)^{re.escape(host)}: (\S+)", answer.stdout)
        lacking = [what for number, what in enumerate(wanted) if f"has-{number}" not in said]
        if "here" not in said:
            words = re.findall(rf"(?m)^.*\b{re.escape(host)}: (.+)", answer.stderr)
            problems.append(f"{host} does not answer by ssh: {'; '.join(words) or 'no word'}")
        elif lacking:
            problems.append(f"{host} does not have {', '.join(lacking)}")
    if problems:
        raise LaunchError(
            "nothing was started: every host needs the same storage and the same environment under "
            "the same paths, and ssh without a password:\n  " + "\n  ".join(problems)
        )


def end_ranks(hosts: Sequence[str], run_dir: Path, environment: Mapping[str, str]) -> None:
    """Kill what is left of one run on its hosts.

    DeepSpeed would kill whatever its launcher runs there for this user, other runs included.

    Args:
        hosts: Names as ssh knows them.
        run_dir: The run whose processes end.
        environment: Variables of pdsh.
    """
    # The bracket keeps the pattern from matching the shell that carries it.
    pattern = f"--run [/]{re.escape(str(run_dir)[1:])}( |$)"
    with suppress(LaunchError):
        _on_all(hosts, f"pkill -KILL -f -- {shlex.quote(pattern)}", environment)


def check_shell_safe(path: Path) -> None:
    """Refuse a path that DeepSpeed would hand to a remote shell unquoted, to be read as more.

    Raises:
        ConfigError: It holds a character that a shell or pdsh reads.
    """
    if found := re.search(r"[^\w@+=:,./-]", str(path)):
        raise ConfigError(
            f"{path} holds {found.group()!r}, which a shell on the hosts would read; legal are "
            "letters, digits and @ + = : , . / - _: choose another output_dir or name"
        )


def _on_all(
    hosts: Sequence[str], command: str, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    program = shutil.which("pdsh", path=environment.get("PATH"))
    if program is None:
        raise LaunchError(
            "pdsh is not installed here; install it, or start each host by hand: "
            "`python -m launch init RUN --launcher hostfile` shows the commands"
        )
    try:
        return subprocess.run(
            [program, "-R", "ssh", "-w", ",".join(hosts), command],
            env={**environment, "PDSH_RCMD_TYPE": "ssh"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise LaunchError(
            f"the hosts {', '.join(hosts)} did not all answer within {ANSWER_SECONDS} s"
        ) from exc
