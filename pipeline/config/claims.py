"""What the claims of a study are: hypotheses, thresholds, and the gates that evidence must pass."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.explain import validate
from pipeline.config.section import Name, Section
from pipeline.config.tree import read_yaml

Direction = Literal["greater", "less", "different", "equivalent"]
Outcome = Literal["supported", "refuted", "not_decided"]
Bound = Literal["at_least", "at_most", "one_of"]
GateName = Literal[
    "arms_present", "labels", "same_code", "same_data",
    "hardware", "quiet", "rounds", "synchronised", "same_compilation", "same_checkpointing",
    "fused_recurrence", "own_best_batch", "sequence_lengths", "cache",
    "seeds", "sizes", "parameter_decades", "context", "documents", "steps",
    "matched", "equal_tokens", "equal_tuning", "interior_learning_rate", "schedule_finished",
    "dropout", "epochs", "tuned_regularisation", "same_context", "trained_length", "forget_bias",
    "causality", "mask", "floors", "held_out_error", "interpolated", "shared_floor",
]  # fmt: skip

NEEDS: dict[str, frozenset[Bound]] = {
    "hardware": frozenset({"one_of"}),
    "quiet": frozenset({"at_most"}),
    "rounds": frozenset({"at_least"}),
    "synchronised": frozenset({"at_least"}),
    "sequence_lengths": frozenset({"at_least"}),
    "seeds": frozenset({"at_least"}),
    "sizes": frozenset({"at_least"}),
    "parameter_decades": frozenset({"at_least"}),
    "context": frozenset({"at_least"}),
    "documents": frozenset({"at_least"}),
    "steps": frozenset({"at_least"}),
    "matched": frozenset({"at_most", "one_of"}),
    "interior_learning_rate": frozenset({"at_least"}),
    "epochs": frozenset({"at_most"}),
    "tuned_regularisation": frozenset({"at_least"}),
    "forget_bias": frozenset({"at_least"}),
    "mask": frozenset({"one_of"}),
    "held_out_error": frozenset({"at_most"}),
}
"""Gate to the bounds that it takes, all of them; a gate that is not named takes none."""

CHOICES: dict[str, frozenset[str]] = {
    "hardware": frozenset({"accelerator", "cpu"}),
    "matched": frozenset({"total_parameters", "non_embedding_parameters"}),
    "mask": frozenset({"causal", "bidirectional"}),
}
"""Gate to the values that its `one_of` may name."""


class ArmConfig(Section):
    """What a label stands for; a run whose model is something else is mislabelled."""

    cell: Literal["none", "lstm", "gru", "elman", "min_lstm"]
    """Recurrent cell; none for a Transformer."""
    attention: Literal["none", "self", "post", "input_feeding"]
    """Where attention reads: in every block, after the recurrence, or inside its loop."""


class GateConfig(Section):
    """One condition without which an expert rejects the evidence."""

    gate: GateName
    """A name in `pipeline.study.gates.GATES`."""
    at_least: float | None = None
    """Smallest value that passes."""
    at_most: float | None = None
    """Largest value that passes."""
    one_of: list[str] | None = None
    """Values that pass, or for `matched` the quantity that is compared."""

    @model_validator(mode="after")
    def _bounds_are_those_of_the_gate(self) -> Self:
        needed = NEEDS.get(self.gate, frozenset())
        bounds: tuple[Bound, ...] = ("at_least", "at_most", "one_of")
        stated = {bound for bound in bounds if getattr(self, bound) is not None}
        if stated != needed:
            takes = ", ".join(sorted(needed)) or "no bound"
            raise ValueError(
                f"gate={self.gate!r} takes {takes}; got {', '.join(sorted(stated)) or 'none'}"
            )
        choices = CHOICES.get(self.gate, frozenset())
        if self.one_of is not None and not (self.one_of and choices.issuperset(self.one_of)):
            raise ValueError(f"one_of={self.one_of} of {self.gate}; legal: {sorted(choices)}")
        return self


class MarginConfig(Section):
    """Differences that count as none; exactly one of the two is stated."""

    absolute: float | None = Field(default=None, gt=0.0)
    """In the unit of the statistic."""
    seed_deviations: float | None = Field(default=None, gt=0.0, le=2.0)
    """Multiples of the measured deviation between seeds. Beyond 2 the error of that deviation
    itself would let more than 5% of real differences pass as none."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.absolute is None) == (self.seed_deviations is None):
            raise ValueError("margin takes either absolute or seed_deviations")
        return self


