"""From the shape of a recurrent model to the values that its forward pass keeps for backward.

Counted are the tensors that autograd holds on a CPU, each storage once, without the parameters and
without borders between documents. What a kernel keeps for itself is its own: oneDNN's LSTM takes
about 15.5 values of width h a token where the equations need 5, and pads layers narrower than 64;
cuDNN does not publish what it reserves.

Symbols: `N` tokens of a micro-batch, `B` samples, `T` tokens of each, `d` width, `h` recurrent
width, `f` feed-forward width, `w` window.
"""

from pipeline.config.lstm_fields import NUM_GATES, NUM_STATES, LstmFields

LAYER_VALUES = {"lstm": 16.5, "gru": 7.0, "elman": 1.0, "min_lstm": 7.25}
"""Cell to the values of width h that a layer's kernel keeps a token, its output included: for an
LSTM oneDNN's workspace, measured for widths of 128 and 256; a quarter is a bool."""
STEP_VALUES = {"lstm": 7.0, "gru": 7.0, "elman": 1.0}
"""The same for kernels of a single token, which input feeding calls."""
FORM_VALUES = {"none": 0, "dot": 4, "additive": 5, "scaled_dot": 4}
"""Form of attention to the values of width d that it keeps a token: projections, what is recalled,
and both states before and after W_c."""
PAST_VALUES = {"none": 0, "dot": 1, "additive": 2, "scaled_dot": 2}
"""Form of attention to the vectors of width d of each token that queries are compared with."""


def backbone_values(
    config: LstmFields, num_samples: int, sequence_tokens: int, *, is_recomputed: bool
) -> float:
    """Give the values that embedding, layers, attention and final norm keep for backward.

    Args:
        config: The model.
        num_samples: Samples B of a micro-batch.
        sequence_tokens: Tokens T of each.
        is_recomputed: Whether layers keep their inputs only and run again in backward.
    """
    num_tokens, width = num_samples * sequence_tokens, config.width
    # The norm before the head, and what dropout drew for the embedding.
    total = num_tokens * _read_values(config, is_copied=False)
    total += num_tokens * width if config.dropout > 0.0 else 0
    if config.attention != "none":
        total += num_tokens * _read_values(config)
        total += attention_values(config, num_samples, sequence_tokens)
        total += num_tokens * width if config.dropout > 0.0 else 0
    if config.input_dropout > 0.0:
        total += num_samples * width
    if config.input_feeding:
        # The first layer reads what was recalled beside its input.
        total += num_tokens * width
    if is_recomputed:
        states = (
            NUM_STATES[config.cell] * config.resolved_hidden_width if config.input_feeding else 0
        )
        return total + config.depth * num_tokens * (width + states)
    total += config.depth * num_tokens * layer_values(config)
    if config.weight_drop > 0.0:
        # What is left of the recurrent matrices, and what was drawn.
        total += config.depth * 2 * NUM_GATES[config.cell] * config.resolved_hidden_width**2
    return total - num_tokens * width * _shared_reads(config)


def layer_values(config: LstmFields) -> float:
    """Give the values that one layer keeps a token."""
    hidden = config.resolved_hidden_width
    kept = STEP_VALUES if config.input_feeding else LAYER_VALUES
    total = _read_values(config) + kept[config.cell] * hidden
    if hidden != config.width and config.cell != "min_lstm" and not config.input_feeding:
        total += hidden  # the projection reads a copy in another order
    if config.feed_forward:
        num_inner = 4 if config.activation == "swiglu" else 2
        total += _read_values(config) + num_inner * config.resolved_feed_forward_width
    if config.dropout > 0.0:
        total += config.width * (2 if config.feed_forward else 1)
    return total


def attention_values(config: LstmFields, num_samples: int, sequence_tokens: int) -> float:
    """Give the values that attention keeps beside its input: per token, and per pair of tokens."""
    num_tokens, window = num_samples * sequence_tokens, config.window_tokens
    total = num_tokens * FORM_VALUES[config.attention] * config.width
    if config.attention != "additive":
        # One log of the softmax's denominator for each query and head.
        total += num_tokens * (config.heads if config.attention == "scaled_dot" else 1)
    if config.input_feeding:
        # The past is put together anew for every token, and each stays.
        limit = sequence_tokens if window is None else window + 1
        pasts = sum(min(time, limit) for time in range(2, sequence_tokens + 1))
        return total + num_samples * PAST_VALUES[config.attention] * config.width * pasts
    if config.attention == "additive":
        return total + sequence_tokens**2 / 4  # a mask of bools
    is_masked = window is not None and window < sequence_tokens
    return total + (sequence_tokens**2 if is_masked else 0)


def _read_values(config: LstmFields, *, is_copied: bool = True) -> float:
    """Give the values a token that a sub-layer keeps of what it reads: stream, norm and its input.

    Args:
        config: The model.
        is_copied: Whether the sub-layer keeps its input as well.
    """
    own = config.width if is_copied else 0
    if config.backbone == "vanilla":
        return own
    # rmsnorm keeps its input normalised as well; both keep the scale, layernorm the mean.
    return own + (2 * config.width + 1 if config.norm == "rmsnorm" else config.width + 2)


def _shared_reads(config: LstmFields) -> int:
    """Count the sub-layers that keep as their input what the one before keeps as its output.

    Without norms it may be the same tensor, where the kernels agree on the order of its dimensions.
    """
    if config.backbone == "residual":
        return 0
    attends = config.attention != "none"
    is_last = config.attention_after == "last"
    shared = int(attends and is_last and not config.input_feeding)  # the head reads it
    if config.resolved_hidden_width != config.width:
        return shared
    if config.input_feeding:
        return config.depth - 1 + attends
    if config.cell == "min_lstm":
        return config.depth - 1 + attends + 1
    if config.cell == "lstm":
        return shared + config.depth - 1 - (not is_last) + (config.attention == "dot")
    return shared
