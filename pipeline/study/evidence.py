"""What a verdict is given: measurements, each with the facts of the runs that it came from.

Every field that a run did not record stays None, and a gate that needs it then fails.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.study.effect import Effect
from pipeline.study.significance import SeedDeviation

Hardware = Literal["accelerator", "cpu"]
Mask = Literal["causal", "bidirectional"]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the model of a run is, read from its config and not from its label."""

    cell: Literal["none", "lstm", "gru", "elman", "min_lstm"]
    attention: Literal["none", "self", "post", "input_feeding"]
    total_parameters: int
    non_embedding_parameters: int
    mask: Mask | None = None
    forget_bias: float | None = None
    """Total bias of the forget gate at the start, its mean over units."""
    is_causality_proven: bool | None = None
    """Whether perturbing a later token left every earlier logit as it was."""


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """How a run was trained and tuned."""

    tokens: int | None = None
    steps: int | None = None
    is_target_reached: bool | None = None
    """Whether the run stopped early because it had reached its target."""
    epochs: float | None = None
    """Passes over the training tokens."""
    dropout: float | None = None
    """The largest of its dropout rates."""
    sequence_tokens: int | None = None
    """Window of back-propagation."""
    scored_tokens: int | None = None
    """Longest context that its loss was read at."""
    bytes_per_token: float | None = None
    carries_state: bool | None = None
    is_schedule_finished: bool | None = None
    learning_rate: float | None = None
    learning_rates_tried: tuple[float, ...] = ()
    num_trials: int | None = None
    """Tuning trials of its arm and size."""
    num_regularisation_trials: int | None = None
    """Of these, distinct settings of dropout and weight decay."""


@dataclass(frozen=True, kw_only=True)
class TimingFacts:
    """How a timed cell was timed."""

    rounds: int | None = None
    is_interleaved: bool | None = None
    warmup_steps: int | None = None
    is_synchronised: bool | None = None
    load_per_core: float | None = None
    """Load average over cores while it ran, without its own threads."""
    cpu_seconds: float | None = None
    recurrence: Literal["fused", "stepped", "parallel"] | None = None
    """One library call over time, a loop in Python, or a scan; None for a Transformer."""
    is_own_best_batch: bool | None = None
    is_compiled: bool | None = None
    has_activation_checkpointing: bool | None = None
    uses_cache: bool | None = None
    """Whether generation kept keys and values."""
    sequence_lengths: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """One run or probe cell behind a number."""

    run: str
    arm: str
    """Label in the claims file."""
    cell: str
    """Name of the cell without its seed; runs of one cell differ in nothing else."""
    seed: int
    match_group: str
    """Runs of all arms that were matched with each other share it: the rung of the ladder."""
    hardware: Hardware
    code_version: str | None
    data_fingerprint: str | None
    model: ModelFacts
    training: TrainingFacts = field(default_factory=TrainingFacts)
    timing: TimingFacts = field(default_factory=TimingFacts)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One statistic as measured, with the runs it came from."""

    statistic: str
    """Name in the claims file."""
    effect: Effect
    runs: tuple[str, ...]
    """Names of all runs and probe cells behind it."""
    setting: str = ""
    """What tells it from a repeat of the same statistic: the corpus, the device."""
    seed_deviation: SeedDeviation | None = None
    """In the unit of the statistic; needed where the margin is stated in seed deviations."""
    num_documents: int | None = None
    held_out_error: float | None = None
    """Of the model behind the statistic, nats per token."""
    is_extrapolated: bool | None = None
    """Whether it was read outside the measured range."""
    is_floor_shared: bool | None = None
    """Whether the families' laws share the floor E."""
    floors: Mapping[str, float] = field(default_factory=dict)
    """Losses without order for scale: `unigram` and `ngram`, nats per token."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All measurements of a study with the facts of all its runs."""

    measurements: Sequence[Measurement]
    runs: Mapping[str, RunFacts]
    """Run name to its facts."""

    def find(self, statistic: str) -> list[Measurement]:
        """Give the measurements of a statistic, one for each setting."""
        return [m for m in self.measurements if m.statistic == statistic]
