"""The Transformer beside nanoGPT's model and transformers' GPT-2, in one process.

    pip install -e ".[bench]"
    python -m tests.bench.gpt_peers --nanogpt CHECKOUT [--precision bf16|fp32] \\
        [--rounds 15] [--threads 2] [--clock wall|processor] [--result FILE.json]

CHECKOUT is one of github.com/karpathy/nanoGPT; its `model.py` runs as it is. Every contender has 4
layers of width 256 and takes whole training steps on 8 samples of 256 tokens, V = 4096: forward,
backward, clipping and the same fused AdamW. Ours takes the options of the peer it stands beside:
learned positions, LayerNorm, GELU, with the biases of GPT-2 or without. Rounds are interleaved and
begin with another contender each time; the first two, which also compile, are left out. Figures
are medians with the smallest and the largest. Where others use the machine, `--threads 1 --clock
processor` compares processor time.

In bf16 ours keeps bf16 weights with float32 masters, as the engines do. The peers run as their own
training scripts have it, float32 weights under autocast, and nanoGPT's also as ours does. Losses of
200 steps of ours stand beside those in fp32. A CPU without bf16 instructions emulates them some
twenty times slower, which says nothing about models: there `--precision bf16` is refused, and fp32,
for which no target is stated, has to be no slower than the peers. The exit code is 1 where a target
is missed.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.gpt import GptConfig
from pipeline.config.schema import TrainConfig
from pipeline.models import build_model
from pipeline.models.execution import set_execution
from tests.bench.lstm_contenders import CLIPPING, Shape, draw_batch, training_step
from tests.bench.lstm_peers import CLOCKS, Comparison, measure
from tests.bench.timing import Spread, cpu_model, own_versions

SHAPE = Shape(vocab_size=4096, num_samples=8, num_tokens=256)
SIZE: dict[str, Any] = {
    "width": 256, "depth": 4, "heads": 4, "max_positions": 256, "positions": "learned",
    "norm": "layernorm",
}  # fmt: skip
LIKE_NANOGPT = GptConfig.model_validate({**SIZE, "activation": "gelu"})
LIKE_GPT2 = GptConfig.model_validate({**SIZE, "activation": "gelu_tanh", "biases": True})
LOSS_STEPS, MAX_LOSS_GAP = 200, 0.02

Step = Callable[[], None]
PAIRS = {
    "bf16": [
        ("nanogpt, autocast", "ours", 1.5),
        ("transformers, autocast", "ours, biases", 1.5),
        ("nanogpt, masters", "ours", 1.25),
        ("nanogpt, masters, compiled", "ours, compiled", 1.15),
    ],
    "fp32": [
        ("nanogpt", "ours", 1.0),
        ("transformers", "ours, biases", 1.0),
        ("nanogpt, compiled", "ours, compiled", 1.0),
    ],
}
"""Precision to peer, ours, and the least ratio of our rate to the peer's."""


def master_step(model: nn.Module, forward: Callable[[], Tensor]) -> Step:
    """Give a step of a model cast to bf16 whose float32 masters are updated."""
    model.bfloat16()
    parameters = list(model.parameters())
    masters = [parameter.detach().float() for parameter in parameters]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)

    def step() -> None:
        forward().backward()
        for parameter, master in zip(parameters, masters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(masters, CLIPPING)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, masters)

    return step


def our_step(config: GptConfig, precision: str, *, compiled: bool) -> Step:
    """Give our step; the loss is the mean over tokens, as in training."""
    model, (inputs_BT, labels_BT) = build_model(config, SHAPE.vocab_size, 0), draw_batch(SHAPE)
    set_execution(model, TrainConfig(compile=compiled))
    build = master_step if precision == "bf16" else training_step
    return build(model, lambda: model(inputs_BT, labels_BT).sum() / inputs_BT.numel())


def nanogpt_model(checkout: Path) -> nn.Module:
    """Build nanoGPT's model of this size, without biases and dropout.

    Raises:
        SystemExit: It is not there.
    """
    path = checkout / "model.py"
    if not path.is_file():
        raise SystemExit(f"{path} is missing; give a checkout of github.com/karpathy/nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        block_size=SHAPE.num_tokens, vocab_size=SHAPE.vocab_size, n_layer=4, n_head=4, n_embd=256,
        dropout=0.0, bias=False,
    )  # fmt: skip
    model: nn.Module = module.GPT(config)
    return model


