"""Times steps on one rank and on two: the training loop beside a bare DeepSpeed loop.

    OMP_NUM_THREADS=1 python -m tests.bench.rank_speedup RESULT.json --families gpt --stages 0 1

Weak scaling: 8 samples of 256 tokens a rank and step, in 4 micro-batches, one thread a rank, models
of 4 layers of width 256 over 4096 tokens, in bf16 where the processor computes in it. All four
arms of a family and ZeRO stage stand ready in three processes and take a step in turns; a rank that
has no turn sleeps. Both loops have the same model, AdamW, clipping, buckets and batches.

The speed-up is that of tokens per second from one rank to two. Communication is what torch's
profiler sees of the collectives of our loop in steps of their own: the time in which one runs on
a rank, waiting for the other included, and the bytes that a rank hands to them, which between two
ranks is what it sends.
"""

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.config.batching import plan_batches
from pipeline.config.schema import RunConfig
from pipeline.data.loader import TokenLoader
from pipeline.data.shards import load_manifest
from pipeline.probes.bench import covered
from pipeline.training.distributed import start_distributed, stop_distributed
from tests.bench.interleaved import ratios, summarise, time_rounds
from tests.bench.loop_overhead import bare_deepspeed, our_loop
from tests.bench.timing import cpu_model
from tests.training.cases import write_prepared
from tests.training.rank_pool import free_port, rank_environment, start_process

WORLD_SIZES = (1, 2)
LOOPS = ("ours", "bare")
PROFILED_STEPS = 2
RANK_TOKENS = 8 * 256
FAMILIES = ("gpt", "lstm_attention")
HEADER = """\
| family, stage | ours, ms: 1 rank, 2 ranks | bare, ms: 1 rank, 2 ranks | time over bare: 1, 2 \
| speed-up: ours, bare | speed-up over bare's | collectives: ms, MB |
|---|---|---|---|---|---|---|"""


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    cells = []
    print(HEADER)
    for family in options.families:
        for stage in options.stages:
            cells.append(measure(family, stage, options.rounds))
            print(row(cells[-1]), flush=True)
    report = {
        "cpu": cpu_model(), "torch": torch.__version__, "precision": precision(), "cells": cells,
    }  # fmt: skip
    options.result.write_text(json.dumps(report, indent=2))


def measure(family: str, stage: int, num_rounds: int) -> dict[str, Any]:
    """Time a family at a ZeRO stage."""
    with TemporaryDirectory() as directory:
        root = Path(directory)
        prepared = write_prepared(root / "prepared", 200_000)
        with started(root, prepared, family, stage) as groups:
            arms = {
                f"{loop}_{size}": partial(ask, group, loop)
                for size, group in groups.items()
                for loop in LOOPS
            }
            seconds, _ = time_rounds(arms, num_rounds)
            traced = ask(groups[2], "traced")
    return {
        "family": family,
        "stage": stage,
        "seconds": {name: summarise(values) for name, values in seconds.items()},
        "time_over_bare": {
            size: ratios(seconds, f"ours_{size}", f"bare_{size}") for size in WORLD_SIZES
        },
        **speedups(seconds),
        "communication_seconds": statistics.median(t for rank in traced for t, _ in rank),
        "communication_bytes": statistics.median(n for rank in traced for _, n in rank),
    }


