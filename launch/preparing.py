"""Preparing as a command does it: shown to a person, written to the log, sent to MLflow."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.display import Display
    from pipeline.config.data import DataConfig
    from pipeline.data.progress import PrepareEvent, PrepareTotals
    from pipeline.data.shards import ShardManifest

Prepare = Callable[["DataConfig"], "ShardManifest"]
"""Makes the shards of a config, or finds them."""


def prepare_shown(
    data: "DataConfig",
    display: "Display",
    *,
    is_whole: bool = False,
    uri: str | None = None,
    indent: str = "",
) -> "tuple[ShardManifest, PrepareTotals | None]":
    """Prepare data with a view of it, its log and, given a URI, its replica in MLflow.

    Args:
        data: The config.
        display: The command's display.
        is_whole: Whether preparing is all that the command does.
        uri: MLflow tracking URI to send to; None leaves that to a later `sync`.
        indent: Before every line that is shown.

    Returns:
        The manifest, and the totals of the tokenization; None when the shards were there.

    Raises:
        PipelineError: As `pipeline.data.prepare.prepare`, or the log cannot be written.
    """
    from launch.prepare_record import PrepareRecorder
    from launch.prepare_view import PrepareView
    from pipeline.data.prepare import prepare

    view = PrepareView(display, is_whole=is_whole, indent=indent)
    recorder = PrepareRecorder(data, uri=uri, on_event=display.say)

    def take(event: "PrepareEvent") -> None:
        view.take(event)
        recorder.take(event)

    with recorder, view:
        manifest = prepare(data, take)
    return manifest, view.totals


def preparing(display: "Display", indent: str = "") -> Prepare:
    """Give the function that prepares within a command that does more than that."""
    return partial(_prepare_within, display=display, indent=indent)


def _prepare_within(data: "DataConfig", *, display: "Display", indent: str) -> "ShardManifest":
    return prepare_shown(data, display, indent=indent)[0]
