"""What a run is: every field of `RunConfig`, its unit, its default and the reason for it."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config.checkpoint import BranchConfig, CheckpointConfig, check_steps
from pipeline.config.data import DataConfig
from pipeline.config.gpt import GptConfig
from pipeline.config.model import ModelConfig
from pipeline.config.section import Fraction, Name, Section, Seed, check_multiple


class OptimizerConfig(Section):
    """AdamW, with weight decay on matrices only."""

    learning_rate: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Decay of the second moment; 0.95 suits small batches, 0.999 less (Porian et al. 2024)."""
    epsilon: float = Field(default=1e-8, gt=0.0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """Decoupled decay, on parameters of two or more dimensions."""
    gradient_clipping: float = Field(default=1.0, ge=0.0)
    """Largest global gradient norm; 0 turns clipping off."""


class ScheduleConfig(Section):
    """How the learning rate moves over the run; fractions are of all steps."""

    kind: Literal["cosine", "wsd"] = "cosine"
    """Cosine decay, or warm-up, stable, decay with a (1 - sqrt) cool-down (Haegele et al. 2024)."""
    warmup_fraction: Fraction = 0.02
    """Share of steps with a linear rise from zero."""
    decay_fraction: Fraction = 0.2
    """Share of steps in the cool-down; wsd only."""
    final_fraction: Fraction = 0.1
    """Learning rate at the end, as a share of the peak."""

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if self.kind == "wsd" and self.warmup_fraction + self.decay_fraction > 1.0:
            raise ValueError(
                f"warmup_fraction={self.warmup_fraction} + "
                f"decay_fraction={self.decay_fraction} > 1; "
                f"nearest decay_fraction: {1.0 - self.warmup_fraction:g}"
            )
        return self


class DocumentsConfig(Section):
    """What a sample of several documents lets pass from one to the next; all off by default."""

    reset_positions: bool = False
    """Positions start at 0 in every document; families without positions take no notice."""
    mask_attention: bool = False
    """Attention sees its own document only."""
    reset_state: bool = False
    """Recurrent state is zero at the start of every document; the Transformer has none."""


class TrainConfig(Section):
    """How much is trained, in tokens, and how it is cut into steps."""

    automatic: bool = False
    """Whether batch, tokens, learning rate, betas and warm-up that are not stated follow from the
    model's size by the rule of its family (`pipeline/config/automatic.py`); off, so that a run
    means what it says."""
    tokens_per_parameter: float | None = Field(default=None, gt=0.0)
    """Automatic only: training tokens per non-embedding parameter; None takes 20."""
    filled_by_rule: tuple[str, ...] | None = None
    """Written into a resolved run: the fields that the rule filled; None before that."""
    global_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens of one optimizer step over all ranks."""
    sequence_tokens: int = Field(default=256, ge=2)
    """Tokens T of one sample; a sample reads T + 1 tokens."""
    micro_batch_samples: int = Field(default=8, ge=1)
    """Samples of one forward pass on one rank; accumulation follows from the global batch."""
    total_tokens: int = Field(default=4_915_200, ge=1)
    """Tokens of the whole run; a multiple of `global_batch_tokens`."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The update rule."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the run."""
    documents: DocumentsConfig = DocumentsConfig()
    """Borders between documents inside a sample."""
    activation_checkpointing: bool = False
    """Whether blocks keep their input only and compute the rest again in the backward pass: about a
    third more products for a fraction of the activations."""
    compile: bool = False
    """Whether `torch.compile` fuses the operations of blocks; False, because it takes up to minutes
    before the first step. A recurrence is never compiled, and nothing is at ZeRO stage 3."""

    @property
    def is_open(self) -> bool:
        """Whether a rule has yet to fill what is not stated."""
        return self.automatic and self.filled_by_rule is None

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.total_tokens // self.global_batch_tokens

    @model_validator(mode="after")
    def _rule_is_wanted(self) -> Self:
        if self.automatic:
            return self
        for name in ("tokens_per_parameter", "filled_by_rule"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} has a meaning with automatic=true only; remove it")
        return self

    @model_validator(mode="after")
    def _tokens_are_stated_once(self) -> Self:
        is_filled = self.filled_by_rule is not None and "total_tokens" in self.filled_by_rule
        is_stated = "total_tokens" in self.model_fields_set and not is_filled
        if self.tokens_per_parameter is not None and is_stated:
            raise ValueError(
                f"tokens_per_parameter={self.tokens_per_parameter:g} and "
                f"total_tokens={self.total_tokens} are two ways to say the same; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        if self.is_open:
            return self
        micro_tokens = self.micro_batch_samples * self.sequence_tokens
        check_multiple(
            "global_batch_tokens", self.global_batch_tokens, micro_tokens,
            f"micro({self.micro_batch_samples}) x seq({self.sequence_tokens})",
        )  # fmt: skip
        check_multiple(
            "total_tokens", self.total_tokens, self.global_batch_tokens, "global_batch_tokens"
        )
        return self


class ZeroConfig(Section):
    """DeepSpeed ZeRO: which training state is split over the ranks."""

    stage: int = 1
    """0 replicates all, 1 splits optimizer state, 2 also gradients, 3 also parameters."""
    param_persistence_threshold: int = Field(default=0, ge=0)
    """Stage 3 keeps parameters below this many elements whole; 0 really shards small models."""
    bucket_elements: int = Field(default=50_000_000, ge=1)
    """Elements of one communication bucket; DeepSpeed's 5e8 costs gigabytes of scratch on a CPU."""

    @model_validator(mode="after")
    def _stage_exists(self) -> Self:
        if not 0 <= self.stage <= 3:
            nearest = 0 if self.stage < 0 else 3
            raise ValueError(f"stage={self.stage} is outside 0..3; nearest: {nearest}")
        return self


class EvalConfig(Section):
    """Evaluation on a fixed validation set."""

    every_steps: int | None = Field(default=100, ge=1)
    """Steps between evaluations; None evaluates at the end only."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Validation tokens scored, in samples spread evenly over the split; None scores all."""


class GuardConfig(Section):
    """What happens when numbers go wrong."""

    max_nonfinite_steps: int = Field(default=10, ge=1)
    """Steps in a row with non-finite numbers, each skipped on all ranks, before the run stops.
    Spikes that are skipped count as well: so many in a row are no outliers."""
    spike: Literal["off", "raise", "skip", "rewind"] = "off"
    """What a step does whose loss or gradient norm lies far above those before it: off takes it,
    skip leaves it out, raise stops the run, rewind goes back to the newest checkpoint and reads on
    further along. Off, because a comparison must not leave out steps that nobody asked it to."""
    spike_sigmas: float = Field(default=6.0, gt=0)
    """Standard deviations above the mean that make a spike; OLMo's 6, which no clean run reaches by
    chance."""
    spike_window_steps: int = Field(default=128, ge=4)
    """Applied steps that mean and deviation are taken over, OLMo's 128; spikes are looked for once
    half of them are there."""
    rewind_skip_steps: int = Field(default=200, ge=1)
    """Steps' batches left out after a rewind, counted from the checkpoint; at least those up to the
    spike. PaLM left out 200 to 500."""
    max_rewinds: int = Field(default=3, ge=1)
    """Rewinds of a run before it stops: data cannot be the reason for ever."""
    max_attempts_without_progress: int = Field(default=3, ge=1)
    """Starts in a row from one step without a later checkpoint or an agreed stop, before another is
    refused: a fault that returns each time is not mended by trying."""
    allow_mismatch: bool = False
    """Whether ranks may differ in code, versions, config or data; the run's events then say how."""
    watchdog_seconds: float | None = Field(default=300.0, gt=0)
    """How long no rank of a host may move from one phase of a step to the next before the watchdog
    ends the ranks; four times that in the first step, and never less than five times what a phase
    has taken. Below the 600 s after which the process group gives up without saying who was late;
    null leaves ranks alone, as a debugger needs."""


class TrackingConfig(Section):
    """Where events are replayed to."""

    uri: str | None = None
    """MLflow tracking URI; None takes SQLite, `mlflow.db` in the output directory."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between training events."""


class ProfileConfig(Section):
    """Which steps are looked into."""

    steps: str | None = None
    """First and last step of a trace, as in 10..12, counted from 1; None takes none. A traced step
    takes longer, so its times are left out of the medians."""

    @property
    def first_and_last(self) -> tuple[int, int] | None:
        """The steps as numbers."""
        if self.steps is None:
            return None
        first, _, last = self.steps.partition("..")
        return int(first), int(last)

    @model_validator(mode="after")
    def _steps_rise(self) -> Self:
        if self.steps is None:
            return self
        if not re.fullmatch(r"[0-9]+\.\.[0-9]+", self.steps) or self.first_and_last is None:
            raise ValueError(f"steps={self.steps} is not FIRST..LAST, such as 10..12, nor null")
        first, last = self.first_and_last
        if not 1 <= first <= last:
            raise ValueError(
                f"steps={self.steps}: the first is at least 1 and the last not below it; "
                f"nearest: {max(1, first)}..{max(1, first, last)}"
            )
        return self


class RunConfig(Section):
    """One training run, complete; world size lives in `ClusterConfig`."""

    name: Name = "run"
    """Name of the run and of its directory."""
    seed: Seed = 0
    """Seed of initialisation and of the sample order, each through its own generator."""
    output_dir: Path = Path("runs")
    """Root of runs, studies, shards and the default tracking store; made absolute when loaded."""
    data: DataConfig = DataConfig()
    """Text and tokens."""
    model: ModelConfig
    """The model family and its shape; the one field without a default."""
    train: TrainConfig = TrainConfig()
    """Budget, batches, optimizer and schedule."""
    zero: ZeroConfig = ZeroConfig()
    """Which state is split over the ranks."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of forward and backward; master weights are always fp32."""
    eval: EvalConfig = EvalConfig()
    """Evaluation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    branch: BranchConfig | None = None
    """Where the run begins, if not at step 0: in a checkpoint of another run."""
    guard: GuardConfig = GuardConfig()
    """Non-finite numbers, spikes, ranks that differ and starts that lead nowhere."""
    tracking: TrackingConfig = TrackingConfig()
    """Events and MLflow."""
    profile: ProfileConfig = ProfileConfig()
    """Traces of single steps."""

    @model_validator(mode="after")
    def _rewind_has_checkpoints(self) -> Self:
        policy = self.checkpoint
        has_none = policy.every_steps is None and policy.every_seconds is None
        if self.guard.spike == "rewind" and has_none:
            raise ValueError(
                "guard.spike=rewind goes back to a checkpoint, and checkpoint.every_steps is null "
                "as is every_seconds; set one, or use guard.spike=skip"
            )
        return self

    @model_validator(mode="after")
    def _steps_are_taken(self) -> Self:
        if not self.train.is_open:
            check_steps(self.checkpoint, self.branch, self.train.total_steps)
        return self

    @model_validator(mode="after")
    def _model_has_an_objective(self) -> Self:
        if isinstance(self.model, GptConfig) and not self.model.causal:
            raise ValueError(
                "model.causal=false reads the next token, which training and evaluation ask it to "
                "predict, and there is no other objective yet; legal: true"
            )
        return self

    @model_validator(mode="after")
    def _compiling_is_of_use(self) -> Self:
        if self.train.compile and self.zero.stage == 3:
            raise ValueError(
                "train.compile=true gains nothing at zero.stage=3, which gathers parameters inside "
                "each block; legal: train.compile=false, or zero.stage=0, 1 or 2"
            )
        if self.train.compile and not self.model.is_compilable:
            raise ValueError(
                "train.compile=true finds nothing to compile with model.feed_forward=false, "
                "because a recurrence is never compiled; legal: train.compile=false, or "
                "model.feed_forward=true"
            )
        return self

    @model_validator(mode="after")
    def _profiled_steps_are_taken(self) -> Self:
        if self.train.is_open:
            return self
        steps, total = self.profile.first_and_last, self.train.total_steps
        if steps is not None and steps[1] > total:
            raise ValueError(
                f"profile.steps={self.profile.steps} goes beyond the run's {total} steps; "
                f"nearest: {min(steps[0], total)}..{total}"
            )
        return self

    @model_validator(mode="after")
    def _sequence_fits_positions(self) -> Self:
        if self.train.sequence_tokens > self.model.max_positions:
            raise ValueError(
                f"train.sequence_tokens={self.train.sequence_tokens} is longer than "
                f"model.max_positions={self.model.max_positions}; nearest: "
                f"train.sequence_tokens={self.model.max_positions} or "
                f"model.max_positions={self.train.sequence_tokens}"
            )
        return self
