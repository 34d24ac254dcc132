"""Probes of trained models on text, against second computations of what they say."""

import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pipeline.data.shards import load_manifest
from pipeline.errors import CheckpointError, DataError
from pipeline.models.base import LanguageModel
from pipeline.probes.attention_watch import Watch, attention_weights
from pipeline.probes.permutation import sharpen
from pipeline.probes.recall_loss import count_pairs, find_hits
from pipeline.probes.settings import ShuffleParams
from pipeline.probes.shuffle import change_order, count_floors
from pipeline.probes.text import in_groups, read_samples
from tests.inference.cases import rewrite_manifest
from tests.probes.cases import ARMS, GPT, make_model, make_run, measure, measure_text, write_trained
from tests.training.cases import VOCAB_SIZE, write_prepared

SAMPLES = 4
PARAMS: dict[str, Any] = {"sequence_tokens": 16, "num_samples": SAMPLES, "num_groups": 2}


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared text whose validation split holds four samples of 33 tokens, and some more."""
    return write_prepared(tmp_path_factory.mktemp("text") / "prepared", 3000, 200)


def samples(text_dir: Path, num_tokens: int) -> Tensor:
    return torch.from_numpy(read_samples(load_manifest(text_dir), SAMPLES, num_tokens))


@torch.no_grad()
def losses(model: LanguageModel, tokens_NT: Tensor) -> Tensor:
    """Losses by torch's own log-softmax and a look-up, `[N, T - 1]`."""
    logits_NTV = model.logits(tokens_NT[:, :-1]).double()
    return -logits_NTV.log_softmax(dim=2).gather(2, tokens_NT[:, 1:, None]).squeeze(2)


def chosen(rows: list[dict[str, Any]], **columns: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row.get(k) == v for k, v in columns.items())]


def test_context_use_reads_each_token_with_the_context_it_names(
    tmp_path: Path, text_dir: Path
) -> None:
    models = {"gpt": GPT, "lstm": ARMS["lstm"], "lstm_attention": ARMS["lstm_attention"]}
    params = {**PARAMS, "context_tokens": [1, 5, 16, 17]}
    rows, made = measure_text("context_use", params, models, text_dir, tmp_path)
    tokens_NT = samples(text_dir, 33)
    for label, model in made.items():
        own = chosen(rows, label=label, state="trained", seed=0, step=3)
        expected_NT = losses(model, tokens_NT[:, 16:])
        for group, row in enumerate(chosen(own, kind="stateless")):
            mean_T = expected_NT[2 * group : 2 * group + 2].mean(dim=0)
            assert (row["group"], row["num_samples"]) == (group, 2)
            assert row["loss_by_position"] == pytest.approx(mean_T.tolist(), rel=1e-4)
        # Windows of 16 that score their last 8.
        windows = [losses(model, tokens_NT[:, start : start + 17])[:, 8:] for start in (8, 16)]
        mean_T = torch.cat(windows, dim=1)[:2].mean(dim=0)
        (first, _) = chosen(own, kind="overlapped")
        assert first["loss_by_position"] == pytest.approx(mean_T.tolist(), rel=1e-4)
        for context_tokens in (1, 5, 16):
            last_N = losses(model, tokens_NT[:, -context_tokens - 1 :])[:, -1]
            (_, second) = chosen(own, kind="truncated", context_tokens=context_tokens)
            assert second["loss"] == pytest.approx(float(last_N[2:].mean()), rel=1e-4)
        assert not chosen(own, context_tokens=17)
    assert not chosen(rows, label="gpt", kind="stateful")
    # Without attention the state is all that is carried, so one long pass says the same.
    mean_T = losses(made["lstm"], tokens_NT)[:2, 16:].mean(dim=0)
    carried = chosen(rows, label="lstm", kind="stateful")[0]["loss_by_position"]
    assert carried == pytest.approx(mean_T.tolist(), rel=1e-4)
    own = chosen(rows, label="lstm_attention", kind="stateful")[0]["loss_by_position"]
    fresh = chosen(rows, label="lstm_attention", kind="stateless")[0]["loss_by_position"]
    assert own != pytest.approx(fresh, rel=1e-3)


