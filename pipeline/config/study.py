"""What a study is: families at matched size, seeds, probes, and the cluster they run on."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.cluster import ClusterConfig
from pipeline.config.section import Name, Section, Seed


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
