"""Attention over the hidden states so far: from a layer's output to what it recalls of the past.

Order comes from the recurrence alone, so none of the forms carries positions. Each sees the own
state too (s <= t), so that the first token has something to attend to.

Shapes: `B` batch, `T` time of queries, `S` time of keys, `D` model, `H` heads, `K` head size,
`A` queries of one piece.
"""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.config.chunks import piece_queries
from pipeline.config.lstm import LstmConfig

Past = tuple[Tensor, ...]
"""What is kept of earlier tokens, time in dimension 1."""


class Recall(nn.Module):
    """What all forms share: the past that grows, and who sees whom."""

    def __init__(self, config: LstmConfig) -> None:
        super().__init__()
        self.window_tokens = config.window_tokens
        self.init_std = config.init_std
        self.replaces = config.backbone == "vanilla"

    def forward(
        self, x_BTD: Tensor, past: Past = (), seen_B1TS: Tensor | None = None
    ) -> tuple[Tensor, Past]:
        """Give what each state recalls, and the past for the next token.

        Args:
            x_BTD: States, normalised where the backbone normalises.
            past: From the call before; empty at the start.
            seen_B1TS: True where row (query) sees column (key), causal and within the window; None
                sees all of the window.

        Returns:
            `[B, T, D]`, and tensors `[B, S, D]` of the last `window_tokens` tokens, or of all.
        """
        query_BTD, *new = self._read(x_BTD)
        kept = tuple(new)
        if past:
            kept = tuple(torch.cat(pair, dim=1) for pair in zip(past, new, strict=True))
        if x_BTD.shape[1] == 1:
            kept = self._limit(kept)
        return self._recall(x_BTD, query_BTD, kept, seen_B1TS), self._limit(kept)

    def _limit(self, kept: Past) -> Past:
        """Leave out what lies before the window of the last token."""
        if self.window_tokens is None:
            return kept
        return tuple(part_BSD[:, -self.window_tokens :] for part_BSD in kept)

    def initialize(self, generator: Generator, residual_scale: float) -> None:
        """Draw every parameter."""
        raise NotImplementedError

    def _read(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """Give the queries, and what is to be kept of the tokens."""
        raise NotImplementedError

    def _recall(
        self, x_BTD: Tensor, query_BTD: Tensor, kept: Past, seen_B1TS: Tensor | None
    ) -> Tensor:
        """Give what the queries recall of the kept tokens, the last of which are their own."""
        raise NotImplementedError

    def _seen(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        """Give the causal mask `[T, S]` of the last T of S tokens; None: a lone query sees all."""
        if num_queries == 1:
            return None
        ones_TS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
        seen_TS = ones_TS.tril(num_keys - num_queries)
        if self.window_tokens is not None:
            seen_TS = seen_TS.triu(num_keys - num_queries + 1 - self.window_tokens)
        return seen_TS

    def _attend(
        self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, seen_B1TS: Tensor | None
    ) -> Tensor:
        num_queries, num_keys = q_BHTK.shape[2], k_BHSK.shape[2]
        is_windowed = self.window_tokens is not None and self.window_tokens < num_keys
        if seen_B1TS is None and num_queries == num_keys and not is_windowed:
            return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, is_causal=True)
        if seen_B1TS is None:
            seen_B1TS = self._seen(num_queries, num_keys, q_BHTK.device)
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=seen_B1TS)


