"""Documents of a packed sample, kept apart by the model, against plain loops over each alone.

Shapes: `B` batch, `T` time, `D` model, `V` vocabulary.
"""

import itertools
from collections.abc import Iterable
from typing import Any, cast

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from pipeline.config.gpt import GptConfig
from pipeline.config.lstm import LstmConfig
from pipeline.config.model import ModelConfig
from pipeline.config.schema import DocumentsConfig
from pipeline.models import build_model
from pipeline.models.attention import Sight
from pipeline.models.base import LanguageModel
from pipeline.models.cells import build_cell
from pipeline.models.documents import Borders, DocumentRule, cut, positions_in
from pipeline.models.gpt import GptBlock, GptLM
from pipeline.models.lstm import LstmAttentionLM, RecurrentLayer
from pipeline.models.positions import rotary_table

VOCAB, END = 50, 7
SIZE = {"width": 16, "depth": 2, "heads": 2, "max_positions": 12}
LENGTHS = [[5, 1, 6], [12], [3, 3, 3, 3], [1, 1, 10], [11, 1]]
"""Documents of each row of 12 tokens; all but the last of a row end with END."""
ALL = DocumentsConfig(reset_positions=True, mask_attention=True, reset_state=True)
ARMS: list[dict[str, Any]] = [
    *({"family": "gpt", "positions": positions} for positions in ("rope", "learned", "none")),
    {"family": "gpt", "positions": "alibi"},
    {"family": "gpt", "window_tokens": 3},
    {"family": "gpt", "kv_heads": 1},
    {"family": "gpt", "positions": "alibi", "window_tokens": 4, "kv_heads": 1},
    *(
        {"family": "lstm_attention", **fields}
        for fields in (
            {"attention": "none"},
            {"attention_after": "last"},
            {"attention_after": "second_last", "hidden_width": 24},
            {"window_tokens": 2, "feed_forward": False},
            {"window_tokens": 12},
            {"cell": "gru", "attention": "dot", "window_tokens": 4},
            {"cell": "min_lstm", "attention": "additive"},
        )
    ),
]
FED = [
    {"family": "lstm_attention", "input_feeding": True, **fields}
    for fields in ({"attention": "dot"}, {"attention": "additive", "window_tokens": 3})
]
"""Arms whose layers cannot be looped one after the other."""
SWITCHES = [
    DocumentsConfig(reset_positions=positions, mask_attention=mask, reset_state=state)
    for positions, mask, state in itertools.product((False, True), repeat=3)
]


def name_of(arm: dict[str, Any]) -> str:
    return ",".join(str(value) for value in arm.values())


every_arm = pytest.mark.parametrize("arm", ARMS, ids=name_of)


def make(arm: dict[str, Any], switches: DocumentsConfig | None) -> LanguageModel:
    config = TypeAdapter(ModelConfig).validate_python({**SIZE, **arm})
    rule = None if switches is None else DocumentRule(end_of_document_id=END, switches=switches)
    return build_model(config, VOCAB, seed=1, documents=rule)


def packed_rows() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    rows_BT = torch.randint(END + 1, VOCAB, (len(LENGTHS), 12), generator=generator)
    for row_T, lengths in zip(rows_BT, LENGTHS, strict=True):
        for start, stop in spans(lengths)[:-1]:
            assert start < stop
            row_T[stop - 1] = END
    return rows_BT


def spans(lengths: list[int]) -> list[tuple[int, int]]:
    stops = list(itertools.accumulate(lengths))
    return list(zip([0, *stops[:-1]], stops, strict=True))


def mask_by_hand(config: GptConfig, num_tokens: int) -> Tensor | None:
    """Give what window and ALiBi add to the scores, `[H, T, T]`; None where there is neither.

    Source: Press et al. 2022, section 3: slopes 2^(-8h/H) for a power of two of heads.
    """
    if config.window_tokens is None and config.positions != "alibi":
        return None
    added = torch.full((config.heads, num_tokens, num_tokens), -torch.inf)
    for head, query, key in itertools.product(
        range(config.heads), range(num_tokens), range(num_tokens)
    ):
        distance = query - key
        slope = 2.0 ** (-8 * (head + 1) / config.heads) if config.positions == "alibi" else 0.0
        if 0 <= distance < (config.window_tokens or num_tokens):
            added[head, query, key] = -slope * distance
    return added


