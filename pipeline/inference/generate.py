"""From prompts to the tokens that follow them, one by one, each computed once by the model's cache.

Shapes: `B` batch, `T` time, `V` vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor

from pipeline.config.schema import DocumentsConfig
from pipeline.errors import ConfigError
from pipeline.inference.sampling import SamplingConfig, next_token
from pipeline.inference.scoring import require_causal
from pipeline.inference.text import TextStream
from pipeline.inference.weights import LoadedModel
from pipeline.models.base import LanguageModel

DEFAULT_MAX_TOKENS = 128
"""New tokens where none are asked for: a paragraph, and a second or two on a CPU."""
MAX_BATCH = 32
"""Prompts computed at once; caches of more would rarely fit beside each other."""


class GenerationConfig(BaseModel):
    """How a text is continued, and where it ends."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampling: SamplingConfig = SamplingConfig()
    """How the next token is drawn."""
    max_tokens: int | None = Field(default=None, ge=1)
    """New tokens of a prompt at most, the end of document included; None takes what the model's
    positions leave, up to `DEFAULT_MAX_TOKENS`."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the draws; each prompt has a generator of its own, from this and its number."""


@dataclass(frozen=True, kw_only=True)
class NewToken:
    """One token that was drawn."""

    prompt: int
    """Number of the prompt, from 0."""
    token_id: int
    is_last: bool
    """Whether the prompt's continuation ends here."""


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    vocab_size: int,
    end_id: int,
) -> Iterator[NewToken]:
    """Continue prompts until each ended its document or reached its number of tokens.

    Where training kept anything within a document (`model.documents`), the end of document before
    an empty prompt gives the first token alone: documents began without it there.

    What follows a prompt depends on it, its number and the config, not on the other prompts.
    Prompts of one length are computed together.

    Args:
        model: Set to evaluation.
        prompts: Token ids; an empty prompt begins behind an end of document, as documents do in
            training.
        config: How to draw and when to stop.
        vocab_size: Ids that can be drawn; the model's table may have more rows.
        end_id: End of document; drawn, it is the last token.

    Raises:
        ConfigError: A prompt with its new tokens is longer than the model's positions, or the
            model looks at later tokens.
    """
    require_causal(model)
    begun = [list(prompt) or [end_id] for prompt in prompts]
    rule = model.documents
    is_apart = rule is not None and rule.switches != DocumentsConfig()
    texts = [
        _Text(
            number=number,
            prompt=prompt,
            room=plan_room(len(prompt), config.max_tokens, model.max_positions, number),
            generator=Generator().manual_seed(_seed_of(config.seed, number)),
            starts_over=is_apart and not prompts[number],
        )
        for number, prompt in enumerate(begun)
    ]
    texts.sort(key=_batch_key)
    for _, group in groupby(texts, key=_batch_key):
        same_length = list(group)
        for start in range(0, len(same_length), MAX_BATCH):
            batch = same_length[start : start + MAX_BATCH]
            yield from _continue(model, batch, config.sampling, vocab_size, end_id)


def plan_room(num_prompt: int, max_tokens: int | None, max_positions: int, number: int) -> int:
    """Give the new tokens of a prompt.

    Args:
        num_prompt: Tokens of the prompt, at least 1.
        max_tokens: As in `GenerationConfig`.
        max_positions: Tokens that the model can hold.
        number: Of the prompt, for messages.

    Raises:
        ConfigError: The prompt leaves no room, or less than is asked for.
    """
    room = max_positions - num_prompt
    if room < 1:
        raise ConfigError(
            f"prompt {number} has {num_prompt} tokens, which leaves no room in "
            f"model.max_positions={max_positions}; legal: 1 to {max_positions - 1} tokens"
        )
    if max_tokens is not None and max_tokens > room:
        raise ConfigError(
            f"prompt {number} has {num_prompt} tokens, and max_tokens={max_tokens} more go beyond "
            f"model.max_positions={max_positions}; legal: max_tokens from 1 to {room}"
        )
    return max_tokens if max_tokens is not None else min(DEFAULT_MAX_TOKENS, room)


@dataclass(kw_only=True)
class _Text:
    """One prompt and what has followed it so far."""

    number: int
    prompt: list[int]
    room: int
    generator: Generator
    starts_over: bool
    """Whether what follows the first new token no longer sees the prompt."""
    num_new: int = 0
    last_id: int = -1
    is_ended: bool = False

    def draw(
        self, logits_V: Tensor, sampling: SamplingConfig, vocab_size: int, end_id: int
    ) -> NewToken:
        self.last_id = next_token(logits_V[:vocab_size], sampling, self.generator)
        self.num_new += 1
        self.is_ended = self.last_id == end_id or self.num_new == self.room
        return NewToken(prompt=self.number, token_id=self.last_id, is_last=self.is_ended)


def _batch_key(text: _Text) -> tuple[int, bool]:
    """Give what texts must share to be computed together."""
    return len(text.prompt), text.starts_over


@torch.inference_mode()
def _continue(
    model: LanguageModel,
    texts: Sequence[_Text],
    sampling: SamplingConfig,
    vocab_size: int,
    end_id: int,
) -> Iterator[NewToken]:
    device = model.embedding_VD.device
    cache = model.start(len(texts))
    prompts_BT = inputs_BT = torch.tensor([text.prompt for text in texts], device=device)
    while True:
        logits_BV = model.extend(inputs_BT, cache)[:, -1]
        for text, logits_V in zip(texts, logits_BV, strict=True):
            if not text.is_ended:
                yield text.draw(logits_V, sampling, vocab_size, end_id)
        if all(text.is_ended for text in texts):
            return
        if texts[0].starts_over and inputs_BT is prompts_BT:
            cache = model.start(len(texts))
        # Ended texts stay in the batch and are fed their last token: a cache cannot be cut by rows.
        inputs_BT = torch.tensor([[text.last_id] for text in texts], device=device)


def _seed_of(seed: int, number: int) -> int:
    """Give each prompt its own stream of draws."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])


@dataclass(kw_only=True)
class Continuation:
    """A prompt and the text that follows it."""

    prompt: str
    prompt_tokens: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    """The new tokens, an end of document included."""
    ended_document: bool = False
    """Whether the model ended the document; otherwise its tokens ran out."""


def continue_texts(
    loaded: LoadedModel, prompts: Sequence[str], config: GenerationConfig
) -> Iterator[tuple[int, str, Continuation]]:
    """Continue texts, and give each piece of new text as soon as it is whole characters.

    Args:
        loaded: Model and tokenizer.
        prompts: Texts; an empty one begins a document.
        config: How to draw and when to stop.

    Yields:
        Number of the prompt, the new piece, and the continuation so far.

    Raises:
        ConfigError: As `generate`.
    """
    ids = [loaded.codec.encode(prompt) for prompt in prompts]
    states = [
        Continuation(prompt=prompt, prompt_tokens=len(tokens))
        for prompt, tokens in zip(prompts, ids, strict=True)
    ]
    streams = [TextStream(loaded.codec) for _ in prompts]
    end_id = loaded.codec.facts.end_of_document_id
    for token in generate(
        loaded.model, ids, config, vocab_size=loaded.codec.facts.vocab_size, end_id=end_id
    ):
        state = states[token.prompt]
        state.token_ids.append(token.token_id)
        state.ended_document = token.token_id == end_id
        piece = "" if state.ended_document else streams[token.prompt].add(token.token_id)
        state.text += piece
        yield token.prompt, piece, state
