"""From YAML text and `a.b=c` overrides to a tree of plain values."""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError

MAX_CHARACTERS = 1_000_000
"""Longest text read as a config; a hundred times the largest that anyone has a use for."""
MAX_DEPTH = 30
"""Deepest nesting, which also ends an alias that holds itself."""
MAX_VALUES = 100_000
"""Most values once aliases are written out: a few hundred bytes of aliases can stand for 10^9."""

TIMESTAMP = "tag:yaml.org,2002:timestamp"
FLOAT = "tag:yaml.org,2002:float"
EXPONENT = re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+")


def _plain_resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Give the resolvers of plain scalars: 1e-3 is a number, and a date stays text."""
    resolvers = {
        first: [pair for pair in pairs if pair[0] != TIMESTAMP]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for first in "+-0123456789":
        resolvers[first] = [*resolvers.get(first, []), (FLOAT, EXPONENT)]
    return resolvers


class ConfigDumper(yaml.SafeDumper):
    """The safe dumper, quoting whatever `ConfigLoader` would not read back as text."""

    yaml_implicit_resolvers = _plain_resolvers()


class ConfigLoader(yaml.SafeLoader):
    """The safe loader, refusing a key that stands twice in one mapping."""

    yaml_implicit_resolvers = _plain_resolvers()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build one mapping after checking that its keys are distinct."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; a key given twice is an error.

    Raises:
        ConfigError: The file is missing, is not YAML, is absurdly large, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read config {path}: {reason}") from exc
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping, got {type(tree).__name__}")
    return tree


def parse_yaml(text: str, origin: str) -> Any:
    """Give the value of a YAML text.

    Args:
        text: One YAML document.
        origin: What to name in an error.

    Raises:
        ConfigError: The text is not YAML, or stands for more values than a config can have.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{origin} has {len(text)} characters; at most {MAX_CHARACTERS}")
    try:
        loader = ConfigLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}, 0) > MAX_VALUES:
            raise ConfigError(f"{origin}: its aliases stand for more than {MAX_VALUES} values")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as exc:
        raise ConfigError(f"{origin} is not valid YAML: {exc}") from exc
    except RecursionError as exc:
        raise ConfigError(f"{origin} is nested more than {MAX_DEPTH} levels deep") from exc


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Give the tree with `a.b=c` overrides set; the input is left alone.

    A number in the path picks the entry of a list: `probes.0.params.repeats=3`.

    Raises:
        ConfigError: An override has no `=`, its value is not YAML, or its path runs through a
            value or beyond a list.
    """
    result = copy.deepcopy(dict(tree))
    for override in overrides:
        path, sign, text = override.partition("=")
        if not sign or not all(path.split(".")):
            raise ConfigError(f"override {override!r} is not of the form a.b=c")
        *parents, leaf = path.split(".")
        node: Any = result
        for key in parents:
            node = _descend(node, key, override)
        node[_entry(node, leaf, override)] = parse_yaml(text, f"override {override!r}")
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


def _descend(node: Any, key: str, override: str) -> Any:
    entry = _entry(node, key, override)
    child = node.get(entry) if isinstance(node, dict) else node[entry]
    if child is None:
        child = node[entry] = {}
    if not isinstance(child, dict | list):
        raise ConfigError(f"override {override!r}: {key} holds a value, not a section")
    return child


def _entry(node: dict[str, Any] | list[Any], key: str, override: str) -> Any:
    if isinstance(node, dict):
        return key
    if not key.isdecimal() or int(key) >= len(node):
        raise ConfigError(
            f"override {override!r}: {key} is no entry of a list of {len(node)}, counted from 0"
        )
    return int(key)


def _count_values(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_count_values(part, known, depth + 1) for part in parts)
    return known[id(node)]
