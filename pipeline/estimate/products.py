"""From a run to the matrix products of one micro-batch, by shape, forward and backward.

Symbols: `N` tokens of a micro-batch, `B` samples, `T` tokens of each, `d` width, `h` recurrent
width, `f` feed-forward width, `V` vocabulary.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.config.chunks import MAX_PLAIN_KEYS, head_chunk_tokens, piece_queries
from pipeline.config.gpt import GptConfig
from pipeline.config.lstm import LstmConfig
from pipeline.config.lstm_fields import NUM_GATES
from pipeline.config.model_base import ModelBase, mean_attended_tokens
from pipeline.config.schema import RunConfig

Pass = Literal["forward", "recompute", "backward"]
"""`recompute` is the forward pass of a block that activation checkpointing runs again."""


@dataclass(frozen=True, kw_only=True)
class MatrixProduct:
    """Equal products `[batch, m, k] x [batch, k, n]`, each one call of a library."""

    name: str
    """What computes it: the module, and for gradients `.input` or `.weight` behind it."""
    pass_: Pass
    batch: int = 1
    """Independent products of one call; 1 for a plain matrix product."""
    m: int
    n: int
    k: int
    times: int = 1
    """Calls in one micro-batch, over all layers."""
    sequential: bool = False
    """Whether each call needs the one before it in its layer, as the steps of a recurrence do; all
    other calls of a layer are there at once. `times` is layers x steps."""
    needed_fraction: float = 1.0
    """Share of the product that the mask leaves; a fused attention kernel skips the rest, plain
    products do not."""

    @property
    def flops(self) -> float:
        """FLOPs of all calls, masked entries included; two a multiply-add."""
        return 2.0 * self.batch * self.m * self.n * self.k * self.times

    @property
    def needed_flops(self) -> float:
        """FLOPs of all calls without what a mask removes."""
        return self.flops * self.needed_fraction


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """The positions that one call of a layer takes."""

    num_samples: int
    sequence_tokens: int
    window_tokens: int | None
    is_stepwise: bool = False
    """Whether a layer is called once a token, as with input feeding."""

    @property
    def rows(self) -> int:
        """Rows N of a call."""
        return self.num_samples * (1 if self.is_stepwise else self.sequence_tokens)

    @property
    def calls(self) -> int:
        """Calls of a layer in a micro-batch."""
        return self.sequence_tokens if self.is_stepwise else 1


def matrix_products(
    run: RunConfig,
    vocab_size: int,
    micro_batch_samples: int,
    accelerator: Literal["cpu", "cuda"] = "cpu",
) -> list[MatrixProduct]:
    """List the products of one micro-batch, forward, backward and run again.

    A recurrent layer counts as its kernels run it: inputs of all positions in one product, one
    product a step for the states, and the gradient of the recurrent matrix in one product again.
    The head's gradients run in the forward pass, a chunk of tokens at a time.

    Args:
        run: Model, sequence length and whether activations are checkpointed.
        vocab_size: Entries of the tokenizer.
        micro_batch_samples: Samples B.
        accelerator: Sets the tokens of a chunk.

    Returns:
        Products with equal shape and name merged. The sum of `needed_flops`, recomputation left
        out, is `flops_per_token` of the model's config times the tokens.
    """
    model, again = run.model, run.train.activation_checkpointing
    tokens = _Tokens(
        num_samples=micro_batch_samples,
        sequence_tokens=run.train.sequence_tokens,
        window_tokens=model.window_tokens,
        is_stepwise=isinstance(model, LstmConfig) and model.input_feeding,
    )
    found: Counter[MatrixProduct] = Counter()
    for product in _body(model, tokens, again):
        if product.times:
            found[replace(product, times=1)] += product.times
    num_tokens = micro_batch_samples * run.train.sequence_tokens
    rows = model.resolved_vocab_size(vocab_size)
    for product in _head(model.width, rows, num_tokens, accelerator):
        found[product] += 1
    return [replace(product, times=times) for product, times in found.items()]


def attends_plainly(run: RunConfig, accelerator: Literal["cpu", "cuda"]) -> bool:
    """Tell whether the Transformer's attention runs as plain products, which keep their scores.

    Args:
        run: Model, sequence length and number format.
        accelerator: What computes.
    """
    is_short = run.train.sequence_tokens <= MAX_PLAIN_KEYS
    is_cpu_bf16 = accelerator == "cpu" and run.precision == "bf16"
    return is_cpu_bf16 and is_short and isinstance(run.model, GptConfig)


def _body(model: GptConfig | LstmConfig, tokens: _Tokens, again: bool) -> Iterator[MatrixProduct]:
    if isinstance(model, GptConfig):
        block = list(_gpt_block(model, tokens))
        yield from _layers(block, model.depth, again, is_cut_short=model.dropout == 0.0)
        return
    ends_in_product = model.feed_forward or model.resolved_hidden_width != model.width
    is_cut_short = model.dropout == 0.0 and ends_in_product
    for is_first, num_layers in ((True, 1), (False, model.depth - 1)):
        layer = list(_recurrent_layer(model, tokens, is_first=is_first))
        yield from _layers(layer, num_layers, again, is_cut_short=is_cut_short)
    yield from _recall(model, tokens)


def _layers(
    layer: list[MatrixProduct], num_layers: int, again: bool, *, is_cut_short: bool
) -> Iterator[MatrixProduct]:
    """Repeat a layer's products; checkpointing runs the forward ones again.

    Args:
        layer: The products of one, forward ones in their order.
        num_layers: How many there are.
        again: Whether activations are checkpointed.
        is_cut_short: Whether nothing needs the result of the last forward product, so that it is
            left out where a layer is run again.
    """
    forward = [product for product in layer if product.pass_ == "forward"]
    if again:
        kept = forward[:-1] if is_cut_short else forward
        layer = [*layer, *(replace(product, pass_="recompute") for product in kept)]
    yield from (replace(product, times=num_layers * product.times) for product in layer)


def _linear(name: str, reads: int, writes: int, tokens: _Tokens) -> Iterator[MatrixProduct]:
    """Give the product of a matrix `[writes, reads]` with all rows, and its two gradients."""
    rows, times, steps = tokens.rows, tokens.calls, tokens.is_stepwise
    for suffix, pass_, m, n, k in (
        ("", "forward", rows, writes, reads),
        (".input", "backward", rows, reads, writes),
        (".weight", "backward", writes, reads, rows),
    ):
        yield MatrixProduct(
            name=name + suffix,
            pass_="forward" if pass_ == "forward" else "backward",
            m=m, n=n, k=k, times=times, sequential=steps,
        )  # fmt: skip


def _attend(name: str, num_heads: int, head_width: int, tokens: _Tokens) -> Iterator[MatrixProduct]:
    """Give scores and their use, and the gradients of queries, keys, weights and values."""
    length, window = tokens.sequence_tokens, tokens.window_tokens
    shapes = Counter([(length, length)])
    needed = mean_attended_tokens(length, window) / length
    if tokens.is_stepwise:
        shapes = Counter((1, min(time, window or time)) for time in range(1, length + 1))
        needed = 1.0
    for (queries, keys), times in shapes.items():
        for suffix, pass_, m, n, k in (
            (".scores", "forward", queries, keys, head_width),
            (".values", "forward", queries, head_width, keys),
            (".scores.query", "backward", queries, head_width, keys),
            (".scores.key", "backward", head_width, keys, queries),
            (".values.weight", "backward", queries, keys, head_width),
            (".values.value", "backward", keys, head_width, queries),
        ):
            yield MatrixProduct(
                name=name + suffix,
                pass_="forward" if pass_ == "forward" else "backward",
                batch=tokens.num_samples * num_heads,
                m=m, n=n, k=k, times=times,
                sequential=tokens.is_stepwise, needed_fraction=needed,
            )  # fmt: skip


def _gpt_block(model: GptConfig, tokens: _Tokens) -> Iterator[MatrixProduct]:
    width, head_width = model.width, model.head_width
    heads = model.heads + 2 * model.resolved_kv_heads
    yield from _linear("blocks.attention.qkv", width, heads * head_width, tokens)
    yield from _attend("blocks.attention", model.heads, head_width, tokens)
    yield from _linear("blocks.attention.out", width, width, tokens)
    yield from _feed_forward("blocks", model, tokens)


def _feed_forward(name: str, model: ModelBase, tokens: _Tokens) -> Iterator[MatrixProduct]:
    inner = model.resolved_feed_forward_width
    up = 2 * inner if model.activation == "swiglu" else inner
    yield from _linear(f"{name}.feed_forward.up", model.width, up, tokens)
    yield from _linear(f"{name}.feed_forward.down", inner, model.width, tokens)


def _recurrent_layer(
    model: LstmConfig, tokens: _Tokens, *, is_first: bool
) -> Iterator[MatrixProduct]:
    hidden, width = model.resolved_hidden_width, model.width
    gates = NUM_GATES[model.cell] * hidden
    reads = width * (2 if model.input_feeding and is_first else 1)
    yield from _linear("layers.cell.input", reads, gates, tokens)
    if model.cell != "min_lstm":
        steps = replace(tokens, is_stepwise=True)
        for product in _linear("layers.cell.recurrent", hidden, gates, steps):
            if product.name.endswith(".weight") and not tokens.is_stepwise:
                # No step waits for it, so that kernels put all of them together.
                rows = product.k * product.times
                yield replace(product, k=rows, times=1, sequential=False)
            else:
                yield product
    if hidden != width:
        yield from _linear("layers.projection", hidden, width, tokens)
    if model.feed_forward:
        yield from _feed_forward("layers", model, tokens)


def _recall(model: LstmConfig, tokens: _Tokens) -> Iterator[MatrixProduct]:
    width = model.width
    if model.attention == "scaled_dot":
        yield from _linear("attention.qkv", width, 3 * width, tokens)
        yield from _attend("attention", model.heads, model.head_width, tokens)
        yield from _linear("attention.out", width, width, tokens)
    if model.attention == "dot":
        yield from _attend("attention", 1, width, tokens)
    if model.attention == "additive":
        yield from _linear("attention.query_key", width, 2 * width, tokens)
        yield from _attend_additively(width, tokens)
    if model.attention in ("dot", "additive"):
        yield from _linear("attention.combine", 2 * width, width, tokens)


def _attend_additively(width: int, tokens: _Tokens) -> Iterator[MatrixProduct]:
    """Give the products of additive attention, whose pairs are always computed again."""
    samples = tokens.num_samples
    pieces = Counter(_pieces(width, tokens))
    pairs = sum(queries * keys * times for (queries, keys), times in pieces.items())
    length = tokens.sequence_tokens
    needed = mean_attended_tokens(length, tokens.window_tokens) * length / pairs
    for (queries, keys), times in pieces.items():
        rows = samples * queries * keys
        kinds: tuple[tuple[str, Pass, int, int, int, int], ...] = (
            (".scores", "forward", 1, rows, 1, width),
            (".scores", "recompute", 1, rows, 1, width),
            (".values", "forward", samples, queries, width, keys),
            (".scores.input", "backward", 1, rows, width, 1),
            (".scores.weight", "backward", 1, 1, width, rows),
            (".values.weight", "backward", samples, queries, keys, width),
            (".values.value", "backward", samples, keys, width, queries),
        )
        for suffix, pass_, batch, m, n, k in kinds:
            yield MatrixProduct(
                name="attention" + suffix, pass_=pass_, batch=batch, m=m, n=n, k=k, times=times,
                sequential=tokens.is_stepwise, needed_fraction=needed,
            )  # fmt: skip


def _pieces(width: int, tokens: _Tokens) -> Iterator[tuple[int, int]]:
    """Give queries and keys of each piece."""
    length, window = tokens.sequence_tokens, tokens.window_tokens
    if tokens.is_stepwise:
        yield from ((1, min(time, window or time)) for time in range(1, length + 1))
        return
    size = piece_queries(tokens.num_samples, length, width)
    for first in range(0, length, size):
        last = min(first + size, length)
        start = 0 if window is None else max(0, first + 1 - window)
        yield last - first, last - start


def _head(
    width: int, rows: int, num_tokens: int, accelerator: Literal["cpu", "cuda"]
) -> Iterator[MatrixProduct]:
    size = head_chunk_tokens(rows, accelerator)
    for first in range(0, num_tokens, size):
        count = min(size, num_tokens - first)
        yield MatrixProduct(name="head", pass_="forward", m=count, n=rows, k=width)
        yield MatrixProduct(name="head.weight", pass_="backward", m=rows, n=width, k=count)
        yield MatrixProduct(name="head.input", pass_="backward", m=count, n=width, k=rows)