def test_a_hit_is_a_rare_pair_seen_before_in_its_sample(text_dir: Path) -> None:
    shards = load_manifest(text_dir)
    generator = np.random.default_rng(0)
    tokens_NT = generator.integers(0, 6, (3, 40))
    train = np.fromfile(text_dir / "train-00000.bin", dtype="<u2").tolist()
    counts = Counter(zip(train, train[1:], strict=False))
    for limit in (None, 0, 40, 60):
        hits_NT = find_hits(tokens_NT, shards, limit)
        for tokens_T, hits_T in zip(tokens_NT.tolist(), hits_NT.tolist(), strict=True):
            pairs = list(zip(tokens_T, tokens_T[1:], strict=False))
            expected = [
                pair in pairs[:place] and (limit is None or counts[pair] <= limit)
                for place, pair in enumerate(pairs)
            ]
            assert hits_T == expected
    wanted = np.unique(tokens_NT[:, :-1] * VOCAB_SIZE + tokens_NT[:, 1:])
    found = [counts[divmod(int(pair), VOCAB_SIZE)] for pair in wanted]
    assert count_pairs(wanted, shards).tolist() == found


def test_recall_loss_splits_the_loss_of_all_tokens(tmp_path: Path, text_dir: Path) -> None:
    models = {label: ARMS[label] for label in ("gpt", "lstm", "lstm_additive")}
    params = {**PARAMS, "max_train_occurrences": None}
    rows, made = measure_text("recall_loss", params, models, text_dir, tmp_path)
    expected_NT = losses(made["gpt"], samples(text_dir, 17))
    own = chosen(rows, label="gpt", attention="as_trained")
    total = sum(row["num_tokens"] * row.get("loss", 0.0) for row in own)
    assert sum(row["num_tokens"] for row in own) == expected_NT.numel()
    assert total == pytest.approx(float(expected_NT.sum()), rel=1e-4)
    zeroed = {row["label"] for row in rows if row["attention"] == "zeroed"}
    assert zeroed == {"gpt", "lstm_additive"}


