"""What a run needs of prepared shards is checked before any rank starts."""

from collections.abc import Callable

import pytest

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
    with pytest.raises(DataError, match="train split has 32 tokens = 3 samples"):
        check_prepared(small_run(), manifest)


def test_a_validation_split_below_one_sample_is_refused(make_prepared: MakePrepared) -> None:
    manifest = make_prepared([[[1] * 33]], [[[1] * 8]])
    with pytest.raises(DataError, match="validation split has 8 tokens, one sample needs 9"):
        check_prepared(small_run(), manifest)
