"""From a cleaning config to the filters that decide which documents stay.

The filters are datatrove's own classes with the published numbers; here they are checked before
anything starts, built in a worker, and asked one text at a time.
"""

import inspect
import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.config.data import CleanConfig
from pipeline.data import FILTER_SETS, FILTERS
from pipeline.data.split_reader import Cleaned, Cleaner
from pipeline.errors import ConfigError

LONGEST_CHARACTERS = 4 << 20
"""Characters of the longest text that filters are asked about: datatrove keeps some hundred bytes
for each (words, sentences, n-grams), and a worker must stay below 1.5 GB. It is some 700,000
English words, seven times what Gopher's rules keep."""
TOO_LONG = "filters:too_long"
"""Reason of a longer one, whatever the filters."""

INSTALL = "pip install 'tandem-pretraining[clean]'"
NOT_OPTIONS = ("self", "exclusion_writer", "keep_fraction", "seed")
"""Parameters that are no options: the last two draw at random, in the order of a worker's work."""
ONE_KIND = {bool: (bool,), int: (int, float), float: (int, float), str: (str,)}
"""Type of a default to the types of a value that may stand in its place."""


class FilterChain:
    """Applies filters in order; the first that objects gives the reason."""

    def __init__(self, filters: Mapping[str, Any]) -> None:
        """Take filters of datatrove by name."""
        self._filters = dict(filters)

    def clean(self, text: str) -> Cleaned:
        """Filter one text that is not blank.

        Returns:
            The text, without the lines and marks that a filter takes out, or the reason that it is
            left out for: `FILTER:REASON` in the words of datatrove, `FILTER` where it has none,
            `FILTER:nothing_left` where all lines were taken out.
        """
        from datatrove.data import Document

        if len(text) > LONGEST_CHARACTERS:
            return Cleaned(text=text, reason=TOO_LONG)
        document = Document(text=text, id="")
        for name, text_filter in self._filters.items():
            answer = text_filter.filter(document)
            keeps, words = answer if isinstance(answer, tuple) else (answer, "")
            if not keeps:
                return Cleaned(text=text, reason=_reason(name, words))
            if not document.text or document.text.isspace():
                return Cleaned(text=text, reason=_reason(name, "nothing_left"))
        return Cleaned(text=document.text)


def build_cleaner(config: CleanConfig) -> Cleaner | None:
    """Build the filters of a config; None where there are none. A worker keeps them.

    Raises:
        ConfigError: A filter cannot be had on this machine; see `check_filters`.
    """
    return (
        _build(config.model_dump_json(include={"filters", "options"})) if config.filters else None
    )


def check_filters(config: CleanConfig) -> None:
    """Refuse filters and deduplication that cannot be had; nothing is imported where all is off.

    Raises:
        ConfigError: A name is unknown or given twice, an option is unknown, of another type, or for
            a filter that is not on, a package is missing, or a file that a filter needs is.
    """
    options = _options(config)
    _require_packages(config)
    for name, values in options.items():
        _check_options(name, _load_class(name), values)
        _check_resources(name, values)


def filter_versions(config: CleanConfig) -> dict[str, str]:
    """Give the versions of the libraries that decide which documents stay, to stand in a recipe.

    Raises:
        ConfigError: A name is unknown or given twice, or a package is missing.
    """
    _options(config)
    _require_packages(config)
    names = ["datatrove", "spacy"] if config.filters else []
    names += ["rensa"] if config.deduplicate == "minhash" else []
    return {name: version(name) for name in names}


@lru_cache(maxsize=1)
def _build(config_json: str) -> FilterChain:
    config = CleanConfig.model_validate_json(config_json)
    check_filters(config)
    built = {name: _load_class(name)(**values) for name, values in _options(config).items()}
    return FilterChain(built)


def _options(config: CleanConfig) -> dict[str, dict[str, Any]]:
    """Give the filters in their order, each with the options that differ from its defaults."""
    origins: dict[str, str] = {}
    options: dict[str, dict[str, Any]] = {}
    for given in config.filters:
        if given not in FILTERS and given not in FILTER_SETS:
            raise ConfigError(f"data.clean.filters names {given!r}; {_known(given, _names())}")
        for name, values in FILTER_SETS.get(given, {given: {}}).items():
            if name in options:
                raise ConfigError(
                    f"data.clean.filters names {name} twice, by {origins[name]!r} and by "
                    f"{given!r}; leave one out"
                )
            origins[name] = given
            options[name] = {**values, **config.options.get(name, {})}
    for name in config.options:
        if name not in options:
            on = f"those that are on are {list(options)}" if options else "no filter is on"
            raise ConfigError(f"data.clean.options is for {name!r}, which is not on; {on}")
    return options


