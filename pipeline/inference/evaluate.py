"""From a trained model and texts to loss per token and bits per byte.

Bits per byte are the bits of the tokens that stand for text over their UTF-8 bytes; ends of
documents count as tokens of the loss and stay out of the bits, as in training.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config.batching import IGNORED_LABEL
from pipeline.config.data import SourceConfig, SourceKind
from pipeline.data.documents import trusted
from pipeline.data.loader import ValidationBatches
from pipeline.data.shards import ShardSet, SplitName
from pipeline.data.sources import build_source
from pipeline.errors import ConfigError, DataError
from pipeline.inference.scoring import Window, require_causal, rolling_windows, score_windows
from pipeline.inference.weights import LoadedModel, TrainedModel

MAX_DOCUMENT_BYTES = 1 << 30
"""Largest document of a file that is scored; it is held whole, with its ids."""
BATCH_SIZE = 16
"""Windows computed at once."""
WINDOWS_AT_ONCE = 256
"""Windows of consecutive documents that are sorted by length before they are cut into batches."""
CHUNK_TOKENS = 1 << 20
"""Tokens of a split that are turned to text at once."""
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst")


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model scored on a text."""

    loss: float
    """Mean negative log-likelihood, nats per token."""
    bits_per_byte: float | None
    """None where no scored token stands for text."""
    num_tokens: int
    """Scored tokens, ends of documents included."""
    text_bytes: int
    """UTF-8 bytes of the scored tokens."""
    num_documents: int | None = None
    """Documents; None where the text is the validation split, scored as one run of tokens."""


@dataclass
class _Sums:
    nll: float = 0.0
    num_tokens: int = 0
    text_nll: float = 0.0
    text_bytes: int = 0

    def add(self, nll: npt.NDArray[Any], num_bytes: npt.NDArray[Any]) -> None:
        self.nll += float(nll.sum())
        self.num_tokens += len(nll)
        self.text_nll += float(nll[num_bytes > 0].sum())
        self.text_bytes += int(num_bytes.sum())

    def score(self, num_documents: int | None) -> Score:
        if self.num_tokens == 0:
            raise DataError("there is no token to score: the text is empty")
        has_text = self.text_bytes > 0
        return Score(
            loss=self.nll / self.num_tokens,
            bits_per_byte=self.text_nll / (math.log(2) * self.text_bytes) if has_text else None,
            num_tokens=self.num_tokens,
            text_bytes=self.text_bytes,
            num_documents=num_documents,
        )


def score_documents(
    loaded: LoadedModel, texts: Iterable[str], context_tokens: int, stride_tokens: int
) -> Score:
    """Score texts, each as a document of its own: behind an end of document, and with its own end.

    Args:
        loaded: Model and tokenizer.
        texts: Documents.
        context_tokens: Tokens that the model reads at once; see `rolling_windows`.
        stride_tokens: New tokens of each further window.

    Raises:
        ConfigError: Context or stride is out of range.
        DataError: There is no text.
    """
    require_causal(loaded.model)
    limit = loaded.model.max_positions
    if not 1 <= context_tokens <= limit:
        raise ConfigError(
            f"context of {context_tokens} tokens is outside 1..model.max_positions={limit}"
        )
    end_id, num_documents = loaded.codec.facts.end_of_document_id, 0
    sums, waiting = _Sums(), list[Window]()
    for text in texts:
        num_documents += 1
        tokens = [end_id, *loaded.codec.encode(text), end_id]
        waiting += rolling_windows(tokens, context_tokens, stride_tokens)
        while len(waiting) >= WINDOWS_AT_ONCE:
            _score(loaded, waiting[:WINDOWS_AT_ONCE], sums)
            waiting = waiting[WINDOWS_AT_ONCE:]
    _score(loaded, waiting, sums)
    return sums.score(num_documents)


def _score(loaded: LoadedModel, windows: list[Window], sums: _Sums) -> None:
    token_bytes = loaded.codec.facts.token_bytes
    scores = score_windows(loaded.model, windows, BATCH_SIZE)
    for window, likelihoods in zip(windows, scores, strict=True):
        sums.add(-likelihoods, token_bytes[list(window.tokens[-window.num_scored :])])


def score_validation(trained: TrainedModel) -> Score:
    """Score the run's own validation split exactly as training does, in samples of its length.

    Raises:
        DataError: The shards are gone or too small.
    """
    run = trained.run
    batches = ValidationBatches(
        ShardSet(trained.shards, "validation"),
        run.train.sequence_tokens,
        run.train.micro_batch_samples,
        rank=0,
        world_size=1,
        max_tokens=run.eval.max_tokens,
    )
    sums = _Sums()
    for batch in batches:
        inputs_BT, labels_BT = (
            torch.from_numpy(part).to(trained.device) for part in (batch.inputs, batch.labels)
        )
        with torch.inference_mode():
            nll_BT = trained.model(inputs_BT, labels_BT).double().cpu().numpy()
        is_label = batch.labels != IGNORED_LABEL
        sums.add(nll_BT[is_label], batch.text_bytes[is_label])
    return sums.score(num_documents=None)


def read_texts(files: Iterable[Path]) -> Iterator[str]:
    """Read files as the documents in them: a line of JSON each, a row of Parquet, or a whole file.

    Raises:
        DataError: A file is missing, or holds a record that is no document.
    """
    for path in files:
        kind: SourceKind = "text"
        if path.name.endswith(JSONL_SUFFIXES):
            kind = "jsonl"
        elif path.suffix == ".parquet":
            kind = "parquet"
        source = build_source(SourceConfig(kind=kind, path=str(path)), MAX_DOCUMENT_BYTES)
        for piece in source.pieces():
            for document in trusted(source.read(piece)):
                yield document.text


def split_documents(trained: TrainedModel, split: SplitName) -> Iterator[bytes]:
    """Give the documents of a split of the run's shards as UTF-8 text, in the shards' order."""
    shards = ShardSet(trained.shards, split)
    end_id = trained.codec.facts.end_of_document_id
    rest: list[int] = []
    for start in range(0, shards.num_tokens, CHUNK_TOKENS):
        tokens = shards.tokens(start, min(start + CHUNK_TOKENS, shards.num_tokens))
        *ended, begun = np.split(tokens, np.flatnonzero(tokens == end_id) + 1)
        for document in ended:
            yield trained.codec.decode(rest + document.tolist()).encode()
            rest = []
        rest += begun.tolist()
    if rest:
        yield trained.codec.decode(rest).encode()
