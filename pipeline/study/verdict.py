"""What judging a claim gives: plain values, every number with the names of its runs."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.claims import Outcome
from pipeline.study.fits import Estimate
from pipeline.study.gates import GateResult


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One measurement of a hypothesis: its numbers, its gates and what it shows by itself."""

    setting: str
    effect: Estimate
    margin: float | None
    """In the unit of the statistic."""
    p_supported: float
    """P of the null that supporting has to reject; 1 behind a closed gate."""
    p_refuted: float
    gates: tuple[GateResult, ...]
    obstacle: str
    """Why the numbers decide nothing, besides gates; empty where nothing is in the way."""
    conditions: Mapping[str, str]
    """What the runs share: hardware, sizes, tokens, context, seeds."""
    runs: tuple[str, ...]

    @property
    def failed(self) -> list[GateResult]:
        """Gates that it does not pass."""
        return [gate for gate in self.gates if not gate.passed]

    @property
    def is_admitted(self) -> bool:
        """Whether its numbers may decide."""
        return not self.failed and not self.obstacle


@dataclass(frozen=True, kw_only=True)
class HypothesisVerdict:
    """A hypothesis over all its measurements."""

    statistic: str
    text: str
    role: str
    unit: str
    threshold: float
    outcome: Outcome
    p_supported: float
    """The largest over its measurements: every setting has to show it. Not corrected."""
    p_refuted: float
    measurements: tuple[Judged, ...]
    published: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim, decided or not."""

    number: int
    title: str
    outcome: Outcome
    text: str
    """The verdict for people: outcome, effects with intervals, what failed, what is false."""
    p_supported: float
    """Corrected by Holm where several claims are judged together."""
    p_refuted: float
    hypotheses: tuple[HypothesisVerdict, ...]
    failed_gates: tuple[str, ...]
    """Gates that closed a primary hypothesis, by name."""
    runs: tuple[str, ...]
