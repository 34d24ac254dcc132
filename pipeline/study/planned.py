"""The cells that a study is planned into: training runs and probes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import RunConfig


@dataclass(frozen=True, kw_only=True)
class Rung:
    """Where a training run stands on a ladder of sizes and lengths."""

    size: int
    """Parameters aimed at, in the quantity that the study matches."""
    tokens: int
    """Tokens from step 0 to the end of the run."""
    trunk: str
    """Name of the run at a constant rate that it branches from; its own for a trunk."""
    is_trunk: bool
    """A trunk is never cooled down, so its loss is no result."""


@dataclass(frozen=True, kw_only=True)
class TrainCell:
    """One training run of a study."""

    name: str
    label: str
    """Label of the family in the study."""
    run: RunConfig
    num_workers: int
    rung: Rung | None = None
    """None where the study has no ladder."""


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
