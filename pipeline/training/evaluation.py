"""From a fixed validation set to loss, bits per byte and loss per token position.

Legend: B samples of a micro-batch, T tokens of a sample.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.config.batching import IGNORED_LABEL
from pipeline.config.schema import RunConfig
from pipeline.data.loader import ValidationBatches
from pipeline.data.shards import ShardSet
from pipeline.training.distributed import RankContext, sum_tensor_over_ranks
from pipeline.training.engine import Engine
from pipeline.training.phases import enter


@dataclass(frozen=True, kw_only=True)
class EvalOutcome:
    """What the model scored on the validation set, over all ranks."""

    loss: float
    """Mean negative log-likelihood over all labelled tokens, nats per token."""
    num_tokens: int
    """Labelled tokens."""
    bits_per_byte: float | None
    """Bits of the text's tokens over its raw bytes, without end-of-document tokens; None where
    there is no text byte."""
    per_position_loss: list[float] | None
    """Mean loss at each position, length T, nats per token; None where a position has no label."""

    @property
    def metrics(self) -> dict[str, float]:
        """The scores by metric name."""
        values = {"eval/loss": self.loss}
        if self.bits_per_byte is not None:
            values["eval/bits_per_byte"] = self.bits_per_byte
        return values


class Evaluator:
    """Scores an engine's model on the same batches every time."""

    def __init__(
        self,
        batches: ValidationBatches,
        sequence_tokens: int,
        ranks: RankContext,
    ) -> None:
        """Take the batches of this rank.

        Args:
            batches: Equally many on every rank, as ZeRO 3 needs.
            sequence_tokens: T.
            ranks: This rank among the others.
        """
        self._batches = batches
        self._sequence_tokens = sequence_tokens
        self._ranks = ranks

    def evaluate(self, engine: Engine, between: Callable[[], None] | None = None) -> EvalOutcome:
        """Score the model as it stands; collective.

        Args:
            engine: Holds the model.
            between: Called before each batch, on every rank; what it raises ends the evaluation.
        """
        length = self._sequence_tokens
        # Rows: nll and labels by position, then nll and bytes of text tokens by position.
        sums = np.zeros((4, length), dtype=np.float64)
        for batch in self._batches:
            if between is not None:
                between()
            enter("evaluate")
            nll_BT = engine.evaluate(batch).astype(np.float64)
            is_label = batch.labels != IGNORED_LABEL
            sums += [
                np.where(is_label, nll_BT, 0.0).sum(axis=0),
                is_label.sum(axis=0),
                np.where(batch.text_bytes > 0, nll_BT, 0.0).sum(axis=0),
                batch.text_bytes.sum(axis=0),
            ]
        nll_T, labels_T, text_nll_T, bytes_T = sum_tensor_over_ranks(
            torch.from_numpy(sums), self._ranks
        ).numpy()
        has_bytes = bytes_T.sum() > 0
        return EvalOutcome(
            loss=float(nll_T.sum() / labels_T.sum()),
            num_tokens=int(labels_T.sum()),
            bits_per_byte=(
                float(text_nll_T.sum() / (math.log(2) * bytes_T.sum())) if has_bytes else None
            ),
            per_position_loss=(nll_T / labels_T).tolist() if labels_T.all() else None,
        )


def build_evaluator(
    run: RunConfig,
    shards: ShardSet,
    ranks: RankContext,
) -> Evaluator:
    """Cut the validation set of a run over the ranks.

    Args:
        run: Sample length, micro-batch and how much of the split to use.
        shards: The validation split.
        ranks: This rank among the others.

    Raises:
        DataError: The split holds less than one sample.
    """
    batches = ValidationBatches(
        shards,
        run.train.sequence_tokens,
        run.train.micro_batch_samples,
        ranks.rank,
        ranks.world_size,
        run.eval.max_tokens,
    )
    return Evaluator(batches, run.train.sequence_tokens, ranks)