def test_attention_zeroed_is_a_model_whose_attention_writes_nothing(
    tmp_path: Path, text_dir: Path
) -> None:
    models = {"gpt": GPT, "lstm_attention": ARMS["lstm_attention"]}
    rows, made = measure_text("attention_use", PARAMS, models, text_dir, tmp_path)
    tokens_NT = samples(text_dir, 17)
    head = chosen(rows, label="gpt", ablation="head", layer=1, head=0)
    with torch.no_grad():
        # The first head of the second block writes through the first 8 columns.
        made["gpt"].get_parameter("blocks.1.attention.out.weight")[:, :8] = 0.0
        expected_NT = losses(made["gpt"], tokens_NT)
        assert head[0]["loss"] == pytest.approx(float(expected_NT[:2].mean()), rel=1e-4)
        for label, names in {
            "gpt": ["blocks.0.attention.out.weight", "blocks.1.attention.out.weight"],
            "lstm_attention": ["attention.out.weight"],
        }.items():
            plain = chosen(rows, label=label, ablation="none")[0]["loss"]
            assert plain != chosen(rows, label=label, ablation="zeroed")[0]["loss"]
            for name in names:
                made[label].get_parameter(name).zero_()
            expected_NT = losses(made[label], tokens_NT)
            for group, row in enumerate(chosen(rows, label=label, ablation="zeroed")):
                mean = float(expected_NT[2 * group : 2 * group + 2].mean())
                assert row["loss"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("arm", ["gpt", "gpt_learned", "lstm_attention", "lstm_dot"])
def test_the_gaze_of_every_form_sums_to_one(arm: str, tmp_path: Path, text_dir: Path) -> None:
    params = {**PARAMS, "ablations": []}
    rows, _ = measure_text("attention_use", params, {arm: ARMS[arm]}, text_dir, tmp_path)
    gazes = chosen(rows, kind="gaze")
    num_heads = {"gpt": 4, "gpt_learned": 4, "lstm_attention": 2, "lstm_dot": 1}
    assert len(gazes) == num_heads[arm]
    for gaze in gazes:
        assert sum(gaze["mass_by_distance"]) == pytest.approx(1.0, abs=1e-6)
        assert len(gaze["mass_by_distance"]) == 16
        assert 0 < gaze["mean_distance_tokens"] < 15
        assert 0 < gaze["entropy_nats"] <= math.log(16)


def test_flat_attention_has_the_closed_form_of_distance_and_entropy(
    tmp_path: Path, text_dir: Path
) -> None:
    fields = ARMS["lstm_additive"]
    write_trained(tmp_path / "flat", text_dir, fields)
    params = {**PARAMS, "seeds": [0], "ablations": ["swapped"], "num_groups": 1}
    runs = {"flat": make_run({**fields, "init_std": 1e-9}, text_dir)}
    rows = measure("attention_use", params, runs, tmp_path / "probe")
    # Embeddings of nearly 0 are normalised to nearly 0, so every score is the same.
    (gaze,) = chosen(rows, kind="gaze")
    queries = range(8, 16)
    mean_distance = sum(t / 2 for t in queries) / 8
    assert gaze["mean_distance_tokens"] == pytest.approx(mean_distance, rel=1e-3)
    entropy = sum(math.log(t + 1) for t in queries) / 8
    assert gaze["entropy_nats"] == pytest.approx(entropy, rel=1e-3)
    plain, swapped = (chosen(rows, ablation=name)[0]["loss"] for name in ("none", "swapped"))
    assert swapped == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added"])
def test_the_weights_watched_give_what_attention_gives(mask: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q_BHTK = torch.randn(2, 4, 5, 8, generator=generator)
    k_BGSK, v_BGSK = (torch.randn(2, 2, 5, 8, generator=generator) for _ in range(2))
    seen_TS = torch.ones(5, 5, dtype=torch.bool).tril().triu(-2)
    masks = {"none": None, "causal": None, "bool": seen_TS, "added": torch.randn(4, 5, 5)}
    how: dict[str, Any] = {"attn_mask": masks[mask], "is_causal": mask == "causal"}
    expected = scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, enable_gqa=True, **how)
    weights_BHTS = attention_weights(q_BHTK, k_BGSK, enable_gqa=True, **how)
    found = weights_BHTS @ v_BGSK.repeat_interleave(2, dim=1)
    assert torch.allclose(found, expected, atol=1e-6)


def test_swapped_weights_are_those_of_the_sample_before() -> None:
    model = make_model(GPT)
    sharpen(model, 0)
    tokens_BT = torch.randint(VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))
    twice_BT = tokens_BT[:1].repeat(2, 1)
    with torch.no_grad():
        plain_BTV, same_BTV = model.logits(tokens_BT), model.logits(twice_BT)
        with Watch(is_swapped=True):
            swapped_BTV, unchanged_BTV = model.logits(tokens_BT), model.logits(twice_BT)
    assert torch.allclose(unchanged_BTV, same_BTV, atol=1e-5)
    assert not torch.allclose(swapped_BTV, plain_BTV, atol=1e-2)
    # The first token sees itself alone, whatever the weights.
    assert torch.allclose(swapped_BTV[:, 0], plain_BTV[:, 0], atol=1e-5)


def test_changes_of_order_leave_the_nearest_tokens_and_the_scored_one(text_dir: Path) -> None:
    tokens_NT = samples(text_dir, 17).numpy()
    params = ShuffleParams(sequence_tokens=16, kept_tokens=[0, 5, 15, 16], window_tokens=[3])
    changes = {
        tuple(columns.values()): changed for columns, changed in change_order(tokens_NT, params)
    }
    assert set(changes) == {
        ("none",), ("permute", 0), ("reverse", 0), ("permute", 5), ("reverse", 5), ("local", 3),
    }  # fmt: skip
    for key, changed_NT in changes.items():
        assert np.array_equal(changed_NT[:, -1], tokens_NT[:, -1])
        assert np.array_equal(np.sort(changed_NT, axis=1), np.sort(tokens_NT, axis=1))
        if key[0] in ("permute", "reverse"):
            near = 16 - int(key[1])
            assert np.array_equal(changed_NT[:, near:], tokens_NT[:, near:])
            assert not np.array_equal(changed_NT[:, :near], tokens_NT[:, :near])
    assert np.array_equal(changes["reverse", 5][:, :11], tokens_NT[:, 10::-1])
    for start in range(0, 16, 3):
        stop = min(start + 3, 16)
        window_NT = changes["local", 3][:, start:stop]
        assert np.array_equal(np.sort(window_NT), np.sort(tokens_NT[:, start:stop]))


