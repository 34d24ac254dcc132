"""From planned cells to run directories, refusing directories that hold something else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.explain import validate
from pipeline.config.load import RUN_FILE, config_hash, dump_yaml, read_run
from pipeline.config.schema import RunConfig
from pipeline.config.tree import ConfigDumper, read_yaml
from pipeline.data.shards import ShardManifest
from pipeline.errors import ConfigError, DataError
from pipeline.study.plan import StudyPlan
from pipeline.study.planned import Cell, TrainCell
from pipeline.tracking.atomic import write_text_atomic
from pipeline.tracking.environment import write_environment
from pipeline.tracking.store import PROBE_FILE, read_result, read_verdict


def write_cell(plan: StudyPlan, cell: Cell, manifest: ShardManifest) -> Path:
    """Write the resolved config of a cell and what it runs on; a finished cell is left alone.

    Args:
        plan: The study.
        cell: One of its cells.
        manifest: The prepared text.

    Returns:
        The directory of the cell.

    Raises:
        DataError: The cell was finished on other tokens.
    """
    run_dir = plan.run_dir(cell)
    run_dir.mkdir(parents=True, exist_ok=True)
    if isinstance(cell, TrainCell):
        path, text = run_dir / RUN_FILE, dump_yaml(_with_data(cell.run, manifest))
    else:
        runs = {label: _with_data(run, manifest) for label, run in cell.runs.items()}
        tree = {
            "study": plan.directory.name,
            "probe": cell.probe,
            "params": dict(cell.params),
            "data_fingerprint": manifest.fingerprint,
            "runs": {label: run.model_dump(mode="json") for label, run in runs.items()},
        }
        path, text = run_dir / PROBE_FILE, yaml.dump(tree, Dumper=ConfigDumper, sort_keys=False)
    if read_verdict(run_dir) == "complete":
        _refuse_other_data(run_dir, cell, manifest.fingerprint)
    else:
        write_text_atomic(path, text)
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
            if not (run_dir / RUN_FILE).exists():
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


def _refuse_other_data(run_dir: Path, cell: Cell, fingerprint: str) -> None:
    """Refuse a finished cell whose tokens are not those that the study has now."""
    if isinstance(cell, TrainCell):
        used = read_result(run_dir).data_fingerprint
    else:
        used = read_yaml(run_dir / PROBE_FILE)["data_fingerprint"]
    if used != fingerprint:
        raise DataError(
            f"{run_dir} was finished on data {used}, which is now {fingerprint}: the source text "
            f"has changed; give the study another name, or remove that directory"
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
