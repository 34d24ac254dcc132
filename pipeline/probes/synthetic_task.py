"""How fast and how well models learn a synthetic task, and what they make of other lengths or lags.

Every model, learning rate and seed is one training; the trainings are shared out over the ranks.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config.model import ModelConfig
from pipeline.config.schema import RunConfig
from pipeline.models import build_model
from pipeline.probes.arms import share_out
from pipeline.probes.context import ProbeContext
from pipeline.probes.params import find_task
from pipeline.probes.settings import FitParams, SyntheticParams, choose_runs
from pipeline.probes.task_base import Task
from pipeline.probes.task_training import (
    TEST,
    Fit,
    Learner,
    build_learner,
    evaluate,
    fit_task,
)


@dataclass(frozen=True, kw_only=True)
class Training:
    """One model under one learning rate and seed."""

    label: str
    model: ModelConfig
    learning_rate: float
    seed: int

    @property
    def columns(self) -> dict[str, Any]:
        """What every record of this training begins with."""
        return {"label": self.label, "learning_rate": self.learning_rate, "seed": self.seed}


def run(runs: Mapping[str, RunConfig], context: ProbeContext) -> list[dict[str, Any]]:
    """Train and test.

    Args:
        runs: Label to run, of which the model alone counts; vocabulary and positions are the
            task's.
        context: Rank group and arguments.

    Returns:
        For each training one record of kind `training` (see `describe_fit`), one of kind `curve`
        for each test during it (`step`, `loss`, `accuracy`, `sequence_accuracy`), and one of kind
        `trial` for each condition of the final test (`quantity`, `value`, and the same scores). A
        task that is tested at lengths beyond its training has in the first record their mean as
        `unseen_length_accuracy`, the length generalisation score of Deletang et al. 2023.

    Raises:
        ConfigError: The task is unknown, or its arguments or those of a model are illegal.
    """
    params = context.parse_params(SyntheticParams)
    task = find_task(params.task, params.task_params)
    trainings = [
        Training(label=label, model=config.model, learning_rate=rate, seed=seed)
        for (label, config), rate, seed in itertools.product(
            choose_runs(params, runs).items(), params.learning_rates, params.seeds
        )
    ]

    def measure(training: Training) -> list[dict[str, Any]]:
        context.on_event(
            f"train {training.label} on {params.task}, learning rate "
            f"{training.learning_rate:g}, seed {training.seed}"
        )
        columns = {"task": params.task, **training.columns}
        return [{**columns, **row} for row in _train(training, task, params, context)]

    return share_out(trainings, context.ranks, measure)


def _train(
    training: Training, task: Task, params: SyntheticParams, context: ProbeContext
) -> list[dict[str, Any]]:
    config = fit_to_task(training.model, task)
    model = build_model(config, task.vocab_size, training.seed).to(context.ranks.device)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    learner = build_learner(model, task, training.seed)
    fit = fit_task(learner, task, params, training.learning_rate, training.seed)
    trials = list(score_trials(learner, task, params))
    first = {
        "kind": "training", "num_parameters": num_parameters, **describe_fit(fit, params),
        "chance_accuracy": task.chance_accuracy, **score_unseen(trials, task),
    }  # fmt: skip
    if task.baseline_loss is not None:
        first["baseline_loss"] = task.baseline_loss
    curve = [{"kind": "curve", "step": p.step, **p.score.columns} for p in fit.points]
    return [first, *curve, *trials]


def fit_to_task(model: ModelConfig, task: Task) -> ModelConfig:
    """Give the model the positions of the longest example and the vocabulary of the task."""
    return model.model_copy(update={"max_positions": task.max_tokens, "vocab_size": None})


def describe_fit(fit: Fit, params: FitParams) -> dict[str, Any]:
    """Give the summary of a training.

    Returns:
        `steps`, `num_tokens`, `cpu_seconds`, the last test's scores, `has_diverged`,
        `target_accuracy`, and `is_censored`: whether no test reached the target; if one did,
        `steps_to_target` is the step of the first.
    """
    reached = [p.step for p in fit.points if p.score.accuracy >= params.target_accuracy]
    last = fit.points[-1]
    row = {
        "steps": last.step, "num_tokens": fit.num_tokens, "cpu_seconds": fit.cpu_seconds,
        **last.score.columns, "has_diverged": fit.has_diverged,
        "target_accuracy": params.target_accuracy, "is_censored": not reached,
    }  # fmt: skip
    return {**row, "steps_to_target": reached[0]} if reached else row


def score_trials(learner: Learner, task: Task, params: FitParams) -> Iterator[dict[str, Any]]:
    """Test a trained model under each condition of the task."""
    for trial in task.trials():
        rng = np.random.default_rng([TEST, trial.value])
        score = evaluate(learner, task.draw_trial(trial, params.test_samples, rng))
        yield {
            "kind": "trial", "quantity": trial.quantity, "value": trial.value, **score.columns
        }  # fmt: skip


def score_unseen(trials: Iterable[Mapping[str, Any]], task: Task) -> dict[str, float]:
    """Give the mean accuracy over the lengths of the test that are longer than any of training."""
    unseen = [
        trial["accuracy"]
        for trial in trials
        if trial["quantity"] == "length" and trial["value"] > task.train_lengths[1]
    ]
    return {"unseen_length_accuracy": sum(unseen) / len(unseen)} if unseen else {}
