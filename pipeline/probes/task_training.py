"""From a model and a synthetic task to a trained model and how fast it learned.

The loop is one and the same for every model: AdamW with a linear warm-up and then a constant rate,
new examples at each step, and a test on examples that are the same for all.

Shapes: `B` examples, `T` time.
"""

import math
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.batching import IGNORED_LABEL
from pipeline.config.schema import OptimizerConfig
from pipeline.models.base import LanguageModel
from pipeline.probes.embedded import NumberReader
from pipeline.probes.settings import FitParams
from pipeline.probes.task_base import Examples, Task
from pipeline.probes.task_memory import ADDING_TOLERANCE
from pipeline.training.engine import build_optimizer

TRAINING, TEST = 1, 2
"""Tell the random streams of a seed apart."""
TEST_LENGTHS = 8
"""Largest number of lengths that the test of a training is spread over: examples of one length are
computed at once, and a single length would hide what the others cost."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model makes of some examples."""

    loss: float
    """Mean over the answers asked for: nats, or the squared error of a number."""
    accuracy: float
    """Share of right answers among those that count."""
    sequence_accuracy: float
    """Share of examples with all of them right."""
    num_answers: int
    """Answers that the accuracy is a share of, all tests together."""

    @property
    def columns(self) -> dict[str, Any]:
        """The numbers as a record holds them; a loss that is not finite is left out."""
        scores = {
            "accuracy": self.accuracy, "sequence_accuracy": self.sequence_accuracy,
            "num_answers": self.num_answers,
        }  # fmt: skip
        return {"loss": self.loss, **scores} if math.isfinite(self.loss) else scores


class Learner(Protocol):
    """What the loop trains."""

    module: nn.Module

    def loss(self, examples: Examples) -> Tensor:
        """Give the mean loss, with a gradient."""
        ...

    def score(self, examples: Examples) -> Score:
        """Score examples; the module is set to evaluation."""
        ...


class TokenLearner:
    """A language model that answers with tokens."""

    def __init__(self, model: LanguageModel, task: Task) -> None:
        self.module: nn.Module = model
        self._model, self._task = model, task
        self._device = model.embedding_VD.device

    def loss(self, examples: Examples) -> Tensor:
        """Give the mean loss of the labels."""
        inputs_BT, labels_BT = self._tensors(examples)
        asked = (labels_BT != IGNORED_LABEL).sum()
        losses_BT: Tensor = self._model(inputs_BT, labels_BT)
        return losses_BT.sum() / asked

    @torch.no_grad()
    def score(self, examples: Examples) -> Score:
        """Score the likeliest token at each counted label."""
        inputs_BT, labels_BT = self._tensors(examples)
        logits_BTV = self._model.logits(inputs_BT)
        loss = F.cross_entropy(
            logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED_LABEL
        )
        right_BT = (logits_BTV.argmax(dim=2) == labels_BT).cpu().numpy()
        counted_BT = self._task.counted(examples.labels)
        return Score(
            loss=float(loss),
            accuracy=float(right_BT[counted_BT].mean()),
            sequence_accuracy=float((right_BT | ~counted_BT).all(axis=1).mean()),
            num_answers=int(counted_BT.sum()),
        )

    def _tensors(self, examples: Examples) -> tuple[Tensor, Tensor]:
        inputs_BT, labels_BT = torch.from_numpy(examples.inputs), torch.from_numpy(examples.labels)
        return inputs_BT.to(self._device), labels_BT.to(self._device)


class NumberLearner:
    """A model that reads numbers and answers with one."""

    def __init__(self, model: LanguageModel, seed: int) -> None:
        self._reader = NumberReader(model, 2, seed).to(model.embedding_VD.device)
        self.module: nn.Module = self._reader
        self._device = model.embedding_VD.device

    def loss(self, examples: Examples) -> Tensor:
        """Give the mean squared error."""
        return F.mse_loss(*self._answers(examples))

    @torch.no_grad()
    def score(self, examples: Examples) -> Score:
        """Score answers within the tolerance."""
        answers_B, labels_B = self._answers(examples)
        accuracy = float(((answers_B - labels_B).abs() < ADDING_TOLERANCE).float().mean())
        loss = float(F.mse_loss(answers_B, labels_B))
        return Score(
            loss=loss, accuracy=accuracy, sequence_accuracy=accuracy, num_answers=len(labels_B)
        )

    def _answers(self, examples: Examples) -> tuple[Tensor, Tensor]:
        answers_B: Tensor = self._reader(torch.from_numpy(examples.inputs).to(self._device))
        return answers_B, torch.from_numpy(examples.labels).to(self._device)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A test during training."""

    step: int
    score: Score


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How one training went."""

    points: list[Point] = field(default_factory=list)
    """Tests, the last one at the end."""
    num_tokens: int
    cpu_seconds: float
    """Processor time of the training steps, tests left out."""
    has_diverged: bool
    """Whether a loss was not finite, which ended the training."""


