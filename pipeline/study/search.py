"""From the trials of a search to the best hyperparameters of each model and family, with spread.

Every hyperparameter is judged by the best quarter of the trials, at least three: the single best
one is a lucky draw in all but the parameter that mattered.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config.automatic import PUBLISHED_RULE
from pipeline.config.schema import RunConfig
from pipeline.config.study import SearchConfig
from pipeline.study.records import StudyRecords
from pipeline.study.trials import PARAMETERS, as_drawn, place_in_range, trial_name

BEST_FRACTION = 0.25
"""Share of the trials that a coefficient is taken from."""
LEAST_BEST = 3
"""Trials it is taken from at least."""
EDGE_FRACTION = 0.1
"""A best trial in the outer tenth of its range, on the scale of the draws, is flagged; so is one
beyond which no trial went: rounding can keep all batches away from the end of their range."""
NUM_RESAMPLES = 2000
INTERVAL_PERCENT = (2.5, 97.5)
RESAMPLING_SEED = 0


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What one trial reached; multiples are of the published rule, as run after rounding."""

    index: int
    loss: float
    """Final validation loss, nats per token."""
    learning_rate: float
    batch_tokens: float
    warmup_tokens: float
    beta2: float
    """The decay itself."""


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """Where the best trials of one model stand in one hyperparameter."""

    parameter: str
    best: float
    """Of the trial with the lowest loss."""
    centre: float
    """Geometric mean over the best quarter of the trials; for beta2 of 1 - beta2."""
    low: float
    """Least value in the best quarter."""
    high: float
    """Greatest value in the best quarter."""
    is_at_edge: bool
    """The best trial stands in the outer tenth of its range, or no trial went further: the optimum
    may lie outside."""


@dataclass(frozen=True, kw_only=True)
class ModelSearch:
    """The search of one model."""

    label: str
    family: str
    num_parameters: int
    """Non-embedding parameters."""
    trials: list[TrialResult]
    """By index."""
    optima: list[Optimum]

    @property
    def best_loss(self) -> float:
        """Lowest loss of a trial."""
        return min(trial.loss for trial in self.trials)


@dataclass(frozen=True, kw_only=True)
class Coefficient:
    """One coefficient of a family, over all its sizes."""

    family: str
    parameter: str
    value: float
    """Geometric mean over the sizes; a multiple of the published coefficient, or beta2."""
    low: float
    high: float
    """Ends of the 95% interval of resampled trials."""
    ratio: float
    """Over the first family's, from the same trials; for beta2 of 1 - beta2."""
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """A whole search."""

    num_trials: int
    """Trials that every model finished; only these count."""
    num_best: int
    """Trials that a coefficient is taken from, for each model."""
    models: list[ModelSearch]
    coefficients: list[Coefficient]


def analyze_search(records: StudyRecords, search: SearchConfig) -> SearchResult:
    """Turn the finished trials into optima and coefficients.

    Only trials that every model finished count, so that all had the same number of them.

    Args:
        records: The study as it stands on disk.
        search: Its ranges.
    """
    labels = list(records.plan.families)
    finished = [
        index
        for index in range(search.num_trials)
        if all(_loss(records, label, index) is not None for label in labels)
    ]
    if not finished:
        return SearchResult(num_trials=0, num_best=0, models=[], coefficients=[])
    num_best = min(len(finished), max(LEAST_BEST, round(BEST_FRACTION * len(finished))))
    models = [_search_model(records, label, finished, search, num_best) for label in labels]
    return SearchResult(
        num_trials=len(finished),
        num_best=num_best,
        models=models,
        coefficients=_fit_coefficients(models, num_best),
    )


def multiples_of_rule(run: RunConfig) -> dict[str, float]:
    """Give the hyperparameters of a run as multiples of the published rule, beta2 as it is."""
    size, train = run.model.num_parameters(0).non_embedding, run.train
    warmup_tokens = train.schedule.warmup_fraction * train.total_tokens
    return {
        "learning_rate": train.optimizer.learning_rate / PUBLISHED_RULE.learning_rate_at(size),
        "batch_tokens": train.global_batch_tokens / PUBLISHED_RULE.batch_tokens_at(size),
        "warmup_tokens": warmup_tokens / (PUBLISHED_RULE.warmup_tokens_per_parameter * size),
        "beta2": train.optimizer.beta2,
    }


