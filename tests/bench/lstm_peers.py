"""The LSTM family beside bare layers and beside the model that everyone copies, in one process.

    python -m tests.bench.lstm_peers --word-language-model CHECKOUT \\
        [--rounds 15] [--threads 2] [--clock wall] [--result FILE.json]

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

On a machine that others use, two threads wait for each other's cores and wall time moves tenfold:
there `--threads 1 --clock processor` compares the processor time of the contenders.
fp32, because a CPU without bf16 instructions has no bf16 kernel for an LSTM. The exit code is 1
where a target is missed.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tests.bench.lstm_contenders import (
    BARE,
    EXAMPLE,
    OURS_BESIDE_BARE,
    OURS_BESIDE_EXAMPLE,
    bare_step,
    build_part,
    example_model,
    example_step,
    head_products,
    our_step,
    part_step,
)
from tests.bench.timing import Spread, cpu_model, own_versions

WARMUP_ROUNDS = 2
PARTS = ("attention", "norms", "feed_forward")
"""What ours has and bare layers lack."""
TARGET_OVER_BARE = 0.9
TARGET_OVER_EXAMPLE = 1.5

CLOCKS: dict[str, Callable[[], float]] = {
    "wall": time.perf_counter,
    "processor": time.process_time,
}


def measure(
    steps: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]
) -> dict[str, Spread]:
    """Time the contenders in turn, each round beginning with the next."""
    names, seconds = list(steps), {name: [] for name in steps}
    for turn in range(rounds + WARMUP_ROUNDS):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = clock()
            steps[name]()
            if turn >= WARMUP_ROUNDS:
                seconds[name].append(clock() - started)
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


def beside_bare(rounds: int, clock: Callable[[], float]) -> Comparison:
    """Compare with bare layers and a bare head."""
    parts = {kind: part_step(build_part(kind, BARE), BARE) for kind in PARTS}
    steps = {"ours": our_step(OURS_BESIDE_BARE, BARE), "bare": bare_step(BARE)}
    seconds = measure(steps | parts, rounds, clock)
    kept = seconds["ours"].median - sum(seconds[part].median for part in parts)
    return Comparison(
        name="ours beside bare nn.LSTM layers; attention, norms and feed-forward taken off",
        tokens_per_step=BARE.tokens_per_step,
        seconds=seconds,
        ratio=seconds["bare"].median / kept,
        target=TARGET_OVER_BARE,
    )


def beside_example(checkout: Path, rounds: int, clock: Callable[[], float]) -> Comparison:
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
        clock,
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
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
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
        "clock": given.clock,
        "rounds": given.rounds,
        "precision": "fp32",
    }
    print(json.dumps(environment), flush=True)
    comparisons = [
        beside_bare(given.rounds, CLOCKS[given.clock]),
        beside_example(given.word_language_model, given.rounds, CLOCKS[given.clock]),
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
