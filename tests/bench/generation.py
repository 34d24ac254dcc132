"""Time of a generated token against the context, and the bytes of state that hold it.

    OMP_NUM_THREADS=2 python -m tests.bench.generation --json

Batch 1, fp32. A context of random tokens is read into the cache, then tokens follow one by one.
The arms take turns in one process; times are medians over tokens and repeats. The exit code is 1
where the LSTM without attention or with a window is not constant, or another arm grows faster than
the context.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pipeline.config.gpt import GptConfig
from pipeline.config.lstm import LstmConfig
from pipeline.config.model import ModelConfig
from pipeline.models import build_model
from pipeline.models.base import LanguageModel
from tests.bench.timing import Spread

VOCAB_SIZE = 4096
CONTEXTS = (256, 512, 1024, 2048, 4096)
NUM_TOKENS = 24
"""Timed tokens of a repeat; they lengthen the context by under a tenth of the shortest."""
NUM_WARM_UP = 4
WINDOW_TOKENS = 128
CONSTANT_LIMIT = 1.25
"""Most that the longest context may cost over the shortest where time is to be constant."""
LINEAR_LIMIT = 1.25
"""Most that time may grow over growth in step with the context."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model."""

    name: str
    config: ModelConfig
    is_constant: bool
    """Whether time and state are to be independent of the context."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One arm at one context."""

    arm: str
    context_tokens: int
    token_seconds: Spread
    state_bytes: int
    repeats: int


def main() -> None:
    """Measure, show, and judge; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    arms = build_arms(given.width, given.depth, max(given.contexts) + NUM_WARM_UP + NUM_TOKENS)
    points = measure(arms, given.contexts, given.repeats)
    complaints = judge(arms, points)
    report: dict[str, Any] = {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "width": given.width,
        "depth": given.depth,
        "vocab_size": VOCAB_SIZE,
        "points": [asdict(point) for point in points],
        "complaints": complaints,
    }
    lines = [table_line(point) for point in points] + complaints
    print(json.dumps(report, indent=1) if given.json else "\n".join(lines))
    sys.exit(1 if complaints else 0)


def build_arms(width: int, depth: int, max_positions: int) -> list[Arm]:
    """Give the models: both families, the LSTM with no, windowed and full attention."""
    shape: dict[str, Any] = {
        "width": width, "depth": depth, "heads": width // 64, "max_positions": max_positions,
    }  # fmt: skip
    return [
        Arm(name="lstm", config=LstmConfig(**shape, attention="none"), is_constant=True),
        Arm(
            name=f"lstm, window {WINDOW_TOKENS}",
            config=LstmConfig(**shape, window_tokens=WINDOW_TOKENS),
            is_constant=True,
        ),
        Arm(name="lstm, full attention", config=LstmConfig(**shape), is_constant=False),
        Arm(name="gpt", config=GptConfig(**shape), is_constant=False),
    ]


def measure(arms: Sequence[Arm], contexts: Sequence[int], repeats: int) -> list[Point]:
    """Time every arm at every context, the arms in turn within each repeat."""
    models = {arm.name: build_model(arm.config, VOCAB_SIZE, seed=0).eval() for arm in arms}
    points = []
    for context in contexts:
        seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
        state_bytes: dict[str, int] = {}
        for repeat in range(repeats):
            for arm in arms:
                timed, num_bytes = time_tokens(models[arm.name], context, seed=repeat)
                seconds[arm.name] += timed
                state_bytes[arm.name] = num_bytes
        points += [
            Point(
                arm=arm.name,
                context_tokens=context,
                token_seconds=Spread.of(seconds[arm.name]),
                state_bytes=state_bytes[arm.name],
                repeats=len(seconds[arm.name]),
            )
            for arm in arms
        ]
    return points


@torch.inference_mode()
def time_tokens(model: LanguageModel, context: int, seed: int) -> tuple[list[float], int]:
    """Give the seconds of each token behind a context, and the bytes of the state before them."""
    generator = torch.Generator().manual_seed(seed)
    cache = model.start(1)
    num_new = NUM_WARM_UP + NUM_TOKENS
    tokens_BT = torch.randint(0, VOCAB_SIZE, (1, context + num_new), generator=generator)
    model.extend(tokens_BT[:, :context], cache)
    state_bytes = cache.num_bytes
    seconds = []
    for index in range(context, context + num_new):
        started = time.perf_counter()
        model.extend(tokens_BT[:, index : index + 1], cache)
        seconds.append(time.perf_counter() - started)
    return seconds[NUM_WARM_UP:], state_bytes


def judge(arms: Sequence[Arm], points: Sequence[Point]) -> list[str]:
    """Say which arm grows faster with the context than it may."""
    complaints = []
    for arm in arms:
        own = [point for point in points if point.arm == arm.name]
        first, last = own[0], own[-1]
        growth = last.token_seconds.median / first.token_seconds.median
        contexts = last.context_tokens / first.context_tokens
        limit = CONSTANT_LIMIT if arm.is_constant else LINEAR_LIMIT * contexts
        if growth > limit:
            complaints.append(
                f"{arm.name}: {contexts:g} times the context takes {growth:.2f} times as long; "
                f"allowed {limit:g}"
            )
        if arm.is_constant and last.state_bytes > first.state_bytes:
            complaints.append(f"{arm.name}: the state grows with the context")
    return complaints


def table_line(point: Point) -> str:
    """Give one point for a person."""
    time_ms = point.token_seconds
    return (
        f"{point.arm:22} context {point.context_tokens:6,}  "
        f"{time_ms.median * 1e3:7.2f} ms a token ({time_ms.min * 1e3:.2f} to "
        f"{time_ms.max * 1e3:.2f})  state {point.state_bytes / 2**10:9,.0f} KiB"
    )


if __name__ == "__main__":
    main()