def transformers_model() -> nn.Module:
    """Build transformers' GPT-2 of this size with SDPA, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=SHAPE.vocab_size, n_positions=SHAPE.num_tokens, n_embd=256, n_layer=4, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa",
        use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: nn.Module = GPT2LMHeadModel(config)
    return model.train()


def peer_step(model: nn.Module, kind: str, *, compiled: bool) -> Step:
    """Give a peer's step: `fp32`, under `autocast`, or in bf16 with `masters`."""
    inputs_BT, labels_BT = draw_batch(SHAPE)
    call: Any = torch.compile(model) if compiled else model
    is_nanogpt = type(model).__name__ == "GPT"

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            if is_nanogpt:
                loss: Tensor = call(inputs_BT, labels_BT)[1]
                return loss
            logits_BTV = call(input_ids=inputs_BT).logits
            return F.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten())

    return (master_step if kind == "masters" else training_step)(model, forward)


def build_steps(checkout: Path, precision: str) -> dict[str, Step]:
    """Build every contender of a precision.

    Raises:
        SystemExit: A peer is missing, or differs from ours in size by more than 1%.
    """
    peers = {"nanogpt": lambda: nanogpt_model(checkout), "transformers": transformers_model}
    for build, config in zip(peers.values(), (LIKE_NANOGPT, LIKE_GPT2), strict=True):
        theirs = sum(parameter.numel() for parameter in build().parameters())
        ours = config.num_parameters(SHAPE.vocab_size).total
        if abs(ours / theirs - 1) > 0.01:
            raise SystemExit(f"ours has {ours:,} parameters, the peer {theirs:,}")
    steps = {
        "ours": our_step(LIKE_NANOGPT, precision, compiled=False),
        "ours, biases": our_step(LIKE_GPT2, precision, compiled=False),
        "ours, compiled": our_step(LIKE_NANOGPT, precision, compiled=True),
    }
    for name, _, _ in PAIRS[precision]:
        kind = next((kind for kind in ("autocast", "masters") if kind in name), "fp32")
        model = peers[name.partition(",")[0]]()
        steps[name] = peer_step(model, kind, compiled="compiled" in name)
    return steps


def compare(seconds: dict[str, Spread], precision: str) -> list[Comparison]:
    """Give how ours stands beside each peer."""
    return [
        Comparison(
            name=f"{ours} beside {peer}, {precision}",
            tokens_per_step=SHAPE.tokens_per_step,
            seconds={name: seconds[name] for name in (ours, peer)},
            ratio=seconds[peer].median / seconds[ours].median,
            target=target,
        )
        for peer, ours, target in PAIRS[precision]
    ]


def losses_of(precision: str) -> list[float]:
    """Train ours on a text in which every second token repeats the one before; give the losses."""
    model, generator = build_model(LIKE_NANOGPT, SHAPE.vocab_size, 0), torch.Generator()
    losses: list[float] = []

    def forward() -> Tensor:
        generator.manual_seed(len(losses))
        size = (SHAPE.num_samples, SHAPE.num_tokens + 2)
        tokens = torch.randint(64, size, generator=generator)
        tokens[:, 1::2] = tokens[:, ::2]
        loss: Tensor = model(tokens[:, :-2], tokens[:, 1:-1]).mean()
        losses.append(loss.item())
        return loss

    step = (master_step if precision == "bf16" else training_step)(model, forward)
    for _ in range(LOSS_STEPS):
        step()
    return losses


def main() -> None:
    """Run the benchmark; see the module."""
    given = _arguments()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    environment = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "versions": own_versions(("torch", "transformers")),
        "threads": given.threads,
        "rounds": given.rounds,
        "clock": given.clock,
        "precision": given.precision,
    }
    print(json.dumps(environment), flush=True)
    steps = build_steps(given.nanogpt, given.precision)
    comparisons = compare(measure(steps, given.rounds, CLOCKS[given.clock]), given.precision)
    for comparison in comparisons:
        comparison.print_table()
    is_met = all(comparison.is_met for comparison in comparisons)
    found = [asdict(comparison) | {"is_met": comparison.is_met} for comparison in comparisons]
    record: dict[str, Any] = {"environment": environment, "comparisons": found}
    if given.precision == "bf16":
        pairs = zip(losses_of("bf16"), losses_of("fp32"), strict=True)
        gap = max(abs(rounded - exact) for rounded, exact in pairs)
        print(f"\nlargest gap to the losses in fp32 over {LOSS_STEPS} steps: {gap:.4f} nats")
        record["largest_loss_gap"] = gap
        is_met = is_met and gap <= MAX_LOSS_GAP
    if given.result is not None:
        given.result.write_text(json.dumps(record, indent=2) + "\n")
    sys.exit(0 if is_met else 1)


def _arguments() -> argparse.Namespace:
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--precision", choices=PAIRS, default="bf16" if has_bf16 else "fp32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    if given.precision == "bf16" and not has_bf16:
        parser.error("this CPU has no bf16 instructions; take --precision fp32")
    return given


if __name__ == "__main__":
    main()
