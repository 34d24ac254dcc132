"""The verbs about machines: submit, doctor."""

from pathlib import Path
from typing import Annotated

import typer

from launch.options import AsJson, DryRun

SUBMITTABLE = ("prepare", "train", "study")


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command(context_settings={"ignore_unknown_options": True})(submit)
    app.command()(doctor)


def submit(
    verb: Annotated[str, typer.Argument(help="prepare, train or study.")],
    config: Annotated[Path, typer.Argument(help="Its config, a file of this project.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGUMENT", help="Passed on to the verb.")
    ] = None,
    address: Annotated[
        str, typer.Option(help="Dashboard of the Ray cluster.")
    ] = "http://127.0.0.1:8265",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run a verb as a job of a Ray cluster, and follow it to its end."""
    from launch.display import Display
    from launch.ray_job import entrypoint
    from launch.ray_job import submit as submit_job
    from pipeline.errors import ConfigError

    if verb not in SUBMITTABLE:
        raise ConfigError(f"submit takes {', '.join(SUBMITTABLE)}; got {verb!r}")
    display = Display(as_json=as_json)
    command = entrypoint(verb, config, arguments or [])
    payload = {"command": command, "address": address}
    if dry_run:
        display.answer(payload, [f"would submit to {address}: {command}"])
        return
    code = submit_job(command, address, display.pass_on)
    display.answer(payload | {"exit_code": code}, [f"the job ended with exit code {code}"])
    raise typer.Exit(code)


def doctor(as_json: AsJson = False) -> None:
    """Check this machine: versions, device, memory, ports, programs."""
    from launch.display import Display
    from launch.doctor import examine

    findings = examine()
    marks = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
    lines = []
    for finding in findings:
        advice = f"; {finding.advice}" if finding.advice else ""
        lines.append(f"{marks[finding.verdict]}  {finding.name:14} {finding.found}{advice}")
    Display(as_json=as_json).answer({"findings": [vars(f) for f in findings]}, lines)
    if any(finding.verdict == "fail" for finding in findings):
        raise typer.Exit(1)