def build_learner(model: LanguageModel, task: Task, seed: int) -> Learner:
    """Give the learner that reads what the task holds."""
    if task.reads == "numbers":
        return NumberLearner(model, seed)
    return TokenLearner(model, task)


def fit_task(
    learner: Learner, task: Task, params: FitParams, learning_rate: float, seed: int
) -> Fit:
    """Train on a task until the target or the end of the budget.

    Args:
        learner: Fresh; changed in place.
        task: Draws the examples; training ends at the target accuracy only if it is tested at no
            further length.
        params: Optimizer, budget and tests.
        learning_rate: Peak rate.
        seed: Of the training examples.
    """
    optimizer = build_optimizer(
        learner.module,
        OptimizerConfig(weight_decay=params.weight_decay, beta2=params.beta2),
        fused=False,
    )
    examples_rng = np.random.default_rng([seed, TRAINING])
    tests = draw_tests(task, params.test_samples)
    points: list[Point] = []
    num_tokens, cpu_seconds, is_finite = 0, 0.0, True
    for step in range(1, params.max_steps + 1):
        started = time.process_time()
        examples = task.draw_training(params.batch_samples, examples_rng)
        rate = warm_up(step, params, learning_rate)
        is_finite = take_step(learner, optimizer, examples, rate, params.gradient_clipping)
        cpu_seconds += time.process_time() - started
        num_tokens += examples.num_tokens
        if step % params.evaluate_every_steps and step < params.max_steps and is_finite:
            continue
        points.append(Point(step=step, score=evaluate(learner, *tests)))
        has_learned = points[-1].score.accuracy >= params.target_accuracy
        if not is_finite or (has_learned and not task.test_lengths):
            break
    return Fit(
        points=points, num_tokens=num_tokens, cpu_seconds=cpu_seconds, has_diverged=not is_finite
    )


def warm_up(step: int, params: FitParams, learning_rate: float) -> float:
    """Give the rate of a step, counted from 1: rising to the peak, then the peak."""
    return learning_rate * min(1.0, step / max(1.0, params.warmup_fraction * params.max_steps))


def take_step(
    learner: Learner,
    optimizer: torch.optim.AdamW,
    examples: Examples,
    learning_rate: float,
    clipping: float,
) -> bool:
    """Take one step; a loss that is not finite changes nothing and gives False."""
    learner.module.train()
    optimizer.zero_grad()
    loss = learner.loss(examples)
    if not bool(torch.isfinite(loss)):
        return False
    loss.backward()  # type: ignore[no-untyped-call]
    if clipping > 0.0:
        torch.nn.utils.clip_grad_norm_(learner.module.parameters(), clipping)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    return True


def draw_tests(task: Task, num_samples: int) -> list[Examples]:
    """Draw the examples that every training is tested on, spread over the training lengths."""
    low, high = task.train_lengths
    lengths = np.unique(np.linspace(low, high, TEST_LENGTHS).round().astype(np.int64)).tolist()
    rng = np.random.default_rng([TEST])
    return [task.draw(max(1, num_samples // len(lengths)), length, rng) for length in lengths]


def evaluate(learner: Learner, *tests: Examples) -> Score:
    """Score with the module set to evaluation; of several tests the mean."""
    learner.module.eval()
    scores = [learner.score(examples) for examples in tests]
    return Score(
        loss=sum(score.loss for score in scores) / len(scores),
        accuracy=sum(score.accuracy for score in scores) / len(scores),
        sequence_accuracy=sum(score.sequence_accuracy for score in scores) / len(scores),
        num_answers=sum(score.num_answers for score in scores),
    )