def _loss(records: StudyRecords, label: str, index: int) -> float | None:
    record = records.runs.get(trial_name(label, index))
    metric = None if record is None else record.result.metrics.get("eval/loss")
    return None if metric is None else metric.value


def _search_model(
    records: StudyRecords,
    label: str,
    finished: Sequence[int],
    search: SearchConfig,
    num_best: int,
) -> ModelSearch:
    runs = {cell.name: cell.run for cell in records.plan.train_cells}
    trials = []
    for index in finished:
        loss = _loss(records, label, index)
        assert loss is not None
        values = multiples_of_rule(runs[trial_name(label, index)])
        trials.append(TrialResult(index=index, loss=loss, **values))
    ranked = sorted(trials, key=lambda trial: trial.loss)
    model = records.plan.families[label].model
    return ModelSearch(
        label=label,
        family=model.family,
        num_parameters=model.num_parameters(0).non_embedding,
        trials=trials,
        optima=[_find_optimum(name, ranked, num_best, search) for name in PARAMETERS],
    )


def _find_optimum(
    name: str, ranked: Sequence[TrialResult], num_best: int, search: SearchConfig
) -> Optimum:
    tried = [float(getattr(trial, name)) for trial in ranked]
    values = tried[:num_best]
    centre = math.exp(sum(math.log(as_drawn(name, value)) for value in values) / len(values))
    place = place_in_range(name, values[0], search)
    return Optimum(
        parameter=name,
        best=values[0],
        centre=as_drawn(name, centre),
        low=min(values),
        high=max(values),
        is_at_edge=not (
            EDGE_FRACTION <= place <= 1 - EDGE_FRACTION and min(tried) < values[0] < max(tried)
        ),
    )


def _fit_coefficients(models: Sequence[ModelSearch], num_best: int) -> list[Coefficient]:
    """Give each family's coefficients; resampled trials are the same ones for every model."""
    num_trials = len(models[0].trials)
    generator = np.random.default_rng(RESAMPLING_SEED)
    samples = generator.integers(num_trials, size=(NUM_RESAMPLES, num_trials))
    families = list(dict.fromkeys(model.family for model in models))
    coefficients = []
    for name in PARAMETERS:
        logs = {
            family: np.array([
                _log_centre([m for m in models if m.family == family], name, num_best, rows)
                for rows in (np.arange(num_trials), *samples)
            ])
            for family in families
        }  # fmt: skip
        for family in families:
            coefficients.append(_coefficient(family, name, logs, families[0]))
    return coefficients


def _log_centre(models: Sequence[ModelSearch], name: str, num_best: int, rows: np.ndarray) -> float:
    """Give the mean logarithm of a hyperparameter over the best trials of all sizes of a family."""
    centres = []
    for model in models:
        losses = np.array([trial.loss for trial in model.trials])[rows]
        logs = np.log([as_drawn(name, getattr(trial, name)) for trial in model.trials])[rows]
        centres.append(float(logs[np.argsort(losses, kind="stable")[:num_best]].mean()))
    return sum(centres) / len(centres)


def _coefficient(
    family: str, name: str, logs: Mapping[str, np.ndarray], reference: str
) -> Coefficient:
    own, ratios = logs[family], logs[family] - logs[reference]
    low, high = (float(v) for v in np.percentile(own[1:], INTERVAL_PERCENT))
    ratio_low, ratio_high = (float(v) for v in np.percentile(ratios[1:], INTERVAL_PERCENT))
    bounds = sorted(as_drawn(name, math.exp(v)) for v in (low, high))
    return Coefficient(
        family=family,
        parameter=name,
        value=as_drawn(name, math.exp(float(own[0]))),
        low=bounds[0],
        high=bounds[1],
        ratio=math.exp(float(ratios[0])),
        ratio_low=math.exp(ratio_low),
        ratio_high=math.exp(ratio_high),
    )
