"""From a run and a prepared directory to the refusal of what its ranks could only fail on."""

from pipeline.config.schema import RunConfig
from pipeline.data.shards import ShardManifest
from pipeline.errors import DataError


def check_prepared(run: RunConfig, manifest: ShardManifest) -> None:
    """Check that a run can use prepared shards, before any rank starts.

    Args:
        run: The run.
        manifest: The shards that it is to read.

    Raises:
        ConfigError: `model.vocab_size` is smaller than the tokenizer's vocabulary.
        DataError: The train split holds less than one global batch, or the validation split less
            than one sample.
    """
    run.model.resolved_vocab_size(manifest.vocab_size)
    train = run.train
    global_batch_samples = train.global_batch_tokens // train.sequence_tokens
    check_train_tokens(manifest.splits["train"].tokens, train.sequence_tokens, global_batch_samples)
    check_validation_tokens(manifest.splits["validation"].tokens, train.sequence_tokens)


def check_train_tokens(num_tokens: int, sequence_tokens: int, global_batch_samples: int) -> None:
    """Check that the train split holds one global batch.

    Args:
        num_tokens: Tokens of the split.
        sequence_tokens: T.
        global_batch_samples: Samples of one optimizer step over all ranks.

    Raises:
        DataError: It does not.
    """
    num_samples = max(num_tokens - 1, 0) // sequence_tokens
    if num_samples < global_batch_samples:
        raise DataError(
            f"the train split has {num_tokens} tokens = {num_samples} samples of "
            f"{sequence_tokens} tokens, fewer than one global batch of {global_batch_samples}; "
            "give more text or lower train.global_batch_tokens"
        )


def check_validation_tokens(num_tokens: int, sequence_tokens: int) -> None:
    """Check that the validation split holds one sample.

    Args:
        num_tokens: Tokens of the split.
        sequence_tokens: T.

    Raises:
        DataError: It does not.
    """
    if num_tokens < sequence_tokens + 1:
        raise DataError(
            f"the validation split has {num_tokens} tokens, one sample needs "
            f"{sequence_tokens + 1} (train.sequence_tokens + 1); raise "
            "data.validation_fraction, give more text or lower train.sequence_tokens"
        )
