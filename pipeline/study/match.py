"""From a model family and a target size to the shape that has that many parameters.

The search is over whole widths; only where none is close enough, the feed-forward width moves too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.config.gpt import GptConfig
from pipeline.config.model import ModelConfig
from pipeline.config.schema import RunConfig
from pipeline.config.study import MatchConfig
from pipeline.errors import ConfigError

FEED_FORWARD_STEP = 8
"""Feed-forward widths tried are multiples of this, so that rows stay aligned in memory."""

_MODEL: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)


@dataclass(frozen=True, kw_only=True)
class MatchedSize:
    """A model of one family and how far its size is from the reference."""

    label: str
    model: ModelConfig
    num_parameters: int
    """The matched quantity of this model."""
    target: int
    """The same quantity of the reference."""

    @property
    def error_fraction(self) -> float:
        """Signed relative difference from the reference."""
        return self.num_parameters / self.target - 1.0


def count_parameters(model: ModelConfig, match: MatchConfig, vocab_size: int) -> int:
    """Count the quantity that a study matches.

    Args:
        model: The model.
        match: Names the quantity.
        vocab_size: Rows of the embedding table.
    """
    count = model.num_parameters(vocab_size)
    return count.total if match.quantity == "total_parameters" else count.non_embedding


def vocab_size_of(run: RunConfig) -> int:
    """Give the rows of the embedding table before anything is prepared.

    Raises:
        ConfigError: A loaded tokenizer leaves the size open; `model.vocab_size` states it.
    """
    if run.model.vocab_size is not None:
        return run.model.vocab_size
    if run.data.tokenizer.path is None:
        return run.data.tokenizer.vocab_size
    raise ConfigError(
        "match.quantity=total_parameters needs the vocabulary: set model.vocab_size in each family "
        "when data.tokenizer.path names a tokenizer"
    )


def match_model(
    label: str, fields: Mapping[str, Any], target: int, match: MatchConfig, vocab_size: int
) -> MatchedSize:
    """Find the width, and if needed the feed-forward width, that comes closest to a size.

    Args:
        label: Name of the family in the study, for messages.
        fields: Fields of the model config; `width` is replaced.
        target: Parameters of the reference.
        match: Quantity and tolerance.
        vocab_size: Rows of the embedding table.

    Raises:
        ConfigError: No shape comes within the tolerance; names the nearest one.
    """
    by_width = _nearest(label, _widths(label, fields, target, match, vocab_size), target)
    if abs(by_width.error_fraction) <= match.tolerance_fraction:
        return by_width
    candidates = _feed_forward_widths(label, fields, target, match, vocab_size)
    best = min([by_width, *candidates], key=lambda size: abs(size.error_fraction))
    if abs(best.error_fraction) <= match.tolerance_fraction:
        return best
    raise ConfigError(
        f"families.{label}: no width gives {match.quantity} within "
        f"{match.tolerance_fraction:.2%} of {target:,}; nearest: width={best.model.width} "
        f"feed_forward_width={best.model.resolved_feed_forward_width} with "
        f"{best.num_parameters:,} ({best.error_fraction:+.2%}); change depth or heads, or raise "
        f"match.tolerance_fraction"
    )


def _nearest(label: str, sizes: Iterator[MatchedSize], target: int) -> MatchedSize:
    found = list(sizes)
    if not found:
        raise ConfigError(
            f"families.{label}: even the smallest width exceeds {target:,} parameters"
        )
    return min(found, key=lambda size: abs(size.error_fraction))


def _widths(
    label: str, fields: Mapping[str, Any], target: int, match: MatchConfig, vocab_size: int
) -> Iterator[MatchedSize]:
    step = _width_step(label, fields)
    width = step
    while True:
        model = _build(label, {**fields, "width": width})
        count = count_parameters(model, match, vocab_size)
        yield MatchedSize(label=label, model=model, num_parameters=count, target=target)
        if count > target:
            return
        width += step


def _feed_forward_widths(
    label: str, fields: Mapping[str, Any], target: int, match: MatchConfig, vocab_size: int
) -> Iterator[MatchedSize]:
    for size in _widths(label, fields, 2 * target, match, vocab_size):
        if not getattr(size.model, "feed_forward", True):
            return
        shapes = [
            _build(label, {**fields, "width": size.model.width, "feed_forward_width": width})
            for width in (FEED_FORWARD_STEP, 2 * FEED_FORWARD_STEP)
        ]
        least, next_ = (count_parameters(model, match, vocab_size) for model in shapes)
        num_steps = max(1, 1 + round((target - least) / (next_ - least)))
        feed_forward = num_steps * FEED_FORWARD_STEP
        model = _build(
            label, {**fields, "width": size.model.width, "feed_forward_width": feed_forward}
        )
        count = count_parameters(model, match, vocab_size)
        yield MatchedSize(label=label, model=model, num_parameters=count, target=target)


def _width_step(label: str, fields: Mapping[str, Any]) -> int:
    """Give the smallest legal width: a multiple of the heads, with an even head for rotations."""
    heads = int(fields.get("heads", GptConfig().heads))
    for multiple in (1, 2):
        try:
            _MODEL.validate_python({**fields, "width": multiple * heads})
        except ValidationError:
            continue
        return multiple * heads
    _build(label, fields)
    raise ConfigError(f"families.{label}: no width is legal with heads={heads}")


def _build(label: str, fields: Mapping[str, Any]) -> ModelConfig:
    try:
        return _MODEL.validate_python(fields)
    except ValidationError as exc:
        raise ConfigError(f"families.{label}: {exc.errors()[0]['msg']}") from exc