class ScaledDotRecall(Recall):
    """Queries, keys and values of several heads. Source: Vaswani et al. 2017, section 3.2."""

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def initialize(self, generator: Generator, residual_scale: float) -> None:
        """Draw the matrices; the one that writes to the residual stream is scaled down."""
        nn.init.normal_(self.qkv.weight, std=self.init_std, generator=generator)
        nn.init.normal_(self.out.weight, std=self.init_std * residual_scale, generator=generator)

    def _read(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = self.qkv(x_BTD).chunk(3, dim=2)
        return parts

    def _recall(
        self, x_BTD: Tensor, query_BTD: Tensor, kept: Past, seen_B1TS: Tensor | None
    ) -> Tensor:
        q_BHTK, k_BHSK, v_BHSK = (
            part.view(*part.shape[:2], self.heads, -1).transpose(1, 2)
            for part in (query_BTD, *kept)
        )
        y_BHTK = self._attend(q_BHTK, k_BHSK, v_BHSK, seen_B1TS)
        y_BTD: Tensor = self.out(y_BHTK.transpose(1, 2).flatten(2))
        return y_BTD


class DotRecall(Recall):
    """States score states, and the recalled one is combined with the own: tanh(W_c [c; h]).

    Scores are divided by the root of the width, without which they grow with it.

    Source: Luong et al. 2015, section 3.1 (dot) and equation 5.
    """

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        self.combine = nn.Linear(2 * config.width, config.width, bias=False)

    def initialize(self, generator: Generator, residual_scale: float) -> None:
        """Draw the matrices; the one that combines is Xavier's where its result is no residual."""
        if self.replaces:
            nn.init.xavier_uniform_(self.combine.weight, generator=generator)
            return
        std = self.init_std * residual_scale
        nn.init.normal_(self.combine.weight, std=std, generator=generator)

    def _read(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        return x_BTD, x_BTD

    def _recall(
        self, x_BTD: Tensor, query_BTD: Tensor, kept: Past, seen_B1TS: Tensor | None
    ) -> Tensor:
        q_B1TD, k_B1SD = query_BTD.unsqueeze(1), kept[0].unsqueeze(1)
        return self._combine(self._attend(q_B1TD, k_B1SD, k_B1SD, seen_B1TS).squeeze(1), x_BTD)

    def _combine(self, context_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        combined_BTD: Tensor = self.combine(torch.cat((context_BTD, x_BTD), dim=2))
        return combined_BTD.tanh()


class AdditiveRecall(DotRecall):
    """A network as wide as the model scores each pair of states: v . tanh(W_q h_t + W_k h_s).

    Its T x S x D hidden values are computed for some queries at a time, and again in backward.

    Source: Bahdanau et al. 2015, appendix A.1.2; Luong et al. 2015, equation 5.
    """

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        self.query_key = nn.Linear(config.width, 2 * config.width, bias=False)
        # A vector in its shape too, so that weight decay passes it by.
        self.score_D = nn.Parameter(torch.empty(config.width))

    def initialize(self, generator: Generator, residual_scale: float) -> None:
        """Draw the matrices, those of the scores so that hidden values are of order 1."""
        super().initialize(generator, residual_scale)
        for matrix_DD in self.query_key.weight.chunk(2):
            nn.init.xavier_uniform_(matrix_DD, generator=generator)
        nn.init.xavier_uniform_(self.score_D.unsqueeze(0), generator=generator)

    def _read(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        query_BTD, key_BTD = self.query_key(x_BTD).chunk(2, dim=2)
        return query_BTD, key_BTD, x_BTD

    def _recall(
        self, x_BTD: Tensor, query_BTD: Tensor, kept: Past, seen_B1TS: Tensor | None
    ) -> Tensor:
        num_samples, num_queries, width = x_BTD.shape
        num_keys = kept[0].shape[1]
        seen_BTS = None if seen_B1TS is None else seen_B1TS.squeeze(1)
        if seen_BTS is None:
            seen_BTS = self._seen(num_queries, num_keys, x_BTD.device)
        per_piece = piece_queries(num_samples, num_keys, width)
        pieces = []
        for first in range(0, num_queries, per_piece):
            last = min(first + per_piece, num_queries)
            # Keys that one of these queries may see: none after the last, none before the window.
            stop = num_keys - num_queries + last
            start = 0
            if self.window_tokens is not None:
                start = max(0, stop - (last - first) + 1 - self.window_tokens)
            key_BSD, value_BSD = (part_BSD[:, start:stop] for part_BSD in kept)
            seen_BAS = None if seen_BTS is None else seen_BTS[..., first:last, start:stop]
            pieces.append(
                self._attend_piece(query_BTD[:, first:last], key_BSD, value_BSD, seen_BAS)
            )
        return self._combine(torch.cat(pieces, dim=1), x_BTD)

    def _attend_piece(
        self, query_BAD: Tensor, key_BSD: Tensor, value_BSD: Tensor, seen_BAS: Tensor | None
    ) -> Tensor:
        context_BAD: Tensor = checkpoint(
            attend_additively, query_BAD, key_BSD, value_BSD, self.score_D, seen_BAS,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        return context_BAD


def attend_additively(
    query_BAD: Tensor, key_BSD: Tensor, value_BSD: Tensor, score_D: Tensor, seen_BAS: Tensor | None
) -> Tensor:
    """Give the mean of the values by softmax weights, in float32, of score . tanh(query + key).

    Args:
        query_BAD: Queries after their matrix.
        key_BSD: Keys after theirs.
        value_BSD: What is averaged.
        score_D: Weights v of the hidden values.
        seen_BAS: True where a query sees a key, or `[A, S]` for all samples; None sees all.
    """
    hidden_BASD = (query_BAD.unsqueeze(2) + key_BSD.unsqueeze(1)).tanh()
    score_BAS = F.linear(hidden_BASD, score_D.unsqueeze(0)).squeeze(3)
    if seen_BAS is not None:
        score_BAS = score_BAS.masked_fill(~seen_BAS, -torch.inf)
    wide_dtype = torch.promote_types(score_BAS.dtype, torch.float32)
    return score_BAS.softmax(dim=2, dtype=wide_dtype).to(value_BSD.dtype) @ value_BSD


def build_recall(config: LstmConfig) -> Recall | None:
    """Build the attention that a config names, if any."""
    kinds: dict[str, type[Recall]] = {
        "scaled_dot": ScaledDotRecall,
        "dot": DotRecall,
        "additive": AdditiveRecall,
    }
    return None if config.attention == "none" else kinds[config.attention](config)
