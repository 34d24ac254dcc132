"""Each form of attention against a plain loop over past states.

Shapes: `B` batch, `T` time, `S` time of keys, `D` model.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config.chunks import PIECE_ELEMENTS
from pipeline.config.lstm import LstmConfig
from pipeline.config.schema import OptimizerConfig
from pipeline.models.recall import (
    AdditiveRecall,
    Recall,
    attend_additively,
    build_recall,
)
from pipeline.training.engine import parameter_groups

FORMS = ["scaled_dot", "dot", "additive"]
TOKENS, WIDTH = 9, 12
every_form = pytest.mark.parametrize("form", FORMS)
windows = pytest.mark.parametrize("window_tokens", [None, 1, 4, TOKENS, TOKENS + 3])


def make(form: str, **fields: Any) -> Recall:
    config = LstmConfig.model_validate(
        {"width": WIDTH, "heads": 3, "attention": form, "max_positions": 2048, **fields}
    )
    recall = build_recall(config)
    assert recall is not None
    # Weights of 0.02 would leave the softmax flat, and a wrong mask within the tolerance.
    generator = torch.Generator().manual_seed(0)
    for parameter in recall.parameters():
        torch.nn.init.normal_(parameter, std=0.7, generator=generator)
    return recall


def states(num_tokens: int = TOKENS, width: int = WIDTH) -> Tensor:
    return torch.randn(2, num_tokens, width, generator=torch.Generator().manual_seed(1))


def recall_one(recall: Any, form: str, x_SD: Tensor) -> Tensor:
    """Give what the last of some states recalls of all of them, by the published equations."""
    x_D = x_SD[-1]
    if form == "scaled_dot":
        query_SD, key_SD, value_SD = (x_SD @ recall.qkv.weight.T).chunk(3, dim=1)
        heads = []
        for part in range(3):
            columns = slice(part * WIDTH // 3, (part + 1) * WIDTH // 3)
            scores_S = key_SD[:, columns] @ query_SD[-1, columns] / math.sqrt(WIDTH / 3)
            heads.append(scores_S.softmax(0) @ value_SD[:, columns])
        return torch.cat(heads) @ recall.out.weight.T
    if form == "dot":
        scores_S = torch.stack([x_D.dot(past_D) / math.sqrt(WIDTH) for past_D in x_SD])
    else:
        query_DD, key_DD = recall.query_key.weight.chunk(2)
        scores_S = torch.stack(
            [recall.score_D.dot((query_DD @ x_D + key_DD @ past_D).tanh()) for past_D in x_SD]
        )
    context_D = sum(w * past_D for w, past_D in zip(scores_S.softmax(0), x_SD, strict=True))
    return (recall.combine.weight @ torch.cat((context_D, x_D))).tanh()


def recall_by_loops(recall: Recall, form: str, x_BTD: Tensor, first_BT: list[list[int]]) -> Tensor:
    """Let each state recall what stands from its `first` position up to itself."""
    rows = []
    for x_TD, first_T in zip(x_BTD, first_BT, strict=True):
        found = [recall_one(recall, form, x_TD[f : t + 1]) for t, f in enumerate(first_T)]
        rows.append(torch.stack(found))
    return torch.stack(rows)


def assert_equal(recall: Recall, x_BTD: Tensor, actual_BTD: Tensor, expected_BTD: Tensor) -> None:
    torch.testing.assert_close(actual_BTD, expected_BTD, rtol=1e-4, atol=1e-5)
    leaves = [x_BTD, *recall.parameters()]
    slope_BTD = torch.randn(actual_BTD.shape, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad(expected_BTD, leaves, slope_BTD)
    actual = torch.autograd.grad(actual_BTD, leaves, slope_BTD)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@every_form
@windows
def test_a_form_equals_a_loop_over_past_states(form: str, window_tokens: int | None) -> None:
    recall, x_BTD = make(form, window_tokens=window_tokens), states().requires_grad_()
    first_T = [max(0, time + 1 - (window_tokens or TOKENS)) for time in range(TOKENS)]
    expected_BTD = recall_by_loops(recall, form, x_BTD, [first_T, first_T])
    assert_equal(recall, x_BTD, recall(x_BTD)[0], expected_BTD)


@every_form
def test_a_form_sees_what_the_mask_shows(form: str) -> None:
    recall, x_BTD = make(form), states().requires_grad_()
    first_BT = [[0, 0, 0, 3, 3, 3, 3, 7, 7], [0, 1, 2, 2, 2, 2, 2, 2, 8]]
    seen_B1TT = torch.zeros(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    for row, first_T in enumerate(first_BT):
        for time, first in enumerate(first_T):
            seen_B1TT[row, 0, time, first : time + 1] = True
    expected_BTD = recall_by_loops(recall, form, x_BTD, first_BT)
    assert_equal(recall, x_BTD, recall(x_BTD, (), seen_B1TT)[0], expected_BTD)


@every_form
@windows
@pytest.mark.parametrize("cuts", [[1] * TOKENS, [5, 1, 1, 2], [2, 7]])
def test_states_read_in_pieces_recall_what_they_do_at_once(
    form: str, window_tokens: int | None, cuts: list[int]
) -> None:
    recall, x_BTD = make(form, window_tokens=window_tokens).double(), states().double()
    past: tuple[Tensor, ...] = ()
    found = []
    with torch.no_grad():
        for piece_BTD in x_BTD.split(cuts, dim=1):
            recalled_BTD, past = recall(piece_BTD, past)
            found.append(recalled_BTD)
        torch.testing.assert_close(torch.cat(found, dim=1), recall(x_BTD)[0])
    assert {part_BSD.shape[1] for part_BSD in past} == {min(window_tokens or TOKENS, TOKENS)}


def test_the_vector_of_additive_attention_starts_as_a_matrix_and_does_not_decay() -> None:
    config = LstmConfig(width=WIDTH, heads=3, attention="additive")
    recall = build_recall(config)
    assert isinstance(recall, AdditiveRecall)
    recall.initialize(torch.Generator().manual_seed(7), 0.5)
    generator = torch.Generator().manual_seed(7)
    drawn = [
        torch.nn.init.normal_(torch.empty(WIDTH, 2 * WIDTH), std=0.01, generator=generator),
        *(
            torch.nn.init.xavier_uniform_(torch.empty(rows, WIDTH), generator=generator)
            for rows in (WIDTH, WIDTH, 1)
        ),
    ]
    assert torch.equal(recall.combine.weight, drawn[0])
    assert torch.equal(recall.query_key.weight, torch.cat(drawn[1:3]))
    assert torch.equal(recall.score_D, drawn[3][0])
    decayed, spared = parameter_groups(recall, OptimizerConfig())
    assert [id(p) for p in spared["params"]] == [id(recall.score_D)]
    assert spared["weight_decay"] == 0.0
    assert len(decayed["params"]) == 2


def test_additive_attention_takes_its_softmax_in_float32() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 5, WIDTH), (2, 7, WIDTH), (2, 7, WIDTH), (WIDTH,)]
    given = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    with SoftmaxTypes() as seen:
        context_BAD = attend_additively(*given, None)
    assert seen.dtypes == {torch.float32}
    assert context_BAD.dtype == torch.bfloat16
    exact_BAD = attend_additively(*(part.double() for part in given), None)
    torch.testing.assert_close(context_BAD.double(), exact_BAD, rtol=0.0, atol=0.03)


class SoftmaxTypes(TorchDispatchMode):
    """Notes the types that softmaxes give."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "softmax" in str(func):
            self.dtypes.add(result.dtype)
        return result


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation gives, backward included."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


