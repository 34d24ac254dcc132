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
from pipeline.config.study import ProbeConfig, StudyConfig
from pipeline.config.tree import merge
from pipeline.errors import ConfigError
from pipeline.study.differences import list_differences
from pipeline.study.match import MatchedSize, count_parameters, match_model

DISPLAY_NAMES = {"gpt": "Transformer", "lstm_attention": "LSTM with attention"}
"""What a report calls a family whose label in the study is just the family's name."""


@dataclass(frozen=True, kw_only=True)
class TrainCell:
    """One training run of a study."""

    name: str
    label: str
    """Label of the family in the study."""
    run: RunConfig
    num_workers: int


@dataclass(frozen=True, kw_only=True)
class ProbeCell:
    """One measurement over all families."""

    name: str
    probe: str
    params: Mapping[str, Any]
    runs: Mapping[str, RunConfig]
    """Label of a family to its run."""
    num_workers: int


Cell = TrainCell | ProbeCell


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
    shapes = _resolve_shapes(study)
    sizes = _match_sizes(study, shapes)
    models = {label: size.model for label, size in sizes.items()}
    runs = {
        label: run.model_copy(update={"model": models.get(label, run.model)})
        for label, run in shapes.items()
    }
    plan = StudyPlan(
        directory=study.output_dir / study.name,
        families=runs,
        sizes=sizes,
        train_cells=_plan_training(study, runs),
        probe_cells=_plan_probes(study, runs),
    )
    _check(plan)
    return plan


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


def _resolve_shapes(study: StudyConfig) -> dict[str, RunConfig]:
    runs = {}
    for label, fields in study.families.items():
        origin = f"study {study.name}, families.{label}"
        tree = merge(study.base, fields)
        for key in ("name", "seed", "output_dir"):
            if key in tree:
                raise ConfigError(f"{origin}: {key} is set by the study; remove it")
        tree = {**tree, "name": label, "seed": study.seeds[0], "output_dir": study.output_dir}
        runs[label] = build_run(tree, origin)
    return runs


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
