"""From a run config to a resolved run directory, and the refusal of one that belongs to another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.preparing import Prepare
from pipeline.config.load import RUN_FILE, dump_yaml, lineage_hash, read_run
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.tracking.atomic import write_text_atomic
from pipeline.tracking.environment import write_environment

SHOWN_DIFFERENCES = 5
PLACES = (
    "name:", "output_dir:", "tracking.", "profile.", "data.output_dir:", "data.prepared_dir:",
    "guard.max_attempts_without_progress:", "guard.allow_mismatch:", "guard.watchdog_seconds:",
    "data.prepared_url:",
)  # fmt: skip
"""Fields that say where things stand and what is looked at; the config hash leaves them out too."""


def run_dir_of(run: RunConfig) -> Path:
    """Give the directory of a run."""
    return run.output_dir / run.name


def init_run(run: RunConfig, prepare: Prepare) -> Path:
    """Prepare the data of a run and write its directory, with nothing started.

    Args:
        run: The run; its directories are absolute.
        prepare: Makes the shards, or finds them.

    Returns:
        The run directory, holding `run.yaml` and `environment.json`.

    Raises:
        ConfigError: The directory belongs to another config, or the table is too small for the
            tokenizer.
        DataError: The text cannot be used, or a split is too small for the run.
    """
    from pipeline.data.checks import check_prepared

    run_dir = run_dir_of(run)
    check_owner(run_dir, run)
    manifest = prepare(run.data)
    check_prepared(run, manifest)
    resolved = with_prepared(run, manifest.directory)
    check_same_text(run_dir, resolved)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text_atomic(run_dir / "run.yaml", dump_yaml(resolved))
    write_environment(run_dir)
    return run_dir


def with_prepared(run: RunConfig, prepared_dir: Path) -> RunConfig:
    """Give the run with the directory of its shards filled in, so that ranks never prepare."""
    data = run.data.model_copy(update={"prepared_dir": prepared_dir.absolute()})
    return run.model_copy(update={"data": data})


def shared_shards_of(run_dir: Path) -> Path | None:
    """Give the directory of shards that every host must see.

    Returns:
        None for a probe, and for shards that each host copies from an object store.
    """
    if not (run_dir / RUN_FILE).is_file():
        return None
    data = read_run(run_dir).data
    return data.prepared_dir if data.prepared_url is None else None


def check_owner(run_dir: Path, run: RunConfig) -> None:
    """Refuse a directory that another config made.

    Raises:
        ConfigError: Its `run.yaml` computes something else; the differing fields are named.
    """
    if not (run_dir / "run.yaml").exists():
        return
    owner = read_run(run_dir)
    if lineage_hash(owner) == lineage_hash(run):
        return
    differences = list_differences(owner.model_dump(mode="json"), run.model_dump(mode="json"))
    shown = [line for line in differences if not line.startswith(PLACES)]
    raise ConfigError(
        f"{run_dir} belongs to another config; choose another one with name=NAME, or remove it. "
        f"It has, and this run wants:\n  " + "\n  ".join(shown[:SHOWN_DIFFERENCES])
    )


def check_same_text(run_dir: Path, resolved: RunConfig) -> None:
    """Refuse to go on with a run on text that has changed since it began.

    Raises:
        ConfigError: The shards that the directory names are others.
    """
    if not (run_dir / "run.yaml").exists():
        return
    before, now = read_run(run_dir).data.prepared_dir, resolved.data.prepared_dir
    if before is not None and now is not None and before.name != now.name:
        raise ConfigError(
            f"{run_dir} was started on the shards {before.name}, the text now gives {now.name}: "
            f"it has changed; choose another directory with name=NAME"
        )


def list_differences(
    first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """List the leaves in which two trees differ, as `a.b: old -> new`."""
    lines = []
    for key in [*first, *(key for key in second if key not in first)]:
        old, new = first.get(key), second.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += list_differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old} -> {new}")
    return lines
