"""Warm rank processes: torch and DeepSpeed are imported once, then ranks are sent functions."""

import contextlib
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, Concatenate, ParamSpec, TypeVar

from pipeline.training.distributed import RankContext, start_distributed, stop_distributed

P = ParamSpec("P")
R = TypeVar("R")

CALL_TIMEOUT_SECONDS = 120.0
PRELOAD = ["torch", "deepspeed", "pipeline.training.deepspeed_engine"]


class RankPool:
    """Ranks that wait for functions; a rank that fails ends the pool, the next call starts anew."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
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
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world_size, port, there), daemon=True
            )
            process.start()
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


def _serve(rank: int, world_size: int, port: int, connection: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    ranks = start_distributed("cpu")
    while (call := connection.recv()) is not None:
        function, args, kwargs = call
        try:
            reply = (True, function(ranks, *args, **kwargs))
        except BaseException:
            reply = (False, traceback.format_exc())
        connection.send(reply)
    stop_distributed(ranks)