def _check_options(name: str, built_by: type, values: Mapping[str, Any]) -> None:
    parameters = inspect.signature(built_by).parameters
    known = {key: parameters[key] for key in parameters if key not in NOT_OPTIONS}
    for key, value in values.items():
        where = f"data.clean.options.{name}.{key}={value!r}"
        if key not in known:
            raise ConfigError(f"{where}: there is no such option; {_known(key, list(known))}")
        default = known[key].default
        kinds = ONE_KIND.get(type(default))
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = isinstance(value, kinds or object) and (kinds != (int, float) or is_number)
        if kinds and value is not None and not fits:
            raise ConfigError(f"{where} is not of the type of its default, {default!r}")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in values:
            raise ConfigError(f"filter {name} needs data.clean.options.{name}.{key}")


def _check_resources(name: str, values: Mapping[str, Any]) -> None:
    """Refuse a filter that would fetch a file while it works, or whose language has no words."""
    if name == "language":
        _require("fasttext", "filter language", "pip install fasttext-numpy2-wheel")
        from datatrove.utils.lid import FT176LID, GlotLID

        backend = {"ft176": FT176LID, "glotlid": GlotLID}.get(values.get("backend", "ft176"))
        if backend is None:
            raise ConfigError(
                f"data.clean.options.language.backend={values['backend']!r}; it is ft176 or glotlid"
            )
        _require_file(name, backend().MODEL_URL, "lid", backend.MODEL_SUBFOLDER)
    elif name == "c4_bad_words":
        from datatrove.pipeline.filters import c4_filters

        language = values.get("default_language", "en")
        is_english = language == "en"
        url = c4_filters._EN_BADWORDS_URL if is_english else c4_filters._BADWORDS_URL + language
        _require_file(name, url, "filters", "c4_badwords")
    elif name == "regex":
        try:
            re.compile(values["regex_exp"])
        except (re.error, TypeError) as exc:
            raise ConfigError(
                f"data.clean.options.regex.regex_exp={values['regex_exp']!r} "
                f"is no regular expression: {exc}"
            ) from exc
    elif "language" in values:
        from datatrove.utils.word_tokenizers import load_word_tokenizer

        try:
            load_word_tokenizer(values["language"]).word_tokenize("a")
        except (ImportError, ValueError) as exc:
            raise ConfigError(f"data.clean.options.{name}.language: {exc}") from exc


def _require_file(name: str, url: str, namespace: str, subfolder: str) -> None:
    """Refuse a filter whose file is not where datatrove looks for it.

    Nothing is downloaded: tasks on many machines would, each at another time, and the shards would
    depend on what the server gave to which.
    """
    from datatrove.io import strip_protocol
    from huggingface_hub import cached_assets_path

    directory = cached_assets_path("datatrove", namespace=namespace, subfolder=subfolder)
    path = Path(directory) / strip_protocol(url).replace("/", "_")
    mark = path.with_name(f"{path.name}.completed")  # datatrove fetches what has no such mark
    if not path.is_file() or not mark.is_file():
        raise ConfigError(
            f"filter {name} needs {url}, which is not on this machine; on every machine that "
            f"prepares, put it at {path} and make an empty file {mark.name} beside it"
        )


def _require_packages(config: CleanConfig) -> None:
    if config.deduplicate == "minhash":
        _require("rensa", "data.clean.deduplicate=minhash", INSTALL)
    for package in ("datatrove", "spacy", "fasteners") if config.filters else ():
        _require(package, f"data.clean.filters={list(config.filters)}", INSTALL)


def _require(package: str, wish: str, install: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(f"{wish} needs the package {package}, which is missing: {install}")


def _load_class(name: str) -> type:
    module, _, class_name = FILTERS[name].partition(":")
    loaded: type = getattr(import_module(module), class_name)
    return loaded


def _reason(name: str, words: str) -> str:
    """Give one stable snake_case name of a reason; datatrove's own begin with the filter's."""
    words = re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")
    return f"{name}:{words.removeprefix('gopher_')}" if words else name


def _names() -> list[str]:
    return [*FILTER_SETS, *FILTERS]


def _known(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, 1)
    return f"nearest: {near[0]}" if near else f"known: {', '.join(known)}"
