"""The verbs about machines: submit, doctor."""

import os
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


def doctor(
    hostfile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Hosts to look at, over ssh.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Ray cluster: http://HEAD:8265 or HEAD:6379."),
    ] = None,
    tracking: Annotated[
        str | None, typer.Option(metavar="URI", help="MLflow store; default MLFLOW_TRACKING_URI.")
    ] = None,
    shared: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory that all hosts must see; default: for runs."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, and the hosts and services named: exit code 1 where a run would fail."""
    from launch.display import Display
    from launch.doctor import Request, examine
    from launch.doctor_finding import Finding
    from launch.doctor_page import answer, lines_of, summary

    display = Display(as_json=as_json)
    request = Request(
        hostfile=hostfile,
        ray_address=ray,
        tracking_uri=tracking or os.environ.get("MLFLOW_TRACKING_URI"),
        shared_dir=shared,
    )
    findings: list[Finding] = []
    for finding in examine(request):
        if not as_json:
            previous = findings[-1].subject if findings else None
            for line in lines_of(finding, display.console.width, previous):
                display.say(line)
        findings.append(finding)
    display.answer(answer(findings), [summary(findings)])
    if any(finding.verdict == "fail" for finding in findings):
        raise typer.Exit(1)
