"""Synthetic tasks against their published definitions, written a second time as plain loops."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipeline.config.batching import IGNORED_LABEL
from pipeline.errors import ConfigError
from pipeline.probes import TASKS
from pipeline.probes.params import find_task
from pipeline.probes.task_base import Examples, Task, Trial

SMALL: dict[str, dict[str, Any]] = {
    "mqar": {"ids": 32, "train_lengths": [16, 16], "test_lags": [4]},
    "word_problem": {"degree": 3},
}


def make(name: str, **fields: Any) -> Task:
    return find_task(name, {**SMALL.get(name, {}), **fields})


def draw(task: Task, num_samples: int, length: int, seed: int = 0) -> Examples:
    return task.draw(num_samples, length, np.random.default_rng(seed))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_draws_what_it_says(name: str) -> None:
    task = make(name)
    length = task.train_lengths[1]
    examples = draw(task, 40, length)
    assert examples.inputs.shape[:2] == (40, task.count_tokens(length))
    assert task.max_tokens >= examples.inputs.shape[1]
    again = draw(task, 40, length)
    assert np.array_equal(examples.inputs, again.inputs)
    assert np.array_equal(examples.labels, again.labels)
    assert not np.array_equal(examples.inputs, draw(task, 40, length, seed=1).inputs)
    if task.reads == "tokens":
        asked = examples.labels[examples.labels != IGNORED_LABEL]
        assert len(asked)
        assert 0 <= examples.inputs.min() <= examples.inputs.max() < task.vocab_size
        assert 0 <= asked.min() <= asked.max() < task.vocab_size


def test_mqar_holds_pairs_then_one_query_a_key() -> None:
    # Zoology, multiquery_ar: keys of 1..V/2-1 and values of V/2..V-1 alternate, each key comes once
    # more an even number of tokens later, and the label stands at the key.
    ids, pairs, length = 32, 4, 24
    task = make("mqar", ids=ids, pairs=pairs, train_lengths=[length, length], random_fill=False)
    examples = draw(task, 200, length)
    for inputs_T, labels_T in zip(examples.inputs, examples.labels, strict=True):
        keys, values = inputs_T[0 : 2 * pairs : 2], inputs_T[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= 1
        assert keys.max() < ids // 2 <= values.min()
        value_of = dict(zip(keys.tolist(), values.tolist(), strict=True))
        asked = np.flatnonzero(labels_T != IGNORED_LABEL)
        assert sorted(inputs_T[asked]) == sorted(keys)
        assert all((asked >= 2 * pairs) & (asked % 2 == 0))
        assert [value_of[int(inputs_T[t])] for t in asked] == labels_T[asked].tolist()
        rest = np.setdiff1d(np.arange(2 * pairs, length), asked)
        assert not inputs_T[rest].any()


def test_mqar_gaps_follow_the_published_power_law() -> None:
    # With one pair the gap is a plain draw from p(g) ~ g^(a - 1).
    length, power = 10, 0.3
    task = make("mqar", pairs=1, train_lengths=[length, length], gap_power=power)
    labels_BT = draw(task, 20_000, length).labels
    gaps = Counter(((np.argmax(labels_BT != IGNORED_LABEL, axis=1) - 2) // 2 + 1).tolist())
    weights = {gap: gap ** (power - 1) for gap in range(1, 5)}
    for gap, weight in weights.items():
        expected = weight / sum(weights.values())
        # Four standard deviations of a share of 20,000 draws.
        assert gaps[gap] / 20_000 == pytest.approx(expected, abs=4 * (0.25 / 20_000) ** 0.5)


def test_mqar_fills_with_any_id_and_keeps_pairs_and_labels() -> None:
    task = make("mqar", train_lengths=[64, 64])
    empty = draw(make("mqar", train_lengths=[64, 64], random_fill=False), 50, 64)
    filled = draw(task, 50, 64)
    is_empty = empty.inputs == 0
    assert np.array_equal(filled.labels, empty.labels)
    assert np.array_equal(filled.inputs[~is_empty], empty.inputs[~is_empty])
    assert set(filled.inputs[is_empty].tolist()) == set(range(32))


def test_mqar_asks_once_at_a_lag() -> None:
    task = make("mqar", train_lengths=[32, 32], random_fill=False)
    for lag in (2, 6, 24):
        trial = Trial(quantity="lag_tokens", value=lag)
        examples = task.draw_trial(trial, 30, np.random.default_rng(0))
        for inputs_T, labels_T in zip(examples.inputs, examples.labels, strict=True):
            (place,) = np.flatnonzero(labels_T != IGNORED_LABEL)
            assert inputs_T[place - lag] == inputs_T[place]
            assert inputs_T[place - lag + 1] == labels_T[place]


def test_induction_asks_for_what_followed_the_special_token() -> None:
    task = make("induction", train_lengths=[12, 12], test_lags=[5])
    lag = task.draw_trial(Trial(quantity="lag_tokens", value=5), 30, np.random.default_rng(0))
    for examples in (draw(task, 30, 12), lag):
        for inputs_T, labels_T in zip(examples.inputs, examples.labels, strict=True):
            first, last = np.flatnonzero(inputs_T == 16)
            assert last == 11
            assert labels_T[-1] == inputs_T[first + 1] < 16
            assert examples is not lag or last - first == 5


def test_adding_marks_one_number_in_each_half() -> None:
    examples = draw(make("adding"), 20_000, 10)
    marks_BT = examples.inputs[:, :, 1]
    assert (marks_BT[:, :5].sum(axis=1) == 1).all()
    assert (marks_BT[:, 5:].sum(axis=1) == 1).all()
    sums_B = (examples.inputs[:, :, 0] * marks_BT).sum(axis=1)
    assert np.allclose(examples.labels, sums_B)
    # Always saying 1: the published baseline of 0.167, and the share within the tolerance.
    errors_B = examples.labels - 1.0
    assert make("adding").baseline_loss == pytest.approx(0.167, abs=5e-4)
    assert np.mean(errors_B**2) == pytest.approx(1 / 6, abs=0.004)
    share = float(np.mean(np.abs(errors_B) < 0.04))
    assert share == pytest.approx(make("adding").chance_accuracy, abs=0.008)


def test_copy_memory_is_the_published_one() -> None:
    delay = 30
    task = make("copy_memory", train_lengths=[delay, delay])
    examples = draw(task, 50, delay)
    inputs_BT, labels_BT = examples.inputs, examples.labels
    assert inputs_BT.shape == labels_BT.shape == (50, delay + 20)
    assert inputs_BT[:, :10].max() == 7
    assert (inputs_BT[:, 10 : delay + 9] == 8).all()
    assert (inputs_BT[:, delay + 9] == 9).all()
    assert (inputs_BT[:, delay + 10 :] == 8).all()
    assert (labels_BT[:, : delay + 10] == 8).all()
    assert np.array_equal(labels_BT[:, -10:], inputs_BT[:, :10])
    # A guess that is sure of the blanks and takes one symbol of eight.
    chances_BT = np.where(labels_BT == 8, 1.0, 1 / 8)
    assert task.baseline_loss == pytest.approx(-np.log(chances_BT).mean())
    assert task.baseline_loss == pytest.approx(10 * math.log(8) / (delay + 20))
    assert task.counted(labels_BT).sum() == 500


@pytest.mark.parametrize("backwards", [False, True])
def test_copy_string_asks_for_the_second_string(backwards: bool) -> None:
    examples = draw(make("copy_string", backwards=backwards), 5, 4)
    for inputs_T, labels_T in zip(examples.inputs.tolist(), examples.labels.tolist(), strict=True):
        letters = inputs_T[1:5]
        wanted = letters[::-1] if backwards else letters
        assert inputs_T == [26, *letters, 27, *wanted]
        assert labels_T == [IGNORED_LABEL] * 5 + [*wanted, 28]


def test_selective_copy_keeps_the_order_of_the_symbols() -> None:
    examples = draw(make("selective_copy", count=3), 20, 12)
    for inputs_T, labels_T in zip(examples.inputs, examples.labels, strict=True):
        scattered = [s for s in inputs_T[:12].tolist() if s < 16]
        assert inputs_T[12:].tolist() == [17, 16, 16]
        assert labels_T.tolist() == [IGNORED_LABEL] * 12 + scattered


ANSWERS: dict[str, Callable[[list[int]], int]] = {
    "parity": lambda tokens: sum(tokens) % 2,
    "even_pairs": lambda tokens: int(tokens[0] != tokens[-1]),
    "cycle_navigation": lambda tokens: sum(t - 1 for t in tokens) % 5,
    # Python's own arithmetic, which takes products first.
    "modular_arithmetic": lambda tokens: eval("".join("01234+-*"[t] for t in tokens)) % 5,
}


@pytest.mark.parametrize("length", [1, 2, 9, 40])
@pytest.mark.parametrize("name", ANSWERS)
def test_a_state_task_asks_its_machine_at_the_end(name: str, length: int) -> None:
    examples = draw(make(name), 100, length)
    for inputs_T, labels_T in zip(examples.inputs.tolist(), examples.labels.tolist(), strict=True):
        assert labels_T[-1] == ANSWERS[name](inputs_T)
        assert set(labels_T[:-1]) <= {IGNORED_LABEL}


@pytest.mark.parametrize("degree", [3, 5])
def test_the_word_problem_composes_permutations(degree: int) -> None:
    task = make("word_problem", degree=degree)
    assert task.vocab_size == math.factorial(degree)
    examples = draw(task, 20, 60)
    seen = set()
    for inputs_T, labels_T in zip(examples.inputs.tolist(), examples.labels.tolist(), strict=True):
        items = list(range(degree))
        for move, label in zip(inputs_T, labels_T, strict=True):
            if move == 1:
                items[0], items[1] = items[1], items[0]
            if move == 2:
                items = items[1:] + items[:1]
            # The number in lexicographic order: how many smaller ones follow each item.
            number = 0
            for place, item in enumerate(items):
                later = sum(other < item for other in items[place + 1 :])
                number += later * math.factorial(degree - 1 - place)
            assert label == number
            seen.add(label)
    assert len(seen) == math.factorial(degree)


def test_order_tasks_ask_what_a_bag_of_tokens_cannot_tell() -> None:
    examples = draw(make("token_at_index", train_lengths=[6, 9]), 50, 9)
    for inputs_T, labels_T in zip(examples.inputs, examples.labels, strict=True):
        index = inputs_T[-1] - 16
        assert 0 <= index < 6
        assert labels_T[-1] == inputs_T[index]
    examples = draw(make("which_came_first", train_lengths=[7, 7]), 200, 7)
    named_first = 0
    for tokens, answers in zip(examples.inputs.tolist(), examples.labels.tolist(), strict=True):
        body, named = tokens[:7], tokens[7:9]
        assert [body.count(symbol) for symbol in named] == [1, 1]
        assert answers[-1] == min(named, key=body.index)
        named_first += answers[-1] == named[0]
    assert 60 < named_first < 140


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mqra", {}, "'mqra' is not one of adding, copy_memory"),
        ("mqar", {"pairs": 5}, "length 16 has to be even and at least 4 x pairs=20; nearest: 20"),
        ("mqar", {"ids": 8}, "with more than pairs=4 in each half"),
        ("mqar", {"test_lags": [5]}, "test_lags holds 5; legal: even numbers of 2 to 14"),
        ("parity", {"train_lengths": [9, 3]}, r"train_lengths=\[9, 3\] is no range"),
        ("parity", {"test_lengths": [0]}, "test_lengths holds 0; nearest: 1"),
        ("induction", {"train_lengths": [2, 9]}, "has 3 tokens; nearest: 3"),
        ("induction", {"test_lags": [70]}, "test_lags holds 70; legal: 2 to 63"),
        ("word_problem", {"degree": 4}, "degree"),
        ("parity", {"length": 3}, "unknown key length"),
    ],
)
def test_a_task_that_contradicts_itself_is_refused(
    name: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        find_task(name, {**SMALL.get(name, {}), **fields})
