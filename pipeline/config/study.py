"""What a study is: families at matched size, seeds, probes, and the cluster they run on."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.cluster import ClusterConfig
from pipeline.config.section import Name, Section, Seed

Range = tuple[Annotated[float, Field(gt=0.0)], Annotated[float, Field(gt=0.0)]]
"""Lowest and highest value that a search draws."""


class MatchConfig(Section):
    """Which quantity the families share, and how closely."""

    reference: Name
    """Label of the family that keeps its shape; the others are adjusted to it."""
    quantity: Literal["non_embedding_parameters", "total_parameters"] = "non_embedding_parameters"
    """The quantity to equalise."""
    tolerance_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    """Largest relative difference that still counts as matched; beyond it the study is refused."""


class ProbeConfig(Section):
    """One measurement that needs the models but is not a training run."""

    probe: str
    """A name in `pipeline.probes.PROBES`."""
    num_workers: list[int] | None = None
    """World sizes to measure at, one cell each; None takes the cluster's."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the probe; each probe states and checks its own."""


class SearchConfig(Section):
    """A random search of hyperparameters: each family gets the same trials.

    Ranges are multiples of the published rule at the family's own size, drawn log-uniformly.
    """

    num_trials: int = Field(default=12, ge=4)
    """Trials of each family; a longer search keeps the trials of a shorter one."""
    seed: Seed = 0
    """Seed of the draws; each trial has its own generator."""
    learning_rate: Range = (1 / 16, 4.0)
    """Multiples of the rule's peak learning rate."""
    batch_tokens: Range = (0.25, 4.0)
    """Multiples of the rule's global batch."""
    warmup_tokens: Range = (0.25, 4.0)
    """Multiples of the rule's warm-up, which is one token a parameter."""
    beta2: Range = (0.9, 0.999)
    """The decay itself, log-uniform in 1 - beta2."""

    @model_validator(mode="after")
    def _ranges_hold_something(self) -> Self:
        for name in ("learning_rate", "batch_tokens", "warmup_tokens", "beta2"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"{name}=[{low}, {high}] is empty; state the lower bound first")
        if self.beta2[1] >= 1.0:
            raise ValueError(f"beta2 reaches {self.beta2[1]}; it has to stay below 1")
        return self


class StudyConfig(Section):
    """A comparison: every family trained under one base run, and probes beside it."""

    name: Name
    """Name of the study and of its directory."""
    output_dir: Path = Path("runs")
    """Root of studies; made absolute when loaded."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Fields of `RunConfig` that all cells share, without `name` and `model`."""
    families: dict[Name, dict[str, Any]] = Field(min_length=1)
    """Label to the fields that differ; each names at least `model.family`."""
    match: MatchConfig | None = None
    """How sizes are matched; None leaves every family as written."""
    seeds: list[Seed] = Field(default_factory=lambda: [0], min_length=1)
    """One training run per family and seed."""
    probes: list[ProbeConfig] = Field(default_factory=list)
    """Measurements beside the training runs."""
    search: SearchConfig | None = None
    """Instead of one run per seed, random trials of hyperparameters for each family."""
    cluster: ClusterConfig = ClusterConfig()
    """Where the cells run."""

    @model_validator(mode="after")
    def _reference_exists(self) -> Self:
        if self.match is not None and self.match.reference not in self.families:
            raise ValueError(
                f"match.reference={self.match.reference!r} is not one of the families "
                f"{sorted(self.families)}"
            )
        return self

    @model_validator(mode="after")
    def _search_stands_alone(self) -> Self:
        if self.search is None:
            return self
        if len(self.seeds) > 1 or self.probes:
            raise ValueError("a search takes one seed and no probes; make a second study of them")
        return self