def loop_gpt(model: GptLM, x_1TD: Tensor, lengths: list[int], switches: DocumentsConfig) -> Tensor:
    """Run the blocks document by document where the switches say so."""
    positions = [
        time - start if switches.reset_positions else time
        for start, stop in spans(lengths)
        for time in range(start, stop)
    ]
    if model.config.positions == "learned":
        x_1TD = x_1TD + torch.stack([model.positions_PD[p] for p in positions])
    for block in cast("Iterable[GptBlock]", model.blocks):
        pieces = []
        for start, stop in spans(lengths) if switches.mask_attention else [(0, 12)]:
            rotation = None
            if model.config.positions == "rope":
                times = torch.tensor(positions[start:stop])
                rotation = rotary_table(times, model.config.head_width, model.config.rope_base)
            mask = mask_by_hand(model.config, stop - start)
            sight = Sight(mask=mask, is_causal=mask is None, rotation=rotation)
            pieces.append(block(x_1TD[:, start:stop], sight))
        x_1TD = torch.cat(pieces, dim=1)
    return x_1TD


def loop_lstm(
    model: LstmAttentionLM, x_1TD: Tensor, lengths: list[int], switches: DocumentsConfig
) -> Tensor:
    """Run layers and attention document by document where the switches say so."""
    documents, whole = spans(lengths), [(0, 12)]
    attended = model.config.depth - (2 if model.config.attention_after == "second_last" else 1)
    for index, layer in enumerate(cast("Iterable[RecurrentLayer]", model.layers)):
        parts = documents if switches.reset_state else whole
        x_1TD = torch.cat([layer(x_1TD[:, start:stop])[0] for start, stop in parts], dim=1)
        if model.attention is not None and index == attended:
            parts = documents if switches.mask_attention else whole
            normed_1TD = model.attention_norm(x_1TD)
            x_1TD = x_1TD + torch.cat(
                [model.attention(normed_1TD[:, start:stop])[0] for start, stop in parts], dim=1
            )
    return x_1TD


def loop_logits(model: LanguageModel, rows_BT: Tensor, switches: DocumentsConfig) -> Tensor:
    """Give the logits `[B, T, V]` by plain loops over rows and documents."""
    found = []
    for row_T, lengths in zip(rows_BT, LENGTHS, strict=True):
        x_1TD = model.embedding_VD[row_T].unsqueeze(0)
        if isinstance(model, GptLM):
            x_1TD = loop_gpt(model, x_1TD, lengths, switches)
        else:
            x_1TD = loop_lstm(cast(LstmAttentionLM, model), x_1TD, lengths, switches)
        found.append(model.final_norm(x_1TD) @ model.embedding_VD.T)
    return torch.cat(found)


def gradients(model: LanguageModel, logits_BTV: Tensor) -> dict[str, Tensor]:
    """Give the gradients of a fixed random functional of the logits."""
    factors_BTV = torch.randn(logits_BTV.shape, generator=torch.Generator().manual_seed(9))
    model.zero_grad()
    (logits_BTV * factors_BTV).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_runs(first: LanguageModel, logits_BTV: Tensor, expected_BTV: Tensor) -> None:
    torch.testing.assert_close(logits_BTV, expected_BTV, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradients(first, logits_BTV), gradients(first, expected_BTV), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("arm", [*ARMS, *FED], ids=name_of)
def test_a_packed_row_equals_its_documents_run_alone(arm: dict[str, Any]) -> None:
    model, alone, rows_BT = make(arm, ALL), make(arm, None), packed_rows()
    with torch.no_grad():
        alone.load_state_dict(model.state_dict())
    expected_BTV = torch.stack(
        [
            torch.cat([alone.logits(row_T[None, start:stop])[0] for start, stop in spans(lengths)])
            for row_T, lengths in zip(rows_BT, LENGTHS, strict=True)
        ]
    )
    logits_BTV = model.logits(rows_BT)
    torch.testing.assert_close(logits_BTV, expected_BTV, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradients(model, logits_BTV), gradients(alone, expected_BTV), rtol=1e-3, atol=1e-4
    )


@every_arm
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "".join("ft"[v] for _, v in s))
def test_every_switch_equals_a_plain_loop_over_documents(
    arm: dict[str, Any], switches: DocumentsConfig
) -> None:
    model, rows_BT = make(arm, switches), packed_rows()
    assert_equal_runs(model, model.logits(rows_BT), loop_logits(model, rows_BT, switches))


