"""From planned cells to run directories, refusing directories that hold something else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.load import config_hash, dump_yaml, read_run, read_yaml, validate
from pipeline.config.schema import RunConfig
from pipeline.data.shards import ShardManifest
from pipeline.errors import ConfigError, DataError
from pipeline.study.plan import Cell, StudyPlan, TrainCell
from pipeline.tracking.environment import write_environment
from pipeline.tracking.store import read_verdict

PROBE_FILE = "probe.yaml"


def write_cell(plan: StudyPlan, cell: Cell, manifests: Mapping[str, ShardManifest]) -> Path:
    """Write the resolved config of a cell and what it runs on; a finished cell is left alone.

    Args:
        plan: The study.
        cell: One of its cells.
        manifests: Label of a family to its prepared text.

    Returns:
        The directory of the cell.

    Raises:
        DataError: The cell was begun on other tokens.
    """
    run_dir = plan.run_dir(cell)
    run_dir.mkdir(parents=True, exist_ok=True)
    if isinstance(cell, TrainCell):
        path, text = run_dir / "run.yaml", dump_yaml(_with_data(cell.run, manifests[cell.label]))
    else:
        runs = {label: _with_data(run, manifests[label]) for label, run in cell.runs.items()}
        tree = {
            "study": plan.directory.name,
            "probe": cell.probe,
            "params": dict(cell.params),
            "runs": {label: run.model_dump(mode="json") for label, run in runs.items()},
        }
        path, text = run_dir / PROBE_FILE, yaml.safe_dump(tree, sort_keys=False)
    if path.exists():
        _refuse_other_data(path, manifests)
    if read_verdict(run_dir) != "complete":
        path.write_text(text, encoding="utf-8")
        write_environment(run_dir)
    return run_dir


def _with_data(run: RunConfig, manifest: ShardManifest) -> RunConfig:
    data = run.data.model_copy(update={"prepared_dir": manifest.directory.absolute()})
    return run.model_copy(update={"data": data})


def refuse_other_study(plan: StudyPlan) -> None:
    """Refuse cells that hold another config than the plan's, before anything is prepared.

    Raises:
        ConfigError: Names the directory.
    """
    for cell in plan.cells:
        run_dir = plan.run_dir(cell)
        if isinstance(cell, TrainCell):
            if not (run_dir / "run.yaml").exists():
                continue
            is_same = config_hash(read_run(run_dir)) == config_hash(cell.run)
        else:
            if not (run_dir / PROBE_FILE).exists():
                continue
            is_same = _describe_probe(read_yaml(run_dir / PROBE_FILE)) == {
                "probe": cell.probe,
                "params": dict(cell.params),
                "runs": {label: config_hash(run) for label, run in cell.runs.items()},
            }
        if not is_same:
            raise ConfigError(
                f"{run_dir} holds a cell of another config; give the study another name or "
                f"output_dir, or remove that directory"
            )


def _refuse_other_data(path: Path, manifests: Mapping[str, ShardManifest]) -> None:
    """Refuse a cell that was begun on other tokens; its directory of shards bears their name."""
    tree = read_yaml(path)
    runs = tree["runs"].values() if path.name == PROBE_FILE else [tree]
    begun_on = {Path(run["data"]["prepared_dir"]).name for run in runs}
    now = {manifest.fingerprint for manifest in manifests.values()}
    if not begun_on <= now:
        raise DataError(
            f"{path.parent} was begun on data {', '.join(sorted(begun_on))}, which is now "
            f"{', '.join(sorted(now))}: the source text has changed; give the study another name "
            f"or remove that directory"
        )


def _describe_probe(tree: Mapping[str, Any]) -> dict[str, Any]:
    runs = {
        label: validate(RunConfig, fields, f"runs.{label}")
        for label, fields in tree["runs"].items()
    }
    return {
        "probe": tree["probe"],
        "params": tree["params"],
        "runs": {label: config_hash(run) for label, run in runs.items()},
    }
