"""Contenders of the LSTM benchmark: each a function that takes one training step in fp32.

Shapes: `B` batch, `T` time, `N` all B x T tokens, `D` model, `V` vocabulary.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.lstm import LstmConfig
from pipeline.models import build_model
from pipeline.models.lstm import LstmAttentionLM

CLIPPING = 0.25
"""Largest gradient norm, as in the example."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a comparison holds fixed."""

    vocab_size: int
    num_samples: int
    num_tokens: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step."""
        return self.num_samples * self.num_tokens


BARE = Shape(vocab_size=4096, num_samples=8, num_tokens=256)
EXAMPLE = Shape(vocab_size=33_278, num_samples=20, num_tokens=35)
"""Defaults of the example's command line; V is that of its data set."""
OURS_BESIDE_BARE = LstmConfig(width=256, depth=4, heads=4)
OURS_BESIDE_EXAMPLE = LstmConfig(
    width=200, depth=2, heads=4, feed_forward=False, tied_head=False, attention="dot",
    dropout=0.2, max_positions=35,
)  # fmt: skip
"""Untied, as the example is by default, and with the attention of fewest parameters."""


class BareLstm(nn.Module):
    """Embedding, the layers of torch and a head, with nothing between them."""

    def __init__(self, width: int, depth: int, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.lstm = nn.LSTM(width, width, depth, batch_first=True)

    def forward(self, inputs_BT: Tensor, labels_BT: Tensor) -> Tensor:
        hidden_BTD, _ = self.lstm(self.embedding(inputs_BT))
        logits_BTV = F.linear(hidden_BTD, self.embedding.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())


def training_step(model: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], None]:
    """Give a function that takes one training step."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        forward().backward()
        nn.utils.clip_grad_norm_(parameters, CLIPPING)
        optimizer.step()

    return step


def draw_batch(shape: Shape) -> tuple[Tensor, Tensor]:
    """Draw inputs and labels `[B, T]`."""
    tokens = torch.randint(shape.vocab_size, (shape.num_samples, shape.num_tokens + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def our_step(config: LstmConfig, shape: Shape) -> Callable[[], None]:
    """Give our step; the loss is the mean over tokens, as in training."""
    model, (inputs_BT, labels_BT) = build_model(config, shape.vocab_size, 0), draw_batch(shape)
    return training_step(model, lambda: model(inputs_BT, labels_BT).sum() / inputs_BT.numel())


def build_part(kind: str, shape: Shape) -> nn.ModuleList:
    """Give the sub-layers of one kind, all that our model has."""
    model = build_model(OURS_BESIDE_BARE, shape.vocab_size, 0)
    assert isinstance(model, LstmAttentionLM)
    layers: list[Any] = list(model.layers)
    chosen: dict[str, list[Any]] = {
        "attention": [model.attention],
        "norms": [
            *(layer.cell_norm for layer in layers),
            *(layer.feed_forward_norm for layer in layers),
            model.attention_norm,
            model.final_norm,
        ],
        "feed_forward": [layer.feed_forward for layer in layers],
    }
    return nn.ModuleList(chosen[kind])


def part_step(parts: nn.ModuleList, shape: Shape) -> Callable[[], None]:
    """Give a step through sub-layers, each on an input of its own."""
    x_BTD = torch.randn(shape.num_samples, shape.num_tokens, OURS_BESIDE_BARE.width)
    slope_BTD = torch.randn_like(x_BTD)

    def forward() -> Tensor:
        total = torch.zeros(())
        for part in parts:
            read_BTD = x_BTD.detach().requires_grad_()
            found = part(read_BTD)
            y_BTD = found[0] if isinstance(found, tuple) else found
            # Backward begins with a gradient that is at hand, as it is in the model.
            total = total + _Inject.apply(y_BTD, slope_BTD)
        return total

    return training_step(parts, forward)


class _Inject(torch.autograd.Function):
    """A scalar whose gradient is a given tensor."""

    @staticmethod
    def forward(ctx: Any, y_BTD: Tensor, slope_BTD: Tensor) -> Tensor:
        ctx.save_for_backward(slope_BTD)
        return y_BTD.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def bare_step(shape: Shape) -> Callable[[], None]:
    """Give the step of bare layers of our width and depth."""
    model = BareLstm(OURS_BESIDE_BARE.width, OURS_BESIDE_BARE.depth, shape.vocab_size)
    inputs_BT, labels_BT = draw_batch(shape)
    return training_step(model, lambda: model(inputs_BT, labels_BT))


def load_example(checkout: Path) -> Any:
    """Load the example's module from a checkout.

    Raises:
        SystemExit: It is not there.
    """
    path = checkout / "word_language_model" / "model.py"
    if not path.is_file():
        raise SystemExit(f"{path} is missing; give a checkout of github.com/pytorch/examples")
    spec = importlib.util.spec_from_file_location("word_language_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example_model(checkout: Path, shape: Shape) -> nn.Module:
    """Build the example's LSTM with its published defaults."""
    model: nn.Module = load_example(checkout).RNNModel(
        "LSTM", shape.vocab_size, 200, 200, 2, dropout=0.2, tie_weights=False
    )
    return model


def example_step(model: Any, shape: Shape) -> Callable[[], None]:
    """Give the example's step: time first, state carried and detached, as its main.py has it."""
    inputs_BT, labels_BT = draw_batch(shape)
    inputs_TB, labels_N = inputs_BT.T.contiguous(), labels_BT.T.flatten()
    hidden = model.init_hidden(shape.num_samples)

    def forward() -> Tensor:
        nonlocal hidden
        hidden = tuple(state.detach() for state in hidden)
        output_NV, hidden = model(inputs_TB, hidden)
        return F.nll_loss(output_NV, labels_N)

    return training_step(model, forward)


def head_products(width: int, shape: Shape) -> Callable[[], None]:
    """Give the products of the head in a training step, with nothing around them."""
    num_tokens = shape.tokens_per_step
    x_ND, head_VD = torch.randn(num_tokens, width), torch.randn(shape.vocab_size, width)
    logits_NV = torch.zeros(num_tokens, shape.vocab_size)
    x_slope_ND, head_slope_VD = torch.zeros_like(x_ND), torch.zeros_like(head_VD)

    def step() -> None:
        torch.mm(x_ND, head_VD.T, out=logits_NV)
        torch.mm(logits_NV, head_VD, out=x_slope_ND)
        torch.mm(logits_NV.T, x_ND, out=head_slope_VD)

    return step