@every_arm
def test_switches_that_are_off_change_no_bit(arm: dict[str, Any]) -> None:
    rows_BT, labels_BT = packed_rows(), packed_rows().roll(-1, dims=1)
    without, off = make(arm, None), make(arm, DocumentsConfig())
    losses = [model(rows_BT, labels_BT) for model in (without, off)]
    assert torch.equal(*losses)
    for loss_BT in losses:
        loss_BT.mean().backward()
    for one, other in zip(without.parameters(), off.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_a_family_takes_no_notice_of_what_it_lacks() -> None:
    rows_BT = packed_rows()
    for arm, switches in (
        ({"family": "gpt"}, DocumentsConfig(reset_state=True)),
        ({"family": "gpt", "positions": "none"}, DocumentsConfig(reset_positions=True)),
        ({"family": "lstm_attention"}, DocumentsConfig(reset_positions=True)),
        (
            {"family": "lstm_attention", "attention": "none"},
            DocumentsConfig(mask_attention=True),
        ),
    ):
        assert torch.equal(make(arm, switches)(rows_BT), make(arm, None)(rows_BT))


def test_an_end_closes_its_own_document() -> None:
    rows_BT = torch.tensor([[9, END, END, 8, 9], [8, 9, 9, 9, END]])
    borders = DocumentRule(end_of_document_id=END, switches=ALL).find(rows_BT)
    assert borders.documents_BT is not None
    assert borders.documents_BT.tolist() == [[0, 0, 1, 2, 2], [0, 0, 0, 0, 0]]
    assert positions_in(borders.documents_BT).tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("window_tokens", [None, 1, 2, 5])
def test_seen_is_causal_within_document_and_window(window_tokens: int | None) -> None:
    documents_BT = torch.tensor([[0, 0, 1, 2, 2], [0, 0, 0, 0, 0]])
    seen_B1TT = Borders(documents_BT=documents_BT, switches=ALL).seen(window_tokens)
    assert seen_B1TT is not None
    for row, documents in enumerate(documents_BT.tolist()):
        for query, key in itertools.product(range(5), repeat=2):
            near = window_tokens is None or query - key < window_tokens
            expected = documents[query] == documents[key] and key <= query and near
            assert bool(seen_B1TT[row, 0, query, key]) == expected


def test_cut_orders_documents_as_torch_packs_them() -> None:
    rows_BT = packed_rows()
    documents_BT = DocumentRule(end_of_document_id=END, switches=ALL).find(rows_BT).documents_BT
    assert documents_BT is not None
    segments = cut(documents_BT)
    pieces = [
        row_T[start:stop]
        for row_T, lengths in zip(rows_BT, LENGTHS, strict=True)
        for start, stop in spans(lengths)
    ]
    extra = rows_BT.flatten()[0].repeat(13)
    packed = pack_sequence([extra, *sorted(pieces, key=len, reverse=True)])
    assert rows_BT.flatten()[segments.tokens_P].tolist() == packed.data.tolist()
    assert segments.batch_sizes.tolist() == packed.batch_sizes.tolist()
    assert segments.tokens_P[segments.places_N].tolist() == list(range(rows_BT.numel()))


@pytest.mark.parametrize("kind", ["lstm", "gru", "elman", "min_lstm"])
def test_gradients_become_ready_in_one_order_wherever_documents_end(kind: str) -> None:
    """Ranks reduce gradients in the order in which they become ready, so it has to be the same."""
    lstm = build_cell(LstmConfig.model_validate({"width": 8, "cell": kind}), input_width=8)
    lstm.initialize(torch.Generator().manual_seed(0))
    order: list[str] = []
    for name, parameter in lstm.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    found = set()
    for ends in ([], [5], [11], [0, 1], [3, 7], list(range(12))):
        ends_BT = torch.zeros(2, 12, dtype=torch.long)
        ends_BT[:, ends] = 1
        order.clear()
        x_BTD = torch.randn(2, 12, 8, requires_grad=True)
        lstm(x_BTD, cut(ends_BT.cumsum(dim=1) - ends_BT))[0].sum().backward()
        found.add(tuple(order))
    assert len(found) == 1
