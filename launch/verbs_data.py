"""The verbs about data: prepare, inspect, verify."""

from pathlib import Path
from typing import Annotated, Any

import typer

from launch.options import AsJson, DryRun, Overrides, as_tree, load_request
from launch.verbs_run import RunFile

DataDir = Annotated[
    Path, typer.Argument(metavar="DIR", help="A prepared directory, or a run directory.")
]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(prepare)
    app.command()(inspect)
    app.command()(verify)


def prepare(
    config: RunFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Turn the text of a run into token shards, or find that it has been done."""
    from launch.display import Display
    from launch.prepare_preview import preview_facts, preview_lines
    from launch.preparing import prepare_shown
    from pipeline.tracking.mlflow_sync import uri_beside

    request = load_request(config, overrides)
    display = Display(as_json=as_json)
    if dry_run:
        facts = preview_facts(request.run.data)
        display.answer({"data": as_tree(request.run.data), **facts}, preview_lines(facts))
        return
    run = request.run
    uri = uri_beside(run.output_dir, run.tracking.uri)
    manifest, totals = prepare_shown(run.data, display, is_whole=True, uri=uri)
    facts = describe_directory(manifest.directory)
    lines = [
        f"shards: {manifest.directory}",
        f"look at them: python -m launch inspect {manifest.directory}",
    ]
    if totals is not None:
        rates = ("seconds", "text_bytes_per_second", "tokens_per_second")
        facts["tokenized"] = {name: getattr(totals, name) for name in rates}
        lines.append(f"MLflow: python -m launch ui {run.output_dir}")
    display.answer(facts, lines)


def inspect(
    directory: DataDir,
    samples: Annotated[
        int, typer.Option(metavar="N", min=0, help="Training documents to show the beginning of.")
    ] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Draws the documents.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what prepared shards hold: sizes, sources, lengths, what was left out, samples."""
    from launch.display import Display
    from launch.inspect_page import inspect_facts, inspect_page

    facts = inspect_facts(prepared_of(directory), samples, seed)
    display = Display(as_json=as_json)
    if as_json:
        display.answer(facts)
        return
    for part in inspect_page(facts):
        display.show(part)


def verify(
    directory: DataDir,
    as_json: AsJson = False,
) -> None:
    """Check shards, and the checkpoints of a run, against their recorded hashes."""
    from launch.display import Display
    from pipeline.data.verification import verify_shards

    prepared_dir = prepared_of(directory)
    verify_shards(prepared_dir)
    checked = [str(prepared_dir), *verify_checkpoints(directory)]
    Display(as_json=as_json).answer({"verified": checked}, [f"intact: {path}" for path in checked])


def verify_checkpoints(directory: Path) -> list[str]:
    """Check every checkpoint of a run directory and give those that are intact, newest first.

    Raises:
        CheckpointError: One is damaged; its files are named.
    """
    if not (directory / "checkpoints").is_dir():
        return []
    from pipeline.training.checkpoint_files import list_checkpoints, verify_checkpoint

    checkpoints = list_checkpoints(directory)
    for checkpoint in checkpoints:
        verify_checkpoint(checkpoint)
    return [str(checkpoint) for checkpoint in checkpoints]


def describe_directory(prepared_dir: Path) -> dict[str, Any]:
    """Give the facts of a prepared directory as plain values."""
    from pipeline.data.shards import describe_prepared

    return describe_prepared(prepared_dir)


def prepared_of(directory: Path) -> Path:
    """Give the prepared directory itself, or the one that a run directory names.

    Raises:
        DataError: The run has not been prepared.
    """
    from pipeline.config.load import read_run
    from pipeline.errors import DataError

    if not (directory / "run.yaml").exists():
        return directory
    prepared_dir = read_run(directory).data.prepared_dir
    if prepared_dir is None:
        raise DataError(
            f"{directory} names no shards; run: python -m launch prepare {directory}/run.yaml"
        )
    return prepared_dir
