"""What a run needs of prepared shards is checked before any rank starts."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.config.data import DataConfig, MixtureConfig
from pipeline.config.schema import RunConfig
from pipeline.data.checks import check_prepared
from pipeline.data.shards import ShardManifest
from pipeline.errors import ConfigError, DataError

MakePrepared = Callable[..., ShardManifest]


def small_run(vocab_size: int | None = None) -> RunConfig:
    """A global batch of 4 samples of 8 tokens."""
    return RunConfig.model_validate(
        {
            "model": {"family": "gpt", "vocab_size": vocab_size},
            "train": {
                "sequence_tokens": 8, "micro_batch_samples": 2, "global_batch_tokens": 32,
                "total_tokens": 64,
            },
        }
    )  # fmt: skip


def test_shards_of_one_global_batch_and_one_sample_suffice(make_prepared: MakePrepared) -> None:
    manifest = make_prepared([[[1] * 33]], [[[1] * 9]], vocab_size=300)
    check_prepared(small_run(), manifest)
    check_prepared(small_run(vocab_size=300), manifest)


def test_a_table_smaller_than_the_vocabulary_names_the_nearest(
    make_prepared: MakePrepared,
) -> None:
    manifest = make_prepared([[[1] * 33]], [[[1] * 9]], vocab_size=300)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=299 .* nearest: 300"):
        check_prepared(small_run(vocab_size=299), manifest)


def test_a_train_split_below_one_global_batch_is_refused(make_prepared: MakePrepared) -> None:
    manifest = make_prepared([[[1] * 32]], [[[1] * 9]])
    with pytest.raises(DataError, match="train split has 3 samples of 8 tokens"):
        check_prepared(small_run(), manifest)


def test_a_validation_split_below_one_sample_is_refused(make_prepared: MakePrepared) -> None:
    manifest = make_prepared([[[1] * 33]], [[[1] * 8]])
    with pytest.raises(DataError, match="validation split has 8 tokens, one sample needs 9"):
        check_prepared(small_run(), manifest)


def test_a_shard_with_ids_outside_the_vocabulary_is_refused(make_prepared: MakePrepared) -> None:
    manifest = make_prepared([[[1] * 33], [[300] * 40]], [[[1] * 9]], vocab_size=300)
    with pytest.raises(
        DataError, match=r"train-00001\.bin holds the id 300, the vocabulary has 300"
    ):
        check_prepared(small_run(), manifest)


@pytest.fixture
def three_sources(make_prepared: MakePrepared) -> ShardManifest:
    """10 samples of code, 30 of web, 60 of books."""
    train = [[[1] * 81], [[1] * 241], [[1] * 481]]
    return make_prepared(train, [[[1] * 9]], sources=["code", "web", "books"])


def mixed_run(total_samples: int = 400, **mixture: Any) -> RunConfig:
    run = small_run()
    train = run.train.model_copy(update={"total_tokens": 8 * total_samples})
    data = run.data.model_copy(update={"mixture": MixtureConfig(**mixture)})
    return run.model_copy(update={"train": train, "data": data})


@pytest.mark.parametrize("mixture", [{}, {"weights": {"code": 1, "web": 2, "books": 3, "wiki": 4}}])
def test_a_source_without_train_text_is_refused_until_it_is_left_out(
    three_sources: ShardManifest, mixture: dict[str, Any]
) -> None:
    source = {"kind": "jsonl", "path": "unread.jsonl"}
    sources = dict.fromkeys(["code", "web", "books", "wiki"], source)

    def named(mixture: dict[str, Any]) -> RunConfig:
        data = DataConfig.model_validate({"sources": sources, "mixture": mixture})
        return mixed_run().model_copy(update={"data": data})

    with pytest.raises(DataError, match="source wiki has no train text in .*remove data") as caught:
        check_prepared(named(mixture), three_sources)
    ((field, value),) = re.findall(r"data\.mixture\.(\w+)\.wiki=(\d)", str(caught.value))
    left_out = {field: {**mixture.get(field, {}), "wiki": float(value)}}
    check_prepared(named(left_out), three_sources)
    check_prepared(named(left_out | {"max_epochs": {"wiki": 1.0}}), three_sources)


WEIGHTS = {"code": 1.0, "web": 1.0, "books": 2.0}


@pytest.mark.parametrize(
    ("mixture", "epochs"),
    [({"weights": WEIGHTS}, 10.0), ({"epochs": {"code": 2.0}}, 400 * 20 / 110 / 10)],
)
def test_a_run_that_repeats_a_source_too_often_is_refused_with_values_that_fit(
    three_sources: ShardManifest, mixture: dict[str, Any], epochs: float
) -> None:
    check_prepared(mixed_run(**mixture), three_sources)
    with pytest.raises(ConfigError) as caught:
        check_prepared(mixed_run(**mixture, max_epochs={"code": 4.0}), three_sources)
    message = str(caught.value)
    wanted = float(re.search(r"source code ([0-9.]+) times", message)[1])
    assert wanted == pytest.approx(epochs, abs=0.1)
    total_tokens = int(re.search(r"train.total_tokens=(\d+) or", message)[1])
    ((field, value),) = re.findall(r"data.mixture.(weights|epochs).code=([0-9.]+)", message)
    fitting = mixture | {field: mixture[field] | {"code": float(value)}}
    check_prepared(mixed_run(total_tokens // 8, **mixture, max_epochs={"code": 4.0}), three_sources)
    check_prepared(mixed_run(**fitting, max_epochs={"code": 4.0}), three_sources)
    # The next step, or a tenth more weight, would not fit.
    for samples, fields in (
        (total_tokens // 8 + 4, mixture),
        (400, mixture | {field: mixture[field] | {"code": 1.1 * float(value)}}),
    ):
        with pytest.raises(ConfigError, match="max_epochs"):
            check_prepared(mixed_run(samples, **fields, max_epochs={"code": 4.0}), three_sources)


def test_a_single_source_that_is_repeated_too_often_names_tokens_only(
    make_prepared: MakePrepared,
) -> None:
    manifest = make_prepared([[[1] * 81]], [[[1] * 9]], sources=["web"])
    with pytest.raises(ConfigError, match=r"web 40 times.*total_tokens=160 or data\.mixture\.max"):
        check_prepared(mixed_run(max_epochs={"web": 2.0}), manifest)
    check_prepared(mixed_run(20, max_epochs={"web": 2.0}), manifest)
