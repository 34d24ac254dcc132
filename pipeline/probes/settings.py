"""The arguments of the probes that take models apart or train them on synthetic tasks."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from pipeline.config.model import ModelConfig
from pipeline.config.schema import RunConfig
from pipeline.config.section import Name, Seed
from pipeline.errors import ConfigError
from pipeline.probes.schema import ProbeParams


class ModelParams(ProbeParams):
    """Which architectures a probe measures."""

    models: dict[Name, ModelConfig] | None = None
    """Models by label, in place of those of the runs; None measures the runs' own."""


class TrainedParams(ModelParams):
    """Which weights a probe measures: fresh ones, trained ones, or both."""

    seeds: list[Seed] = Field(default_factory=list)
    """One fresh model of each label a seed; none by default, because most measurements say
    something of a trained model only."""
    trained: dict[Name, list[str]] = Field(default_factory=dict)
    """Run directories by label, whose newest checkpoint is measured; a relative one stands beside
    the probe's own directory, as all runs of a study do."""


class TextParams(TrainedParams):
    """What a probe reads of the validation text."""

    sequence_tokens: int = Field(ge=2)
    """Tokens T of a sample."""
    num_samples: int = Field(default=256, ge=1)
    """Samples, spread evenly over the split and the same for every model."""
    num_groups: int = Field(default=8, ge=1)
    """Neighbouring samples are averaged in so many groups: what a bootstrap draws from."""
    batch_samples: int = Field(default=16, ge=1)
    """Samples computed at once; changes nothing but memory."""


class GradientParams(TextParams):
    """Arguments of the gradient-distance probe."""

    text: Literal["random", "validation"] = "random"
    """What is read: random ids, which need no prepared text and suit fresh models, or the
    validation split, for trained ones."""


class ContextParams(TextParams):
    """Arguments of the context-use probe."""

    context_tokens: list[int] = Field(
        default=[1, 2, 5, 10, 20, 50, 100, 200, 500, 1000], min_length=1
    )
    """Lengths c of the truncated-context curve; those above `sequence_tokens` are left out."""


class RecallLossParams(TextParams):
    """Arguments of the recall-loss probe."""

    max_train_occurrences: int | None = Field(default=1250, ge=0)
    """A bigram that the training text holds more often than this is known by heart and counts as
    no recall; None counts every repeated bigram. Arora et al. 2023, section 3.1, take 1250 for the
    Pile."""


class AttentionParams(TextParams):
    """Arguments of the attention-use probe."""

    ablations: list[Literal["zeroed", "swapped", "heads"]] = ["zeroed", "swapped", "heads"]
    """What is done to attention while the loss is read: all of it zeroed, the weights of another
    sample taken, or each head zeroed in turn."""


class ShuffleParams(TextParams):
    """Arguments of the shuffle probe."""

    kept_tokens: list[int] = Field(default=[0, 5, 10, 20, 50, 100, 200], min_length=1)
    """Nearest tokens k that stay as they are while those beyond are permuted or reversed."""
    window_tokens: list[int] = Field(default=[3, 5, 10])
    """Widths of windows within which all tokens are permuted."""


class PermutationParams(ModelParams):
    """Arguments of the permutation probe."""

    seeds: list[Seed] = Field(default=[0], min_length=1)
    """One fresh model of each label a seed."""
    sequence_tokens: int = Field(default=16, ge=3)
    """Tokens T of a sample."""
    num_samples: int = Field(default=8, ge=1)
    """Random samples."""


class GenerationParams(ModelParams):
    """Arguments of the generation probe."""

    context_tokens: list[int] = Field(default=[128, 256, 512, 1024, 2048], min_length=1)
    """Tokens that are read before the timed ones."""
    batch_samples: list[int] = Field(default=[1, 32], min_length=1)
    """Texts at once."""
    num_tokens: int = Field(default=16, ge=1)
    """Timed tokens of each round, one after the other."""
    repeats: int = Field(default=5, ge=1)
    """Rounds, each over all models in the reverse order of the one before."""


class FitParams(ProbeParams):
    """How a model is trained on a task, the same for every model."""

    learning_rates: list[float] = Field(default=[1e-4, 4.6e-4, 2.2e-3, 1e-2], min_length=1)
    """Peak rates, each in turn; four from 1e-4 to 1e-2 as Arora et al. 2023, appendix E."""
    seeds: list[Seed] = Field(default=[0], min_length=1)
    """Seeds of weights and examples; the test examples are the same for all."""
    max_steps: int = Field(default=10_000, ge=1)
    """Optimizer steps of a training; one that has not reached the target by then is censored."""
    batch_samples: int = Field(default=64, ge=1)
    """Examples of a step, new ones each time."""
    warmup_fraction: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of the steps over which the rate rises; then it stays."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """Decoupled decay on matrices."""
    beta2: float = Field(default=0.99, ge=0.0, lt=1.0)
    """Decay of the second moment."""
    gradient_clipping: float = Field(default=1.0, ge=0.0)
    """Largest gradient norm; 0 turns clipping off."""
    evaluate_every_steps: int = Field(default=100, ge=1)
    """Steps between tests, which is how finely the steps to the target are known."""
    test_samples: int = Field(default=512, ge=1)
    """Examples of each test."""
    target_accuracy: float = Field(default=0.99, gt=0.0, le=1.0)
    """Accuracy that counts as learned. A training ends there, unless the task is tested at lengths
    that it does not train on: these need the whole budget."""


class SyntheticParams(FitParams, ModelParams):
    """Arguments of the synthetic-task probe."""

    task: str
    """A name in `pipeline.probes.TASKS`."""
    task_params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the task; each task states and checks its own."""


class EncoderDecoderParams(FitParams):
    """Arguments of the encoder-decoder probe."""

    width: int = Field(default=64, ge=2)
    """Width of embeddings, of the states of each direction, and of the scores' hidden layer."""
    backwards: bool = False
    """Whether the sequence is to be given from its end."""
    train_lengths: tuple[int, int] = (5, 20)
    """Shortest and longest sequence of training."""
    test_lengths: list[int] = Field(default=[5, 10, 20, 40], min_length=1)
    """Lengths that the accuracy is measured at."""


def choose_runs(params: ModelParams, runs: Mapping[str, RunConfig]) -> dict[str, RunConfig]:
    """Give the runs by label, with the models that the arguments name in place of their own.

    A named model takes everything else from the first run.
    """
    if params.models is None:
        return dict(runs)
    first = next(iter(runs.values()))
    return {
        label: first.model_copy(update={"model": model}) for label, model in params.models.items()
    }


def require_models(params: TrainedParams, runs: Mapping[str, RunConfig]) -> None:
    """Refuse arguments that name no weights, or those of an unknown label.

    Raises:
        ConfigError: There is nothing to measure, or a label of `trained` has no run.
    """
    unknown = sorted(set(params.trained) - set(runs))
    if unknown:
        raise ConfigError(f"params.trained names {unknown[0]!r}; known labels: {', '.join(runs)}")
    if not params.seeds and not params.trained:
        raise ConfigError(
            "params.seeds and params.trained are both empty: state a seed to measure a fresh "
            "model, or the run directory of a trained one"
        )
