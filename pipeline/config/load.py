"""From YAML files and `a.b=c` overrides to checked configs, and back to a run's resolved YAML."""

import difflib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.cluster import ClusterConfig
from pipeline.config.model import GptConfig, LstmConfig
from pipeline.config.schema import DataConfig, RunConfig
from pipeline.config.study import StudyConfig
from pipeline.errors import ConfigError

ConfigType = TypeVar("ConfigType", bound=BaseModel)

PLACE_FIELDS = ("name", "output_dir", "tracking")
"""Run fields that say where results go, not what they are; left out of the config hash."""


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a run config.

    `data:` may name a YAML file, relative to the run file or to the current directory.

    Args:
        path: YAML file of a `RunConfig`.
        overrides: `a.b=c` strings, the value read as YAML.

    Raises:
        ConfigError: The file cannot be read, a key is unknown, or values contradict each other.
    """
    tree = read_yaml(path)
    if isinstance(tree.get("data"), str):
        tree["data"] = read_yaml(_find_beside(path, tree["data"]))
    return build_run(apply_overrides(tree, overrides), str(path))


def build_run(tree: Mapping[str, Any], origin: str) -> RunConfig:
    """Check a run config given as a tree and make its directories absolute.

    Args:
        tree: Fields of `RunConfig`.
        origin: What to name in an error.

    Raises:
        ConfigError: As `load_run`.
    """
    run = validate(RunConfig, with_output_dir(tree), origin)
    data = run.data.model_copy(
        update={
            "output_dir": Path(run.data.output_dir or run.output_dir / "data").absolute(),
            "prepared_dir": run.data.prepared_dir and run.data.prepared_dir.absolute(),
        }
    )
    return run.model_copy(update={"output_dir": run.output_dir.absolute(), "data": data})


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Load a study config; `base.data` may name a YAML file as in a run.

    Raises:
        ConfigError: As `load_run`.
    """
    tree = read_yaml(path)
    base = tree.get("base")
    if isinstance(base, dict) and isinstance(base.get("data"), str):
        base["data"] = read_yaml(_find_beside(path, base["data"]))
    study = validate(StudyConfig, with_output_dir(apply_overrides(tree, overrides)), str(path))
    return study.model_copy(update={"output_dir": study.output_dir.absolute()})


def load_cluster(path: Path | None, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Load a cluster config; None gives the defaults.

    Raises:
        ConfigError: As `load_run`.
    """
    tree = read_yaml(path) if path is not None else {}
    return validate(ClusterConfig, apply_overrides(tree, overrides), str(path or "cluster"))


def read_run(run_dir: Path) -> RunConfig:
    """Read the resolved config of a run directory.

    Raises:
        ConfigError: `run.yaml` is missing or does not hold a run config.
    """
    return validate(RunConfig, read_yaml(run_dir / "run.yaml"), str(run_dir / "run.yaml"))


def dump_yaml(config: BaseModel) -> str:
    """Give the YAML of a config with every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_hash(run: RunConfig) -> str:
    """Give the sha256 of what a run computes; where its results stand does not count."""
    tree = run.model_dump(mode="json", exclude=set(PLACE_FIELDS))
    for key in ("output_dir", "prepared_dir"):
        tree["data"].pop(key)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader; a key given twice is an error.

    Raises:
        ConfigError: The file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read config {path}: {reason}") from exc
    try:
        tree = yaml.load(text, Loader=UniqueKeyLoader)
    except yaml.YAMLError as exc:
        raise ConfigError(f"{path} is not valid YAML: {exc}") from exc
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping, got {type(tree).__name__}")
    return tree


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Give the tree with `a.b=c` overrides set; the input is left alone.

    Raises:
        ConfigError: An override has no `=`, or its path runs through a value.
    """
    result: dict[str, Any] = json.loads(json.dumps(tree, default=str))
    for override in overrides:
        path, sign, text = override.partition("=")
        if not sign or not path:
            raise ConfigError(f"override {override!r} is not of the form a.b=c")
        *parents, leaf = path.split(".")
        node = result
        for key in parents:
            child = node.get(key)
            if child is None:
                child = node[key] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"override {override!r}: {key} holds a value, not a section")
            node = child
        node[leaf] = yaml.safe_load(text)
    return result


def merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """Give `base` with the leaves of `update` set over it, section by section."""
    result = dict(base)
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result


def validate(schema: type[ConfigType], tree: Mapping[str, Any], origin: str) -> ConfigType:
    """Check a tree against a schema.

    Raises:
        ConfigError: One line per problem: the path, what is wrong, and the nearest known key.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as exc:
        lines = [_explain(error) for error in exc.errors()]
        raise ConfigError("\n".join([f"{origin}: {line}" for line in lines])) from exc


def with_output_dir(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Fill `output_dir` from TANDEM_OUTPUT where the tree names none."""
    root = os.environ.get("TANDEM_OUTPUT")
    return {"output_dir": root, **tree} if root else dict(tree)


class UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, refusing a key that stands twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build one mapping after checking that its keys are distinct."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep=deep)


def _explain(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"] if part not in ("gpt", "lstm_attention"))
    if error["type"] == "extra_forbidden":
        return f"unknown key {path}{_hint(path)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}.{message}" if path else message
    given = error.get("input")
    shown = "" if isinstance(given, Mapping) else f" (got {given!r})"
    return f"{path}: {message}{shown}"


def _hint(path: str) -> str:
    known = sorted(_known_paths())
    leaf = path.rsplit(".", 1)[-1]
    section = path.rsplit(".", 1)[0] + "." if "." in path else ""
    here = {name.removeprefix(section): name for name in known if name.startswith(section)}
    near = difflib.get_close_matches(leaf, here, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {here[near[0]]}?"
    anywhere = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    anywhere += difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    return f"; did you mean {anywhere[0]}?" if anywhere else ""


def _known_paths() -> set[str]:
    paths: set[str] = set()

    def walk(schema: type[BaseModel], prefix: str) -> None:
        for name, field in schema.model_fields.items():
            paths.add(prefix + name)
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                walk(kind, f"{prefix}{name}.")

    walk(RunConfig, "")
    walk(StudyConfig, "")
    walk(ClusterConfig, "")
    walk(DataConfig, "")
    for family in (GptConfig, LstmConfig):
        walk(family, "model.")
    return paths


def _find_beside(path: Path, name: str) -> Path:
    beside = path.parent / name
    return beside if beside.exists() else Path(name)
