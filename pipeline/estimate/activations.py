"""From a run to what the forward pass of a micro-batch holds at its end, by component."""

from dataclasses import dataclass
from typing import Literal

from pipeline.config.chunks import head_chunk_tokens
from pipeline.config.lstm import LstmConfig
from pipeline.config.schema import RunConfig
from pipeline.estimate.collectives import VALUE_BYTES
from pipeline.estimate.products import attends_plainly

Accelerator = Literal["cpu", "cuda"]
"""What a rank computes on."""
Place = Literal["device", "host"]
"""Where bytes lie; on a CPU everything is `device`, the memory of the rank's process."""

WORKSPACE_VALUES = 15.5
"""Values of width h a token in oneDNN's workspace of an LSTM; see `lstm_activations`."""

CHUNK_COPIES = 2
"""Logits of a chunk and their probabilities, float32."""

PLAIN_SCORE_BYTES = 6
"""Kept for each pair of positions and head by plain attention: the weights of the softmax in
float32, and in bf16 for the product with the values."""

TOKEN_BYTES = 8
"""Of a token id, a label or a count of bytes."""


@dataclass(frozen=True, kw_only=True)
class MemoryComponent:
    """One part of a rank's memory."""

    name: str
    bytes: float
    exact: bool
    """Whether it is counted and tested equal; else it is a model, and `note` says of what."""
    note: str
    """Where the number comes from, in a few words."""
    place: Place = "device"


def activations(run: RunConfig, vocab_size: int, accelerator: Accelerator) -> list[MemoryComponent]:
    """Give what a forward pass holds at its end."""
    train, model, size = run.train, run.model, VALUE_BYTES[run.precision]
    samples, rows = train.micro_batch_samples, model.resolved_vocab_size(vocab_size)
    shape = (samples, train.sequence_tokens, rows, size)
    kept = model.activation_bytes(*shape, train.activation_checkpointing)
    num_tokens = samples * train.sequence_tokens
    if attends_plainly(run, accelerator):
        pairs = samples * model.heads * train.sequence_tokens**2
        kept += PLAIN_SCORE_BYTES * pairs * (0 if train.activation_checkpointing else model.depth)
    workspace = 0.0
    if isinstance(model, LstmConfig) and model.cell == "lstm" and not model.input_feeding:
        layers = 1 if train.activation_checkpointing else model.depth
        workspace = WORKSPACE_VALUES * model.resolved_hidden_width * num_tokens * layers * size
    again = 0.0
    if train.activation_checkpointing:
        again = (model.activation_bytes(*shape) - kept) / model.depth
        if attends_plainly(run, accelerator):
            again += PLAIN_SCORE_BYTES * samples * model.heads * train.sequence_tokens**2
    chunk = min(head_chunk_tokens(rows, accelerator), num_tokens) * rows * 4 * CHUNK_COPIES
    own = max(kept + again - workspace, 0.0)
    return [
        MemoryComponent(name="activations", bytes=own, exact=False, note="kept for backward"),
        MemoryComponent(
            name="LSTM workspace", bytes=workspace, exact=False,
            note="measured for oneDNN" if accelerator == "cpu" else "as oneDNN's, unknown on cuDNN",
        ),
        MemoryComponent(
            name="head logits", bytes=chunk, exact=False, note="a chunk, and its softmax"
        ),
        MemoryComponent(
            name="input batch", bytes=3 * TOKEN_BYTES * num_tokens, exact=False,
            note="tokens, labels and bytes of text",
        ),
    ]  # fmt: skip
