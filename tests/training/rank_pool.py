"""Warm rank processes: torch and DeepSpeed are imported once, then ranks are sent functions."""

import contextlib
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, Concatenate, ParamSpec, TypeVar

import pytest

from launch.local import PRELOADED, PRELOADED_ON_CPU
from pipeline.training.distributed import RankContext, start_distributed, stop_distributed

P = ParamSpec("P")
R = TypeVar("R")

CALL_TIMEOUT_SECONDS = 120.0


class RankPool:
    """Ranks that wait for functions; a rank that fails ends the pool, the next call starts anew."""

    def __init__(self, world_size: int, accelerator: str = "cpu") -> None:
        self.world_size = world_size
        self.accelerator = accelerator
        self._ranks: list[tuple[Any, Connection]] = []

    def run(
        self, function: Callable[Concatenate[RankContext, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> list[R]:
        """Call `function(ranks, ...)` on every rank and give the results in rank order."""
        if not self._ranks:
            self._start()
        for _, connection in self._ranks:
            connection.send((function, args, kwargs))
        replies: dict[int, R] = {}
        deadline = time.monotonic() + CALL_TIMEOUT_SECONDS
        while len(replies) < self.world_size:
            waiting = [c for rank, (_, c) in enumerate(self._ranks) if rank not in replies]
            if not wait(waiting, timeout=max(0.0, deadline - time.monotonic())):
                self.stop(kill=True)
                raise AssertionError(f"ranks {waiting} gave no answer to {function.__name__}")
            for rank, (process, connection) in enumerate(self._ranks):
                if rank not in replies and connection.poll():
                    replies[rank] = self._receive(rank, process, connection)
        return [replies[rank] for rank in range(self.world_size)]

    def _receive(self, rank: int, process: Any, connection: Connection) -> Any:
        try:
            is_ok, value = connection.recv()
        except EOFError:
            process.join(5)
            is_ok, value = False, f"the process ended with code {process.exitcode}"
        if not is_ok:
            self.stop(kill=True)
            raise AssertionError(f"rank {rank} failed:\n{value}")
        return value

    def _start(self) -> None:
        port = free_port()
        for rank in range(self.world_size):
            here, there = multiprocessing.Pipe()
            environment = rank_environment(rank, self.world_size, port, self.accelerator)
            process = start_process(self.accelerator, _serve, environment, there)
            there.close()
            self._ranks.append((process, here))

    def stop(self, kill: bool = False) -> None:
        """End the ranks."""
        for process, connection in self._ranks:
            if kill:
                process.kill()
            else:
                with contextlib.suppress(BrokenPipeError):
                    connection.send(None)
        for process, connection in self._ranks:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
        self._ranks = []


def rank_environment(
    rank: int, world_size: int, port: int, accelerator: str = "cpu"
) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": accelerator,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_process(
    accelerator: str, target: Callable[..., None], environment: dict[str, str], *args: Any
) -> Any:
    """Start a process that already holds torch and DeepSpeed; CUDA does not survive a fork."""
    context: Any = multiprocessing.get_context("forkserver" if accelerator == "cpu" else "spawn")
    if accelerator == "cpu":
        context.set_forkserver_preload(PRELOADED + PRELOADED_ON_CPU)
        # DeepSpeed chooses its accelerator when it is imported, which the fork server does.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DS_ACCELERATOR", "cpu")
            forkserver.ensure_running()
    process = context.Process(target=target, args=(environment, *args), daemon=True)
    process.start()
    return process


def _serve(environment: dict[str, str], connection: Connection) -> None:
    os.environ.update(environment)
    ranks = start_distributed()
    while (call := connection.recv()) is not None:
        function, args, kwargs = call
        try:
            reply = (True, function(ranks, *args, **kwargs))
        except BaseException:
            reply = (False, traceback.format_exc())
        connection.send(reply)
    stop_distributed(ranks)


def call_in_process(function: Callable[..., Any], environment: dict[str, str], *args: Any) -> Any:
    """Call a function in a process of its own and give its result, or its error as text."""
    here, there = multiprocessing.Pipe()
    process = start_process("cpu", _answer, environment, there, function, args)
    there.close()
    assert here.poll(CALL_TIMEOUT_SECONDS), f"no answer from {function.__name__}"
    answer = here.recv()
    process.join()
    return answer


def _answer(
    environment: dict[str, str], connection: Connection, function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(environment)
    try:
        connection.send(function(*args))
    except Exception as exc:
        connection.send(f"{type(exc).__name__}: {exc}")