class HypothesisConfig(Section):
    """A statistic and the values of it that support or refute."""

    statistic: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name of the measured quantity; evidence carries the same."""
    text: str
    """The hypothesis in one sentence."""
    role: Literal["primary", "secondary"] = "primary"
    """Only primary ones make the verdict; a claim stands with all of them or falls with one."""
    unit: str
    """Unit of the statistic, for people."""
    direction: Direction
    """On which side of the threshold the truth lies if the hypothesis holds."""
    threshold: float = 0.0
    """The smallest effect that matters; set before any run."""
    margin: MarginConfig | None = None
    """Differences from the threshold that count as none: what refutes an effect by equivalence."""
    arms: list[Name] = Field(min_length=1)
    """Arms whose runs the statistic needs."""
    use: list[Name] = Field(default_factory=list)
    """Names in `gate_sets`."""
    gates: list[GateConfig] = Field(default_factory=list)
    """Gates beside those sets; one of the same name takes the set's place."""
    published: str
    """What the literature has found, with its source."""

    @model_validator(mode="after")
    def _margin_where_needed(self) -> Self:
        if self.margin is None and self.direction in ("different", "equivalent"):
            raise ValueError(f"direction={self.direction!r} needs a margin")
        if self.margin and self.threshold and self.direction in ("greater", "less"):
            raise ValueError(
                f"margin beside threshold={self.threshold}: a threshold other than 0 already says "
                "what matters; state one of the two"
            )
        return self


class FalseWording(Section):
    """Why a claim is false as it is usually worded."""

    text: str
    """What holds instead, in one or two sentences."""
    statistic: str
    """The hypothesis of this claim that shows it."""


class ClaimConfig(Section):
    """One claim: as people say it, as it can be tested, and its hypotheses."""

    number: int = Field(ge=1)
    title: str
    usual_wording: str
    """As it is usually said."""
    restated: str
    """So that it can be tested, with its conditions."""
    false_as_worded: FalseWording | None = None
    """Stated where the usual wording is false whatever this study finds."""
    hypotheses: list[HypothesisConfig] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_decidable(self) -> Self:
        names = [h.statistic for h in self.hypotheses]
        if len(set(names)) < len(names):
            raise ValueError(f"hypotheses name one statistic twice: {names}")
        if all(h.role != "primary" for h in self.hypotheses):
            raise ValueError("hypotheses holds no primary one, so nothing can decide the claim")
        if self.false_as_worded is not None and self.false_as_worded.statistic not in names:
            raise ValueError(
                f"false_as_worded.statistic={self.false_as_worded.statistic!r}; legal: {names}"
            )
        return self


class ClaimsConfig(Section):
    """All claims of a study, written before its first run."""

    level: float = Field(default=0.05, gt=0.0, lt=0.5)
    """Chance of any false verdict over all claims together; Holm's correction keeps it."""
    arms: dict[Name, ArmConfig]
    """Label to what it stands for."""
    every_claim: list[GateConfig]
    """Gates of every hypothesis."""
    gate_sets: dict[Name, list[GateConfig]]
    """Named lists of gates, for kinds of measurement."""
    claims: list[ClaimConfig] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        numbers = [claim.number for claim in self.claims]
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"claims share a number: {numbers}")
        for claim, hypothesis in self.walk():
            where = f"claims: {claim.number}, {hypothesis.statistic}"
            for field, known in (("arms", self.arms), ("use", self.gate_sets)):
                unknown = sorted(set(getattr(hypothesis, field)) - set(known))
                if unknown:
                    raise ValueError(f"{where}: {field} {unknown} unknown; legal: {sorted(known)}")
        return self

    def walk(self) -> Iterator[tuple[ClaimConfig, HypothesisConfig]]:
        """Give every hypothesis with its claim."""
        yield from ((claim, h) for claim in self.claims for h in claim.hypotheses)

    def gates_of(self, hypothesis: HypothesisConfig) -> list[GateConfig]:
        """Give the gates of a hypothesis: its own in place of those of its sets, each name once."""
        chosen = {gate.gate: gate for gate in self.every_claim}
        for name in hypothesis.use:
            chosen |= {gate.gate: gate for gate in self.gate_sets[name]}
        return list((chosen | {gate.gate: gate for gate in hypothesis.gates}).values())


def load_claims(path: Path) -> ClaimsConfig:
    """Load the claims of a study.

    Raises:
        ConfigError: The file cannot be read, a key is unknown, or a value is illegal.
    """
    return validate(ClaimsConfig, read_yaml(path), str(path))


def hash_claims(path: Path) -> str:
    """Give the SHA-256 of the claims file as it stands, which `sha256sum` gives too."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
