"""The LSTM family beside bare layers and beside the model that everyone copies, in one process.

    python -m tests.bench.lstm_peers --word-language-model CHECKOUT \\
        [--rounds 15] [--threads 2] [--result FILE.json]

CHECKOUT is one of github.com/pytorch/examples; its `word_language_model/model.py` runs as it is.
Every contender takes whole training steps in fp32: forward, backward, clipping and the same fused
AdamW. Rounds are interleaved and begin with another contender each time; the first two are left
out. Figures are medians with the smallest and the largest.

1. Ours with attention (4 layers, width 256, T = 256, 8 samples, V = 4096) against bare `nn.LSTM`
   layers of that width and a bare head. Ours does more: its attention, norms and feed-forward are
   timed on their own, forward, backward and update, and taken off its step.
2. The example with its published defaults (200 wide, 2 layers, 20 samples of 35 tokens, dropout
   0.2, V = 33,278 as in WikiText-2), against ours of as many parameters on the same batch. The
   three products of the head, which both have to run, stand beside them on their own.

fp32, because a CPU without bf16 instructions has no bf16 kernel for an LSTM. The exit code is 1
where a target is missed.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.lstm import LstmConfig
from pipeline.models import build_model
from pipeline.models.lstm import LstmAttentionLM
from tests.bench.timing import Spread, cpu_model, own_versions

WARMUP_ROUNDS = 2
CLIPPING = 0.25
TARGET_OVER_BARE = 0.9
TARGET_OVER_EXAMPLE = 1.5


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


def part_step(kind: str, shape: Shape) -> Callable[[], None]:
    """Give a step through one kind of sub-layer of ours, all of its kind in the model."""
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
    parts = nn.ModuleList(chosen[kind])
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


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, Spread]:
    """Time the contenders in turn, each round beginning with the next."""
    names, seconds = list(steps), {name: [] for name in steps}
    for turn in range(rounds + WARMUP_ROUNDS):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            steps[name]()
            if turn >= WARMUP_ROUNDS:
                seconds[name].append(time.perf_counter() - started)
    return {name: Spread.of(values) for name, values in seconds.items()}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Step times of one comparison, and how ours stands."""

    name: str
    tokens_per_step: int
    seconds: dict[str, Spread]
    ratio: float
    """Our tokens per second over the peer's, parts that only ours has taken off."""
    target: float
    bound: float | None = None
    """The ratio at which nothing but the products of the head would be left of our step."""

    @property
    def is_met(self) -> bool:
        """Whether the target holds."""
        return self.ratio >= self.target

    def print_table(self) -> None:
        """Print a line for each contender and the verdict."""
        print(f"\n{self.name}\n{'contender':<16}{'ms: median (min-max)':>30}{'tokens/s':>12}")
        for name, spread in self.seconds.items():
            given = f"{spread.median * 1e3:.1f} ({spread.min * 1e3:.1f}-{spread.max * 1e3:.1f})"
            print(f"{name:<16}{given:>30}{self.tokens_per_step / spread.median:>12,.0f}")
        verdict = "met" if self.is_met else "MISSED"
        print(f"{verdict}: {self.ratio:.2f} times the peer's rate, target {self.target}")
        if self.bound is not None:
            print(f"a step of the head's products alone would reach {self.bound:.2f}")


def beside_bare(rounds: int) -> Comparison:
    """Compare with bare layers and a bare head."""
    parts = ("attention", "norms", "feed_forward")
    steps = {"ours": our_step(OURS_BESIDE_BARE, BARE), "bare": bare_step(BARE)}
    seconds = measure(steps | {part: part_step(part, BARE) for part in parts}, rounds)
    kept = seconds["ours"].median - sum(seconds[part].median for part in parts)
    return Comparison(
        name="ours beside bare nn.LSTM layers; attention, norms and feed-forward taken off",
        tokens_per_step=BARE.tokens_per_step,
        seconds=seconds,
        ratio=seconds["bare"].median / kept,
        target=TARGET_OVER_BARE,
    )


def beside_example(checkout: Path, rounds: int) -> Comparison:
    """Compare with word_language_model.

    Raises:
        SystemExit: The two differ in size by more than 1%.
    """
    model = example_model(checkout, EXAMPLE)
    theirs = sum(parameter.numel() for parameter in model.parameters())
    ours = OURS_BESIDE_EXAMPLE.num_parameters(EXAMPLE.vocab_size).total
    if abs(ours / theirs - 1) > 0.01:
        raise SystemExit(f"ours has {ours:,} parameters, the example {theirs:,}")
    seconds = measure(
        {
            "ours": our_step(OURS_BESIDE_EXAMPLE, EXAMPLE),
            "example": example_step(model, EXAMPLE),
            "head products": head_products(OURS_BESIDE_EXAMPLE.width, EXAMPLE),
        },
        rounds,
    )
    return Comparison(
        name=f"ours ({ours:,} parameters) beside word_language_model ({theirs:,})",
        tokens_per_step=EXAMPLE.tokens_per_step,
        seconds=seconds,
        ratio=seconds["example"].median / seconds["ours"].median,
        target=TARGET_OVER_EXAMPLE,
        bound=seconds["example"].median / seconds["head products"].median,
    )


def main() -> None:
    """Run the benchmark; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--word-language-model", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    environment = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "versions": own_versions(("torch",)),
        "threads": given.threads,
        "rounds": given.rounds,
        "precision": "fp32",
    }
    print(json.dumps(environment), flush=True)
    comparisons = [
        beside_bare(given.rounds),
        beside_example(given.word_language_model, given.rounds),
    ]
    for comparison in comparisons:
        comparison.print_table()
    if given.result is not None:
        found = [asdict(comparison) | {"is_met": comparison.is_met} for comparison in comparisons]
        record = {"environment": environment, "comparisons": found}
        given.result.write_text(json.dumps(record, indent=2) + "\n")
    sys.exit(0 if all(comparison.is_met for comparison in comparisons) else 1)


if __name__ == "__main__":
    main()
