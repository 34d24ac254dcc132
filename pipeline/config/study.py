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
    """Label of the family that keeps its shape; the others are adjusted to it, and compared with
    it. On a ladder the reference is adjusted as well."""
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


class LadderConfig(Section):
    """Sizes and lengths of training, for scaling laws: each family at each size.

    For every seed one trunk trains at a constant rate; from it a run is cooled down to each length,
    so that every length ends on a finished schedule at little more than the price of the longest.
    """

    sizes: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    """Parameters of each size, in `match.quantity`; every family's width follows."""
    tokens: list[Annotated[int, Field(ge=1)]] | None = None
    """Training tokens of each length, the same for every size; rounded to whole steps."""
    tokens_per_parameter: list[Annotated[float, Field(gt=0.0)]] | None = None
    """Instead of `tokens`: tokens over the size, so that larger models read more."""
    decay_fraction: float = Field(default=0.2, gt=0.0, lt=1.0)
    """Share of a length that is cooled down over; Haegele et al. 2024 find 0.2 enough."""

    @model_validator(mode="after")
    def _lengths_are_stated_once(self) -> Self:
        if (self.tokens is None) == (self.tokens_per_parameter is None):
            raise ValueError("give tokens or tokens_per_parameter, one of the two")
        for name in ("sizes", "tokens", "tokens_per_parameter"):
            values = getattr(self, name)
            if values is not None and (not values or values != sorted(set(values))):
                raise ValueError(f"{name}={values} has to rise and to hold something")
        return self

    def lengths(self, size: int) -> list[float]:
        """Give the training tokens of each length at a size."""
        if self.tokens is not None:
            return [float(tokens) for tokens in self.tokens]
        return [ratio * size for ratio in self.tokens_per_parameter or ()]


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
    ladder: LadderConfig | None = None
    """Instead of one run per seed, every family at several sizes and lengths of training."""
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
    def _ladder_stands_alone(self) -> Self:
        if self.ladder is None:
            return self
        if self.search is not None or self.probes:
            raise ValueError("a ladder takes no search and no probes; make a second study of them")
        if self.match is None:
            raise ValueError(
                "a ladder needs match.reference, the family that the others are compared with, and "
                "match.quantity, which its sizes are in"
            )
        return self

    @model_validator(mode="after")
    def _search_stands_alone(self) -> Self:
        if self.search is None:
            return self
        if len(self.seeds) > 1 or self.probes:
            raise ValueError("a search takes one seed and no probes; make a second study of them")
        return self
