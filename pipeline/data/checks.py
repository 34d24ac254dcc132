"""From a run and a prepared directory to the refusal of what its ranks could only fail on."""

import math
from bisect import bisect_right

from pipeline.config.data import DataConfig, MixtureConfig
from pipeline.config.schema import RunConfig
from pipeline.data.mixture import (
    LONGEST_PERIOD_SAMPLES,
    Mixture,
    count_tokens,
    leave_out,
    plan_mixture,
)
from pipeline.data.shards import ShardManifest
from pipeline.errors import ConfigError, DataError


def check_prepared(run: RunConfig, manifest: ShardManifest) -> None:
    """Check that a run can use prepared shards, before any rank starts.

    Args:
        run: The run.
        manifest: The shards that it is to read.

    Raises:
        ConfigError: `model.vocab_size` is smaller than the tokenizer's vocabulary, the mixture does
            not fit the shards, or the run would pass over a source too often.
        DataError: The train split holds less than one global batch, the validation split or a mixed
            source less than one sample, a source nothing, or a shard has ids outside the
            vocabulary.
    """
    run.model.resolved_vocab_size(manifest.vocab_size)
    _check_largest_ids(manifest)
    _check_sources(run.data, manifest)
    train = run.train
    mixture = plan_mixture(manifest, run.data.mixture, train.sequence_tokens)
    global_batch_samples = train.global_batch_tokens // train.sequence_tokens
    check_global_batch(mixture, train.sequence_tokens, global_batch_samples)
    _check_repetition(run, mixture)
    check_validation_tokens(manifest.splits["validation"].tokens, train.sequence_tokens)


def check_global_batch(mixture: Mixture, sequence_tokens: int, global_batch_samples: int) -> None:
    """Check that the mixed sources together hold one global batch.

    Args:
        mixture: The sources.
        sequence_tokens: T.
        global_batch_samples: Samples of one optimizer step over all ranks.

    Raises:
        DataError: They do not.
    """
    num_samples = sum(mixture.num_samples)
    if num_samples < global_batch_samples:
        raise DataError(
            f"the train split has {num_samples} samples of {sequence_tokens} tokens, fewer than "
            f"one global batch of {global_batch_samples}; give more text or lower "
            "train.global_batch_tokens"
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


def _check_sources(data: DataConfig, manifest: ShardManifest) -> None:
    """Refuse a mixture that would lack a source because none of its text became train tokens."""
    mixture, found = data.mixture, count_tokens(manifest)
    for name in data.sources:
        is_wanted = (mixture.weights or mixture.epochs or {}).get(name, 1.0) > 0
        if is_wanted and name not in found:
            raise DataError(
                f"source {name} has no train text in {manifest.directory}: all of its documents "
                "are held out, dropped or quarantined; give it more text, leave it out with "
                f"{leave_out(mixture, name)}, or remove data.sources.{name}"
            )


def _check_largest_ids(manifest: ShardManifest) -> None:
    for split in manifest.splits.values():
        for shard in split.shards:
            if shard.largest_id >= manifest.vocab_size:
                raise DataError(
                    f"{manifest.directory / shard.name}.bin holds the id {shard.largest_id}, the "
                    f"vocabulary has {manifest.vocab_size} entries; delete the directory and "
                    "prepare again"
                )


def _check_repetition(run: RunConfig, mixture: Mixture) -> None:
    """Check `mixture.max_epochs` over the whole run.

    Raises:
        ConfigError: A source would be passed over more often.
    """
    config, train = run.data.mixture, run.train
    total_samples = train.total_tokens // train.sequence_tokens
    epochs = mixture.seen_epochs(total_samples)
    for name, most in (config.max_epochs or {}).items():
        if epochs.get(name, 0.0) <= most:
            continue
        size = mixture.num_samples[mixture.names.index(name)]
        batch_samples = train.global_batch_tokens // train.sequence_tokens
        steps = range(train.total_steps + 1)
        # The passes over a source only grow, so the last step within the limit can be bisected.
        fitting = bisect_right(
            steps, most, key=lambda step: mixture.seen_epochs(step * batch_samples)[name]
        )
        nearest = [f"train.total_tokens={(fitting - 1) * train.global_batch_tokens}"]
        nearest = [text for text in nearest if fitting > 1]
        # A prefix may hold one sample more than its share, and a share may be rounded up.
        share = (most * size - 1) / total_samples - 1 / LONGEST_PERIOD_SAMPLES
        nearest += _fitting_weight(config, mixture, name, share)
        fitting_epochs = math.ceil(epochs[name] * 1000) / 1000
        raise ConfigError(
            f"train.total_tokens={train.total_tokens} passes over source {name} {epochs[name]:.4g} "
            f"times, data.mixture.max_epochs.{name}={most:g}; nearest: "
            f"{' or '.join([*nearest, f'data.mixture.max_epochs.{name}={fitting_epochs:g}'])}"
        )


def _fitting_weight(config: MixtureConfig, mixture: Mixture, name: str, share: float) -> list[str]:
    """Name the weight, or the relative passes, that give a source a share of the samples."""
    others = 1 - mixture.shares[mixture.names.index(name)]
    if others == 0 or share <= 0.0:
        return []
    # With the other weights as they are: w / (w + rest) = share.
    growth = share / (1 - share) * float(others / (1 - others))
    field = "weights" if config.weights is not None else "epochs"
    stated = (config.weights or config.epochs or {}).get(name, 1.0)
    digits = 10 ** (3 - math.floor(math.log10(stated * growth)))
    return [f"data.mixture.{field}.{name}={math.floor(stated * growth * digits) / digits:g}"]