@pytest.mark.parametrize("window_tokens", [None, 300])
def test_additive_attention_in_pieces_equals_it_whole_and_never_holds_it(
    window_tokens: int | None,
) -> None:
    num_tokens, width = 640, 24
    recall = make("additive", width=width, window_tokens=window_tokens).double()
    x_BTD = states(num_tokens, width).double().requires_grad_()
    hidden_elements = 2 * num_tokens**2 * width
    assert hidden_elements > PIECE_ELEMENTS
    with LargestTensor() as made:
        actual_BTD = recall(x_BTD)[0]
        actual_BTD.sum().backward()
    assert made.num_elements <= PIECE_ELEMENTS
    actual_BTD = recall(x_BTD)[0]
    q_BTD, k_BTD = (x_BTD @ recall.query_key.weight.T).chunk(2, dim=2)
    seen_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    if window_tokens is not None:
        seen_TT = seen_TT.triu(1 - window_tokens)
    scores_BTS = (q_BTD.unsqueeze(2) + k_BTD.unsqueeze(1)).tanh() @ recall.score_D
    weights_BTS = scores_BTS.masked_fill(~seen_TT, -torch.inf).softmax(dim=2)
    combined_BTD = torch.cat((weights_BTS @ x_BTD, x_BTD), dim=2) @ recall.combine.weight.T
    assert_equal(recall, x_BTD, actual_BTD, combined_BTD.tanh())
