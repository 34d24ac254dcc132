"""The verbs about MLflow: sync, ui."""

import os
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from launch.options import AsJson, DryRun
from launch.parent_death import signal_on_parent_death

FOLLOW_SECONDS = 5.0
Uri = Annotated[
    str | None, typer.Option("--uri", metavar="URI", help="MLflow store; default: the config's.")
]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(sync)
    app.command()(ui)


def sync(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Study, run, prepared or output directory.")
    ],
    uri: Uri = None,
    follow: Annotated[bool, typer.Option(help="Go on until told to stop.")] = False,
    while_process: Annotated[
        int | None, typer.Option(metavar="PID", help="With --follow: end when this process ends.")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Send what a directory holds to MLflow; a second time sends nothing."""
    if while_process is not None:
        # The parent holds this process still in timed cells, and may be killed in one.
        signal_on_parent_death(signal.SIGCONT)
    from launch.display import Display
    from pipeline.errors import ConfigError
    from pipeline.tracking import mlflow_sync

    display = Display(as_json=as_json)
    if not directory.is_dir():
        raise ConfigError(
            f"{directory} is not a directory; name a study, run, prepared or output directory"
        )
    chosen = mlflow_sync.resolve_uri(directory.absolute(), uri)
    if dry_run:
        display.answer({"directory": str(directory), "uri": chosen}, [f"would sync to {chosen}"])
        return
    if not follow:
        num_points = mlflow_sync.sync(directory, chosen, on_event=display.say)
        payload = {"directory": str(directory), "uri": chosen, "num_points": num_points}
        display.answer(payload, [f"sent {num_points} metric points to {chosen}"])
        return
    is_told = _StopFlag(while_process)
    display.say(f"following {directory}")
    is_complete = mlflow_sync.follow(
        directory,
        chosen,
        interval_seconds=FOLLOW_SECONDS,
        should_stop=is_told,
        on_event=display.say,
    )
    display.answer({"directory": str(directory), "uri": chosen, "is_complete": is_complete})
    if not is_complete:
        raise typer.Exit(1)


def ui(
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Output directory; default runs/.")
    ] = None,
    uri: Uri = None,
    port: Annotated[int, typer.Option(help="TCP port on loopback.")] = 5000,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Serve MLflow's pages on this machine until Ctrl-C."""
    from launch.display import Display
    from pipeline.errors import LaunchError
    from pipeline.tracking.mlflow_sync import resolve_uri
    from pipeline.tracking.mlflow_ui import ENVIRONMENT, ui_command, ui_url

    display = Display(as_json=as_json)
    root = directory or Path(os.environ.get("TANDEM_OUTPUT", "runs"))
    store = resolve_uri(root.absolute(), uri)
    command = ui_command(store, port)
    if dry_run:
        display.answer({"command": command}, [f"would run: {' '.join(command)}"])
        return
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise LaunchError(f"port {port} is taken; choose another one with --port")
    address = ui_url(store, port)
    lines = [f"MLflow on {address}", "it answers in some seconds; Ctrl-C ends it"]
    display.answer({"command": command, "address": address}, lines)
    os.execvpe(command[0], command, os.environ | ENVIRONMENT)


class _StopFlag:
    """Whether SIGTERM or Ctrl-C came, or the process that is followed has ended."""

    def __init__(self, while_process: int | None) -> None:
        self._is_set = False
        self._while_process = while_process
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, _number: int, _frame: FrameType | None) -> None:
        self._is_set = True

    def __call__(self) -> bool:
        return self._is_set or (
            self._while_process is not None and os.getppid() != self._while_process
        )