def speedups(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Give the speed-up of each loop by round, and that of ours over that of the bare one."""
    by_loop = {
        loop: [2.0 * one / two for one, two in zip(*columns, strict=True)]
        for loop in LOOPS
        if (columns := [seconds[f"{loop}_{size}"] for size in WORLD_SIZES])
    }
    over = [ours / bare for ours, bare in zip(by_loop["ours"], by_loop["bare"], strict=True)]
    return {
        **{f"{loop}_speedup": summarise(values) for loop, values in by_loop.items()},
        "ours_over_bare": summarise(over),
    }


def row(cell: Mapping[str, Any]) -> str:
    """Give a line of the table: medians, quartiles in brackets."""

    def shown(summary: Mapping[str, Any], scale: float = 1.0, digits: int = 2) -> str:
        middle, low, high = (
            f"{scale * value:.{digits}f}" for value in (summary["median"], *summary["quartiles"])
        )
        return f"{middle} ({low}-{high})"

    times = [
        ", ".join(shown(cell["seconds"][f"{loop}_{size}"], 1e3, 0) for size in WORLD_SIZES)
        for loop in LOOPS
    ]
    slower = ", ".join(shown(cell["time_over_bare"][size]) for size in WORLD_SIZES)
    gained = ", ".join(shown(cell[f"{loop}_speedup"]) for loop in LOOPS)
    traffic = f"{1e3 * cell['communication_seconds']:.0f}, {cell['communication_bytes'] / 1e6:.1f}"
    over = shown(cell["ours_over_bare"], digits=3)
    columns = [f"{cell['family']}, {cell['stage']}", *times, slower, gained, over, traffic]
    return f"| {' | '.join(columns)} |"


def precision() -> str:
    """Give the number format that this processor trains both families in."""
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def speedup_run(family: str, stage: int, world_size: int) -> RunConfig:
    """Give a run whose ranks have the same work at every world size."""
    batch_tokens = RANK_TOKENS * world_size
    train = {"global_batch_tokens": batch_tokens, "sequence_tokens": 256, "micro_batch_samples": 2}
    model = {"family": family, "width": 256, "depth": 4, "heads": 4, "vocab_size": 4096}
    return RunConfig.model_validate(
        {
            "model": model,
            "train": {**train, "total_tokens": 10_000 * batch_tokens},
            "zero": {"stage": stage},
            "precision": precision(),
        }
    )


@contextmanager
def started(
    root: Path, prepared: Path, family: str, stage: int
) -> Iterator[dict[int, list[Connection]]]:
    """Start the ranks of every world size, with both loops built; end them with the block."""
    groups: dict[int, list[Connection]] = {}
    processes = []
    try:
        for size in WORLD_SIZES:
            port = free_port()
            groups[size] = []
            run = speedup_run(family, stage, size)
            for rank in range(size):
                here, there = Pipe()
                environment = rank_environment(rank, size, port)
                arguments = (there, run, prepared, root / f"run-{size}")
                processes.append(start_process("cpu", serve, environment, *arguments))
                there.close()
                groups[size].append(here)
        yield groups
        for connection in (c for group in groups.values() for c in group):
            connection.send(None)
        for process in processes:
            process.join(20)
    finally:
        for process in processes:
            process.kill()
            process.join()


def ask(group: list[Connection], what: str) -> list[Any]:
    """Let all ranks of a group do something; give what each answers."""
    for connection in group:
        connection.send(what)
    return [connection.recv() for connection in group]


def serve(
    environment: Mapping[str, str],
    connection: Connection,
    run: RunConfig,
    prepared: Path,
    directory: Path,
) -> None:
    """Build both loops on one rank and take steps when told to."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    ranks = start_distributed("cpu")
    manifest = load_manifest(prepared)
    plan = plan_batches(run.train, ranks.world_size)

    def make_loader() -> TokenLoader:
        return TokenLoader(manifest, run.data.mixture, plan, ranks.rank, run.seed)

    directory.mkdir(exist_ok=True)
    ours = our_loop(run, manifest, plan, ranks, make_loader(), directory)
    loops: dict[str, Callable[[], object]] = {
        "ours": lambda: bool(ours()),
        "bare": bare_deepspeed(run, manifest, plan, ranks, make_loader()),
        "traced": lambda: [traced(ours) for _ in range(PROFILED_STEPS + 1)][1:],
    }
    while (what := connection.recv()) is not None:
        connection.send(loops[what]())
    stop_distributed(ranks)


def traced(step: Callable[[], object]) -> tuple[float, int]:
    """Give the seconds in which a collective ran in a step, and the bytes handed to collectives."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        step()
    events = [event for event in trace.events() or [] if event.name.startswith("gloo:")]
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    # All but some counters of the loop is in the format of the weights.
    width = 2 if precision() == "bf16" else 4
    num_numbers = sum(math.prod(shape) for event in events for shape in event.input_shapes if shape)
    return covered(spans) / 1e6, width * num_numbers


if __name__ == "__main__":
    main()
