"""From a ladder of sizes and lengths to its runs: trunks at a constant rate, and their branches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.load import build_run
from pipeline.config.schema import RunConfig, TrainConfig
from pipeline.config.study import LadderConfig, MatchConfig, StudyConfig
from pipeline.config.tree import merge
from pipeline.errors import ConfigError
from pipeline.study.match import match_model, vocab_size_of
from pipeline.study.planned import Rung, TrainCell

RULE_FIELDS = ("automatic", "filled_by_rule", "tokens_per_parameter")
"""Fields of `train` by which a rule fills the others; a cell states those."""
OWN_FIELDS = ("total_tokens", "tokens_per_parameter", "schedule.kind", "schedule.decay_fraction")
"""Fields of `train` that a ladder sets."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The lengths of one size in optimizer steps."""

    batch_tokens: int
    warmup_steps: int
    steps: tuple[int, ...]
    """Of each length, rising."""
    branch_steps: tuple[int, ...]
    """Where each is branched off the trunk."""


def plan_ladder(
    study: StudyConfig,
    ladder: LadderConfig,
    trees: Mapping[str, dict[str, Any]],
    origins: Mapping[str, str],
) -> tuple[TrainCell, ...]:
    """Give the runs of a ladder in the order in which they run: small before large.

    Args:
        study: The study; `output_dir` is absolute and `match` is there.
        ladder: Its sizes and lengths.
        trees: Fields of each family's run, without size and length.
        origins: What to name in an error, by label.

    Raises:
        ConfigError: A family states what the ladder sets, a size has no shape, a length is shorter
            than its warm-up, or two lengths come to the same number of steps.
    """
    assert study.match is not None, "the config asks for it"
    cells: list[TrainCell] = []
    for label, tree in trees.items():
        _refuse_stated(tree, origins[label])
    for size in ladder.sizes:
        for label, tree in trees.items():
            sized = _at_size(tree, label, size, study.match, origins[label])
            train = _resolve(sized, max(ladder.lengths(size)), origins[label])
            lengths = plan_lengths(train, ladder, size)
            stated = train.model_dump(exclude=set(RULE_FIELDS))
            for seed in study.seeds:
                fields = {**sized, "seed": seed, "train": stated}
                cells += _plan_trunk(study, label, fields, size, lengths)
    return tuple(cells)


def plan_lengths(train: TrainConfig, ladder: LadderConfig, size: int) -> Lengths:
    """Round the lengths of a size to whole steps, warm-up and cool-down included.

    Args:
        train: The longest run of the size, resolved; its batch and warm-up hold for all lengths.
        ladder: The lengths.
        size: Parameters.

    Raises:
        ConfigError: A length is shorter than its warm-up, or two come to one number of steps.
    """
    batch = train.global_batch_tokens
    steps = tuple(max(1, round(tokens / batch)) for tokens in ladder.lengths(size))
    branches = tuple(max(1, round((1.0 - ladder.decay_fraction) * count)) for count in steps)
    warmup = round(train.schedule.warmup_fraction * steps[-1])
    if len(set(branches)) < len(branches) or any(
        a >= b for a, b in zip(branches, steps, strict=True)
    ):
        raise ConfigError(
            f"ladder, size {size:,}: lengths of {list(steps)} steps of {batch:,} tokens leave the "
            f"trunk after {list(branches)}; take lengths further apart, or a smaller "
            "train.global_batch_tokens"
        )
    if warmup > branches[0]:
        raise ConfigError(
            f"ladder, size {size:,}: the warm-up takes {warmup} steps and the shortest length is "
            f"cooled down from step {branches[0]}; lower train.schedule.warmup_fraction, or take a "
            "longer shortest length"
        )
    return Lengths(batch_tokens=batch, warmup_steps=warmup, steps=steps, branch_steps=branches)


def _refuse_stated(tree: Mapping[str, Any], origin: str) -> None:
    train = tree.get("train", {})
    stated = [name for name in OWN_FIELDS if _has(train, name)]
    if stated:
        raise ConfigError(f"{origin}: train.{stated[0]} is set by the ladder; remove it")


def _has(tree: Mapping[str, Any], name: str) -> bool:
    head, _, rest = name.partition(".")
    return head in tree and (not rest or _has(tree[head], rest))


def _at_size(
    tree: Mapping[str, Any], label: str, size: int, match: MatchConfig, origin: str
) -> dict[str, Any]:
    shape = build_run(tree, origin, "later")
    vocab_size = vocab_size_of(shape) if match.quantity == "total_parameters" else 0
    fields = shape.model.model_dump(exclude={"width"})
    matched = match_model(label, fields, size, match, vocab_size)
    return {**tree, "model": matched.model.model_dump()}


def _resolve(tree: Mapping[str, Any], tokens: float, origin: str) -> TrainConfig:
    """Give `train` of a run of about so many tokens, with what a rule fills."""
    train = tree.get("train", {})
    if train.get("automatic", False):
        size = build_run(tree, origin, "later").model.num_parameters(0).non_embedding
        length: dict[str, Any] = {"tokens_per_parameter": tokens / size}
    else:
        # Open, because the default of the tokens need not divide by the batch.
        batch = TrainConfig.model_validate({**train, "automatic": True}).global_batch_tokens
        length = {"total_tokens": max(1, round(tokens / batch)) * batch}
    return build_run(merge(tree, {"train": length}), origin).train


def _plan_trunk(
    study: StudyConfig, label: str, tree: Mapping[str, Any], size: int, lengths: Lengths
) -> list[TrainCell]:
    """Give the trunk of one size and seed, and after it a branch for each length."""
    base = f"{label}-n{size}-seed{tree['seed']}"
    trunk = f"{base}-trunk"
    directory = study.output_dir / study.name / "runs"
    checkpoint = {"keep_steps": list(lengths.branch_steps)}
    run = _run(tree, trunk, lengths, lengths.branch_steps[-1], {"checkpoint": checkpoint})
    cells = [_cell(study, label, run, size, trunk, is_trunk=True)]
    for steps, branch_step in zip(lengths.steps, lengths.branch_steps, strict=True):
        branch = {"branch": {"run_dir": str(directory / trunk), "step": branch_step}}
        name = f"{base}-d{steps * lengths.batch_tokens}"
        run = _run(tree, name, lengths, steps, branch, 1.0 - branch_step / steps)
        cells.append(_cell(study, label, run, size, trunk, is_trunk=False))
    return cells


def _run(
    tree: Mapping[str, Any],
    name: str,
    lengths: Lengths,
    steps: int,
    more: Mapping[str, Any],
    decay_fraction: float = 0.0,
) -> RunConfig:
    train = {
        "total_tokens": steps * lengths.batch_tokens,
        "schedule": {
            "kind": "wsd",
            "warmup_fraction": lengths.warmup_steps / steps,
            "decay_fraction": decay_fraction,
        },
    }
    return build_run(merge(merge({**tree, "name": name}, {"train": train}), more), name)


def _cell(
    study: StudyConfig, label: str, run: RunConfig, size: int, trunk: str, *, is_trunk: bool
) -> TrainCell:
    return TrainCell(
        name=run.name,
        label=label,
        run=run,
        num_workers=study.cluster.num_workers,
        rung=Rung(size=size, tokens=run.train.total_tokens, trunk=trunk, is_trunk=is_trunk),
    )
