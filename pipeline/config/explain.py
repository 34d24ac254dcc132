"""From a tree of plain values to a checked config, or to one line for each problem in it."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from pipeline.config.model import ModelConfig
from pipeline.errors import ConfigError

ConfigType = TypeVar("ConfigType", bound=BaseModel)


def validate(schema: type[ConfigType], tree: Mapping[str, Any], origin: str) -> ConfigType:
    """Check a tree against a schema.

    Args:
        schema: The config class.
        tree: Its fields.
        origin: What to name in an error: a file, a part of a study.

    Raises:
        ConfigError: One line per problem: the path, what is wrong, and the nearest known key.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as exc:
        lines = [_explain(error, schema) for error in exc.errors()]
        raise ConfigError("\n".join([f"{origin}: {line}" for line in lines])) from exc


def known_families() -> dict[str, type[BaseModel]]:
    """Give the model families that a config can name, each with its class."""
    union = get_args(ModelConfig)[0]
    return {kind.model_fields["family"].default: kind for kind in get_args(union)}


def _explain(error: Any, schema: type[BaseModel]) -> str:
    path = ".".join(_path_parts(error["loc"]))
    kind, context, given = error["type"], error.get("ctx", {}), error.get("input")
    if kind == "extra_forbidden":
        owners = _owners(error["loc"])
        if owners:
            return f"{path} is no field of this family; it belongs to {', '.join(owners)}"
        return f"unknown key {path}{_key_hint(path, schema)}"
    if kind == "missing":
        return f"{path} is missing"
    if kind == "union_tag_not_found":
        return f"{path}.family is missing; known: {', '.join(known_families())}"
    if kind == "union_tag_invalid":
        tag, known = context["tag"], known_families()
        return f"{path}.family={tag!r} is unknown{_hint(tag, known)}; known: {', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{path}.{message}" if path else message
    shown = "" if isinstance(given, Mapping) else f" (got {given!r})"
    return f"{path}: {message}{shown}{_nearest(kind, context, given)}"


def _path_parts(location: tuple[str | int, ...]) -> list[str]:
    """Give the path as written in a file, without the family that tags the model union."""
    parts = [str(part) for part in location]
    return [
        part
        for index, part in enumerate(parts)
        if not (index and parts[index - 1] == "model" and part in known_families())
    ]


def _owners(location: tuple[str | int, ...]) -> list[str]:
    """Find the families that have a field which the tagged one lacks."""
    if len(location) < 2 or location[-2] not in known_families():
        return []
    return [name for name, kind in known_families().items() if location[-1] in kind.model_fields]


def _nearest(kind: str, context: Mapping[str, Any], given: Any) -> str:
    if kind == "literal_error":
        return _hint(str(given), [name.strip("'") for name in _split_expected(context["expected"])])
    bound = context.get("ge", context.get("le"))
    return "" if bound is None else f"; nearest: {bound}"


def _split_expected(expected: str) -> list[str]:
    return expected.replace(" or ", ", ").split(", ")


def _hint(given: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _key_hint(path: str, schema: type[BaseModel]) -> str:
    known = sorted(set(_known_paths(schema, "")))
    section, _, leaf = path.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if _section(name) == section}
    near = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {siblings[near[0]]}?"
    anywhere = [name for name in known if name.rpartition(".")[2] == leaf]
    anywhere += difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    return f"; did you mean {anywhere[0]}?" if anywhere else ""


def _section(path: str) -> str:
    return path.rpartition(".")[0]


def _known_paths(schema: type[BaseModel], prefix: str) -> Iterable[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        for kind in _sections_of(field.annotation):
            yield from _known_paths(kind, f"{prefix}{name}.")


def _sections_of(annotation: Any) -> Iterable[type[BaseModel]]:
    """Find config classes in an annotation; a list's entries are no path of their own."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for part in get_args(annotation):
        yield from _sections_of(part)
