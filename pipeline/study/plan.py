"""From a study config to its cells: what runs, under which name and at which world size.

A training cell is one family under one seed; a probe cell is one probe at one world size over all
families. Names are stable, so that a study continued later finds its finished cells.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.batching import plan_batches
from pipeline.config.load import build_run
from pipeline.config.model import ModelConfig
from pipeline.config.schema import RunConfig
from pipeline.config.study import LadderConfig, ProbeConfig, SearchConfig, StudyConfig
from pipeline.config.tree import merge
from pipeline.errors import ConfigError
from pipeline.study.differences import list_differences
from pipeline.study.ladder import plan_ladder
from pipeline.study.match import MatchedSize, count_parameters, match_model, vocab_size_of
from pipeline.study.planned import Cell, ProbeCell, TrainCell
from pipeline.study.trials import draw_trials, trial_name

DISPLAY_NAMES = {"gpt": "Transformer", "lstm_attention": "LSTM with attention"}
"""What a report calls a family whose label in the study is just the family's name."""

SEARCHED_FIELDS = (
    "global_batch_tokens",
    "optimizer.learning_rate",
    "optimizer.beta2",
    "schedule.warmup_fraction",
)
"""Fields of `train` that a search draws; a family that stated one would search over nothing."""


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """All cells of a study, training first, in the order in which they run."""

    directory: Path
    families: Mapping[str, RunConfig]
    """Label of a family to its run under the first seed."""
    sizes: Mapping[str, MatchedSize]
    """Label to size and distance from the reference; empty where nothing is matched."""
    train_cells: tuple[TrainCell, ...]
    probe_cells: tuple[ProbeCell, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells in the order in which they run."""
        return (*self.train_cells, *self.probe_cells)

    @property
    def num_cells(self) -> int:
        """Number of training and probe cells."""
        return len(self.cells)

    def display_name(self, label: str) -> str:
        """Give the name of a family as a report prints it."""
        return DISPLAY_NAMES.get(label, label)

    def run_dir(self, cell: Cell) -> Path:
        """Give the directory of a cell."""
        return self.directory / "runs" / cell.name


def plan_study(study: StudyConfig) -> StudyPlan:
    """Resolve a study into cells and check that each of them can run.

    Args:
        study: The study; `output_dir` is absolute.

    Raises:
        ConfigError: A run is contradictory, sizes cannot be matched, batches do not divide over the
            ranks, families have different text, or two cells would share a name.
    """
    trees = _family_trees(study)
    if study.ladder is not None:
        return _plan_ladder_study(study, study.ladder, trees)
    shapes = {
        label: build_run(tree, _origin(study, label), "later") for label, tree in trees.items()
    }
    sizes = _match_sizes(study, shapes)
    for label, size in sizes.items():
        trees[label]["model"] = size.model.model_dump()
    runs = {label: build_run(tree, _origin(study, label)) for label, tree in trees.items()}
    plan = StudyPlan(
        directory=study.output_dir / study.name,
        families=runs,
        sizes=sizes,
        train_cells=_plan_trials(study, study.search, trees)
        if study.search is not None
        else _plan_training(study, runs),
        probe_cells=_plan_probes(study, runs),
    )
    _check(plan)
    return plan


def _plan_ladder_study(
    study: StudyConfig, ladder: LadderConfig, trees: Mapping[str, dict[str, Any]]
) -> StudyPlan:
    origins = {label: _origin(study, label) for label in trees}
    cells = plan_ladder(study, ladder, trees, origins)
    first = {label: next(c.run for c in cells if c.label == label) for label in trees}
    plan = StudyPlan(
        directory=study.output_dir / study.name,
        families=first,
        sizes={},
        train_cells=cells,
        probe_cells=(),
    )
    _check(plan)
    return plan


def _origin(study: StudyConfig, label: str) -> str:
    return f"study {study.name}, families.{label}"


def _family_trees(study: StudyConfig) -> dict[str, dict[str, Any]]:
    trees = {}
    for label, fields in study.families.items():
        tree = merge(study.base, fields)
        for key in ("name", "seed", "output_dir"):
            if key in tree:
                raise ConfigError(f"{_origin(study, label)}: {key} is set by the study; remove it")
        places = {"name": label, "seed": study.seeds[0], "output_dir": study.output_dir}
        trees[label] = {**tree, **places}
    return trees


def _match_sizes(study: StudyConfig, shapes: Mapping[str, RunConfig]) -> dict[str, MatchedSize]:
    match = study.match
    if match is None:
        return {}
    totals = match.quantity == "total_parameters"
    vocab_sizes = {label: vocab_size_of(run) if totals else 0 for label, run in shapes.items()}
    reference: ModelConfig = shapes[match.reference].model
    target = count_parameters(reference, match, vocab_sizes[match.reference])
    sizes = {}
    for label, run in shapes.items():
        if label == match.reference:
            sizes[label] = MatchedSize(
                label=label, model=reference, num_parameters=target, target=target
            )
            continue
        fields = run.model.model_dump(exclude={"width"})
        sizes[label] = match_model(label, fields, target, match, vocab_sizes[label])
    return sizes


def _plan_training(study: StudyConfig, runs: Mapping[str, RunConfig]) -> tuple[TrainCell, ...]:
    cells = []
    for seed in study.seeds:
        for label, run in runs.items():
            name = f"{label}-seed{seed}"
            named = run.model_copy(update={"name": name, "seed": seed})
            cells.append(
                TrainCell(name=name, label=label, run=named, num_workers=study.cluster.num_workers)
            )
    return tuple(cells)


def _plan_trials(
    study: StudyConfig, search: SearchConfig, trees: Mapping[str, dict[str, Any]]
) -> tuple[TrainCell, ...]:
    """Give each family the same trials, one after the other: a search cut short stays fair."""
    cells = []
    for trial in draw_trials(search):
        for label, tree in trees.items():
            name = trial_name(label, trial.index)
            train = merge(tree.get("train", {}), {"automatic": True})
            run = build_run(
                {**tree, "name": name, "train": train}, _origin(study, label), trial.rule
            )
            _refuse_stated(run, _origin(study, label))
            cells.append(
                TrainCell(name=name, label=label, run=run, num_workers=study.cluster.num_workers)
            )
    return tuple(cells)


def _refuse_stated(run: RunConfig, origin: str) -> None:
    for path in SEARCHED_FIELDS:
        if path not in (run.train.filled_by_rule or ()):
            raise ConfigError(f"{origin}: train.{path} is what the search draws; remove it")


def _plan_probes(study: StudyConfig, runs: Mapping[str, RunConfig]) -> tuple[ProbeCell, ...]:
    cells = []
    for probe in study.probes:
        for num_workers in _world_sizes(probe, study):
            name = f"{probe.probe}-w{num_workers}"
            cells.append(
                ProbeCell(
                    name=name,
                    probe=probe.probe,
                    params=probe.params,
                    runs=runs,
                    num_workers=num_workers,
                )
            )
    return tuple(cells)


def _world_sizes(probe: ProbeConfig, study: StudyConfig) -> list[int]:
    return probe.num_workers if probe.num_workers is not None else [study.cluster.num_workers]


def _check_text(plan: StudyPlan) -> None:
    """Refuse families with other validation tokens: their losses would not compare."""
    for field, values in list_differences(plan.families).items():
        if field.startswith("data.") or field == "eval.max_tokens":
            shown = ", ".join(f"{value} in families.{label}" for label, value in values.items())
            raise ConfigError(
                f"{field} is {shown}: losses compare only on the same validation tokens; set it in "
                f"base, or make two studies"
            )


def _check(plan: StudyPlan) -> None:
    _check_text(plan)
    names = [cell.name for cell in plan.cells]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two cells of the study are both named {name}; give each seed once, and each "
                f"probe once per world size"
            )
    for cell in plan.train_cells:
        plan_batches(cell.run.train, cell.num_workers)
    for probe in plan.probe_cells:
        if probe.num_workers < 1:
            raise ConfigError(
                f"probe {probe.probe}: world size {probe.num_workers} is not positive; nearest: 1"
            )