def test_shuffle_scores_the_last_token_beside_floors_of_counts(
    tmp_path: Path, text_dir: Path
) -> None:
    params = {**PARAMS, "kept_tokens": [4], "window_tokens": []}
    rows, made = measure_text("shuffle", params, {"lstm": ARMS["lstm"]}, text_dir, tmp_path)
    tokens_NT = samples(text_dir, 17)
    backwards_NT = torch.cat((tokens_NT[:, :12].flip(1), tokens_NT[:, 12:]), dim=1)
    for change, read_NT in (("none", tokens_NT), ("reverse", backwards_NT)):
        last_N = losses(made["lstm"], read_NT)[:, -1]
        (first, _) = chosen(rows, label="lstm", change=change)
        assert first["loss"] == pytest.approx(float(last_N[:2].mean()), rel=1e-4)
    train = np.fromfile(text_dir / "train-00000.bin", dtype="<u2").tolist()
    singles, pairs = Counter(train), Counter(zip(train, train[1:], strict=False))
    last_N2 = tokens_NT[:, -2:].numpy()
    floors = count_floors(last_N2, load_manifest(text_dir))
    for index, (before, last) in enumerate(last_N2.tolist()):
        alone = (singles[last] + 1) / (len(train) + VOCAB_SIZE)
        behind = pairs[before, last] / singles[before]
        assert floors["unigram"][index] == pytest.approx(-math.log(alone))
        assert floors["bigram"][index] == pytest.approx(-math.log((alone + behind) / 2))
    assert {row["label"] for row in rows} == {"lstm", "unigram", "bigram"}


def test_gradients_before_and_after_training_stand_side_by_side(
    tmp_path: Path, text_dir: Path
) -> None:
    params = {**PARAMS, "text": "validation", "seeds": [0, 1]}
    rows, _ = measure_text("gradient_distance", params, {"lstm": ARMS["lstm"]}, text_dir, tmp_path)
    states = {(row["state"], row["seed"], row["step"]) for row in rows}
    assert states == {("initial", 0, 0), ("initial", 1, 0), ("trained", 0, 3)}
    assert len(chosen(rows, kind="growth")) == 3 * 2


def test_samples_and_groups_cover_everything_once(text_dir: Path) -> None:
    tokens_NT = samples(text_dir, 50)
    validation = np.fromfile(text_dir / "validation-00000.bin", dtype="<u2")
    assert np.array_equal(tokens_NT.numpy().ravel(), validation)
    places = [list(range(10))[part] for _, part in in_groups(10, 4)]
    assert places == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    assert len(list(in_groups(3, 8))) == 3


def test_what_is_missing_is_named(tmp_path: Path, text_dir: Path) -> None:
    runs = {"gpt": make_run(GPT, text_dir)}
    long = {"sequence_tokens": 64, "num_samples": 4, "seeds": [0]}
    with pytest.raises(DataError, match="do not fit into the 200 validation tokens.* nearest: 1 "):
        measure("context_use", long, runs, tmp_path / "probe")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda run_dir: shutil.rmtree(run_dir / "checkpoints"),
            "holds no checkpoint; train",
        ),
        (lambda run_dir: cut_weights(run_dir), "is damaged"),
        (lambda run_dir: edit_run(run_dir, "heads: 2", "heads: 4"), "written by another config"),
        (lambda run_dir: edit_checkpoint(run_dir), "was trained on data aaa, the probe reads fff"),
    ],
)
def test_a_run_that_is_not_what_it_was_is_refused(
    tmp_path: Path, text_dir: Path, harm: Callable[[Path], None], message: str
) -> None:
    write_trained(tmp_path / "a", text_dir, GPT)
    harm(tmp_path / "a")
    params = {**PARAMS, "trained": {"gpt": ["a"]}}
    with pytest.raises(CheckpointError, match=message):
        measure("context_use", params, {"gpt": make_run(GPT, text_dir)}, tmp_path / "probe")


def cut_weights(run_dir: Path) -> None:
    paths = list(run_dir.rglob("*.safetensors"))
    assert paths
    paths[0].write_bytes(paths[0].read_bytes()[:-1])


def edit_run(run_dir: Path, old: str, new: str) -> None:
    text = (run_dir / "run.yaml").read_text()
    assert old in text
    (run_dir / "run.yaml").write_text(text.replace(old, new))


def edit_checkpoint(run_dir: Path) -> None:
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    rewrite_manifest(checkpoint, data_fingerprint="aaa")
