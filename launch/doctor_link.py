"""From a host's name to a process there that answers questions about it."""

import contextlib
import json
import os
import selectors
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from launch import doctor_agent
from pipeline.errors import LaunchError

K = TypeVar("K")
PROJECT_DIR = Path(__file__).resolve().parent.parent
MOST_THREADS = 64
CONNECT_SECONDS = 5
"""A host that is up answers ssh in well under a second; one that is off would take minutes."""
ANSWER_SECONDS = 30.0
END_SECONDS = 5.0
SSH = (
    "ssh", "-T",
    "-o", "BatchMode=yes",  # never asks: not for a password, nor whether to trust a host key
    "-o", f"ConnectTimeout={CONNECT_SECONDS}",
    "-o", "ServerAliveInterval=5",
    "-o", "ServerAliveCountMax=2",
)  # fmt: skip


class HostError(LaunchError):
    """A host could not be reached, or could not answer a question."""


class Link:
    """A process on one host, asked over its standard input."""

    def __init__(self, host: str | None) -> None:
        """Start it.

        Args:
            host: Reached with ssh; None for a process on this machine.
        """
        self.host = host
        text = Path(doctor_agent.__file__).read_bytes()
        python = [sys.executable, "-c", f"import sys;exec(sys.stdin.buffer.read({len(text)}))"]
        # As `deepspeed` starts ranks: same directory, same Python, the directory's code first.
        paths = [
            str(Path.cwd()),
            str(PROJECT_DIR),
            *os.environ.get("PYTHONPATH", "").split(os.pathsep),
        ]
        search = os.pathsep.join(dict.fromkeys(filter(None, paths)))
        environment = dict(os.environ)
        if host is None:
            command = python
            environment["PYTHONPATH"] = search
        else:
            run = shlex.join(["exec", "env", f"PYTHONPATH={search}", *python])
            command = [*SSH, "--", host, f"cd {shlex.quote(str(Path.cwd()))} && {run}"]
        # The process outlives this function; close() ends both.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            bufsize=0,
        )
        self._write(text)

    def __enter__(self) -> "Link":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process: the end of its input ends it, and a signal if that does not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def ask(self, question: str, *, seconds: float = ANSWER_SECONDS, **arguments: Any) -> Any:
        """Ask one question of `launch.doctor_agent.QUESTIONS` and wait for its answer.

        Args:
            question: Its name.
            seconds: How long the answer may take.
            arguments: What the question takes.

        Raises:
            HostError: There is no answer, or it is an error; the host's own words are quoted.
        """
        self._write(json.dumps({"ask": question, "arguments": arguments}).encode() + b"\n")
        reply = json.loads(self._read_line(question, seconds))
        if "error" in reply:
            raise HostError(reply["error"])
        return reply["answer"]

    def _write(self, text: bytes) -> None:
        assert self._process.stdin is not None
        # A process that has ended tells why when its answer is read.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(text)

    def _read_line(self, question: str, seconds: float) -> bytes:
        stream = self._process.stdout
        assert stream is not None
        deadline = time.monotonic() + seconds
        shown = b""
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            # A login script of the host may print lines of its own first.
            while not (shown.endswith(b"\n") and shown.splitlines()[-1].startswith(b"{")):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    # Its late answer must not pass for that to the next question.
                    self._process.kill()
                    raise HostError(f"no answer about {question} in {seconds:g} s")
                part = os.read(stream.fileno(), 1 << 16)
                if not part:
                    raise HostError(self._last_words())
                shown += part
        return shown.splitlines()[-1]

    def _last_words(self) -> str:
        """Give what the ended process or ssh wrote last to standard error."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line]
        words = "; ".join(line.strip() for line in lines[-3:])
        return words or f"the process ended with exit code {self._process.returncode}"


def ask_all(
    links: Mapping[K, Link], question: str, *, seconds: float = ANSWER_SECONDS, **arguments: Any
) -> tuple[dict[K, Any], dict[K, str]]:
    """Ask all hosts the same at the same time.

    Args:
        links: Any key to the link of a host.
        question: As `Link.ask` takes it.
        seconds: How long each answer may take.
        arguments: What the question takes.

    Returns:
        The answers, and for those that gave none, why.
    """

    def ask(link: Link) -> tuple[Any, str | None]:
        try:
            return link.ask(question, seconds=seconds, **arguments), None
        except HostError as exc:
            return None, str(exc)

    with ThreadPoolExecutor(max_workers=MOST_THREADS) as pool:
        replies = dict(zip(links, pool.map(ask, links.values()), strict=True))
    answers = {key: answer for key, (answer, error) in replies.items() if error is None}
    return answers, {key: error for key, (_, error) in replies.items() if error is not None}
