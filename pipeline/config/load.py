"""From YAML files and `a.b=c` overrides to checked configs, and back to a run's resolved YAML."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel

from pipeline.config.automatic import SizeRule, fill_train
from pipeline.config.cluster import ClusterConfig
from pipeline.config.explain import validate
from pipeline.config.schema import RunConfig
from pipeline.config.study import StudyConfig
from pipeline.config.tree import ConfigDumper, apply_overrides, merge, read_yaml
from pipeline.errors import ConfigError

__all__ = [
    "RUN_FILE", "START_FIELDS", "STUDY_FILE",
    "apply_overrides", "build_run", "config_hash", "dump_yaml", "lineage_hash", "load_cluster",
    "load_run", "load_study", "merge", "read_run", "read_study", "read_yaml", "validate",
]  # fmt: skip

RUN_FILE = "run.yaml"
STUDY_FILE = "study.yaml"

PLACE_FIELDS = ("name", "output_dir", "tracking", "profile")
"""Run fields that say where results go and what is looked at, not what they are; left out of the
config hash."""

START_FIELDS = ("max_attempts_without_progress", "allow_mismatch", "watchdog_seconds")
"""Fields of `guard` that say when a run may start and when its watchdog ends it, so that a run that
was refused or ended can go on with another value; left out of the config hash as well."""

LAYOUT_FIELDS = ("zero", "checkpoint")
"""Run fields that say where the state of training lies and when it is saved: a run that is resumed
may change them, as it may change its world size."""


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a run config.

    `data:` may name a YAML file, relative to the run file or to the current directory.

    Args:
        path: YAML file of a `RunConfig`.
        overrides: `a.b=c` strings, the value read as YAML.

    Raises:
        ConfigError: The file cannot be read, a key is unknown, or values contradict each other.
    """
    return build_run(_read_with_data(path, overrides, ("data",)), str(path))


def build_run(
    tree: Mapping[str, Any], origin: str, rule: SizeRule | Literal["later"] | None = None
) -> RunConfig:
    """Check a run config given as a tree, fill it by rule, and make its directories absolute.

    Args:
        tree: Fields of `RunConfig`.
        origin: What to name in an error.
        rule: How an automatic run is filled; None takes its family's rule, `later` leaves it open
            because its size is not final.

    Raises:
        ConfigError: As `load_run`.
    """
    run = validate(RunConfig, with_output_dir(tree), origin)
    run = run if rule == "later" else fill_train(run, origin, rule)
    data = run.data.model_copy(
        update={
            "output_dir": Path(run.data.output_dir or run.output_dir / "data").absolute(),
            "prepared_dir": run.data.prepared_dir and run.data.prepared_dir.absolute(),
        }
    )
    branch = run.branch and run.branch.model_copy(update={"run_dir": run.branch.run_dir.absolute()})
    places = {"output_dir": run.output_dir.absolute(), "data": data, "branch": branch}
    return run.model_copy(update=places)


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Load a study config and check the run of each family; `base.data` may name a YAML file.

    Raises:
        ConfigError: As `load_run`.
    """
    tree = _read_with_data(path, overrides, ("base", "data"))
    study = validate(StudyConfig, with_output_dir(tree), str(path))
    for label, fields in study.families.items():
        build_run(merge(study.base, fields), f"{path}: families.{label}", "later")
    cluster = _with_hostfile(study.cluster, path)
    return study.model_copy(update={"output_dir": study.output_dir.absolute(), "cluster": cluster})


def load_cluster(path: Path | None, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Load a cluster config; None gives the defaults.

    `hostfile` is relative to the cluster file or to the current directory.

    Raises:
        ConfigError: As `load_run`.
    """
    tree = read_yaml(path) if path is not None else {}
    cluster = validate(ClusterConfig, apply_overrides(tree, overrides), str(path or "cluster"))
    return _with_hostfile(cluster, path or Path("cluster"))


def read_run(run_dir: Path) -> RunConfig:
    """Read the resolved config of a run directory.

    Raises:
        ConfigError: `run.yaml` is missing or does not hold a run config.
    """
    return validate(RunConfig, read_yaml(run_dir / RUN_FILE), str(run_dir / RUN_FILE))


def read_study(study_dir: Path) -> StudyConfig:
    """Read the resolved config of a study directory.

    Raises:
        ConfigError: `study.yaml` is missing or does not hold a study config.
    """
    path = study_dir / STUDY_FILE
    if not path.exists():
        raise ConfigError(f"{study_dir} is not a study directory: it holds no {STUDY_FILE}")
    return validate(StudyConfig, read_yaml(path), str(path))


def dump_yaml(config: BaseModel) -> str:
    """Give the YAML of a config with every default written out."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=ConfigDumper, sort_keys=False)


def config_hash(run: RunConfig) -> str:
    """Give the sha256 of what a run computes; where its results stand does not count."""
    return _hash_without(run, PLACE_FIELDS)


def lineage_hash(run: RunConfig) -> str:
    """Give the sha256 of what a run's losses follow from, equal for all that may go on from it."""
    return _hash_without(run, (*PLACE_FIELDS, *LAYOUT_FIELDS))


def _hash_without(run: RunConfig, fields: tuple[str, ...]) -> str:
    tree = run.model_dump(mode="json", exclude=set(fields))
    # Fields that came later are left out where they say nothing, so that runs of then stay valid.
    if run.branch is None:
        del tree["branch"]
    else:
        tree["branch"].pop("run_dir")
    if not run.checkpoint.keep_steps and "checkpoint" in tree:
        del tree["checkpoint"]["keep_steps"]
    for key in ("output_dir", "prepared_dir", "prepared_url"):
        tree["data"].pop(key)
    for key in START_FIELDS:
        tree["guard"].pop(key)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def with_output_dir(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Fill `output_dir` from TANDEM_OUTPUT where the tree names none."""
    root = os.environ.get("TANDEM_OUTPUT")
    return {"output_dir": root, **tree} if root else dict(tree)


def _read_with_data(path: Path, overrides: Sequence[str], place: tuple[str, ...]) -> dict[str, Any]:
    """Read a tree in which the entry at `place` may name a data file; overrides reach into it."""
    dotted = ".".join(place)
    naming = [override for override in overrides if override.partition("=")[0] == dotted]
    tree = apply_overrides(read_yaml(path), naming)
    section: Any = tree
    for key in place[:-1]:
        section = section.get(key) if isinstance(section, dict) else None
    if isinstance(section, dict) and isinstance(section.get(place[-1]), str):
        section[place[-1]] = read_yaml(_find_beside(path, section[place[-1]]))
    return apply_overrides(tree, [override for override in overrides if override not in naming])


def _with_hostfile(cluster: ClusterConfig, path: Path) -> ClusterConfig:
    if cluster.hostfile is None:
        return cluster
    hostfile = _find_beside(path, str(cluster.hostfile)).absolute()
    return cluster.model_copy(update={"hostfile": hostfile})


def _find_beside(path: Path, name: str) -> Path:
    beside = path.parent / name
    return beside if beside.exists() else Path(name)
