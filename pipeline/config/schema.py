"""What a run is: every field of `RunConfig`, its unit, its default and the reason for it."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.config.model import ModelConfig

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""A name that is safe as a directory and in a command: letters, digits, dot, dash, underscore."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""A seed that every generator takes."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def check_multiple(name: str, value: int, unit: int, unit_text: str) -> None:
    """Raise unless `value` is a positive multiple of `unit`, naming the nearest legal values.

    Raises:
        ValueError: With value, unit and the neighbours on both sides.
    """
    if value % unit == 0:
        return
    low = value // unit * unit
    nearest = " or ".join(str(v) for v in (low, low + unit) if v > 0)
    raise ValueError(f"{name}={value} is not a multiple of {unit_text}={unit}; nearest: {nearest}")


class Section(BaseModel):
    """A part of a config: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SourceConfig(Section):
    """Where text comes from."""

    kind: Literal["embedded", "jsonl", "text", "huggingface"] = "embedded"
    """The embedded corpus, JSON lines, text (a file is a document), or Hugging Face datasets."""
    path: str | None = None
    """File, directory or glob for jsonl and text; hub name or local directory for huggingface."""
    text_column: str = "text"
    """The field that holds a document's text."""
    id_column: str = "id"
    """The field that holds a document's id; without it the id is made from path and ordinal."""
    split: str = "train"
    """The split of a Hugging Face dataset."""
    document_bytes: int | None = Field(default=None, ge=1)
    """Text files only: cut at blank lines into documents of about this size; None cuts nothing."""

    @model_validator(mode="after")
    def _path_is_given(self) -> Self:
        if self.kind != "embedded" and self.path is None:
            raise ValueError(
                f"kind={self.kind} needs path: the file, directory, glob or dataset to read"
            )
        if self.kind == "embedded" and self.path is not None:
            raise ValueError(
                f"kind=embedded takes no path, got {self.path!r}; use kind=jsonl or kind=text"
            )
        return self


class TokenizerConfig(Section):
    """Which tokenizer turns text into token ids."""

    path: str | None = None
    """A `tokenizer.json` to load; None trains a byte-level BPE on the source."""
    vocab_size: int = Field(default=2048, ge=257)
    """Entries to train, the end-of-document token included; ignored when `path` is given."""
    end_of_document: str = "<|endoftext|>"
    """The token that closes each document; a loaded tokenizer must hold it."""


class DataConfig(Section):
    """Source text, tokenizer and split."""

    source: SourceConfig = SourceConfig()
    """Where text comes from."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How text becomes tokens."""
    validation_fraction: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Share of documents held out, chosen by the hash of the document id."""
    output_dir: Path | None = None
    """Where prepared shards stand; None takes `data/` in the run's output directory."""
    prepared_dir: Path | None = None
    """A prepared directory to use as it is; written into a resolved run: ranks never prepare."""


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


class TrainConfig(Section):
    """How much is trained, in tokens, and how it is cut into steps."""

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

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.total_tokens // self.global_batch_tokens

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
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
    """Validation tokens used, from the start of the split; None uses all."""


class CheckpointConfig(Section):
    """When canonical checkpoints are written and how many stay."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; None writes one at the end or at a stop only."""
    keep: int = Field(default=2, ge=2)
    """Newest checkpoints kept; never below two, so that a damaged one has a predecessor."""


class GuardConfig(Section):
    """What happens when numbers go wrong."""

    max_nonfinite_steps: int = Field(default=10, ge=1)
    """Steps in a row with non-finite numbers, each skipped on all ranks, before the run stops."""


class TrackingConfig(Section):
    """Where events are replayed to."""

    uri: str | None = None
    """MLflow tracking URI; None takes SQLite, `mlflow.db` in the output directory."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between training events."""


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
    guard: GuardConfig = GuardConfig()
    """Non-finite numbers."""
    tracking: TrackingConfig = TrackingConfig()
    """Events and MLflow."""

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
