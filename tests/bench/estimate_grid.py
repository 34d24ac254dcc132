"""Holds estimates against runs that no constant was set by: model state, peak memory, step time.

    OMP_NUM_THREADS=1 python -m tests.bench.estimate_grid CLUSTER.yaml RESULT.json

CLUSTER.yaml comes from `bench --machine`. Each cell is a run of its own as `train` starts it: both
families, two sizes, ZeRO 0 to 3, one rank and two, one thread a rank. The estimate is written
before the ranks start; measured are the median step after warm-up, the peak resident size of the
rank that has most, from the start of the run to its result, and the bytes of its model state.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from launch import build_launcher
from launch.expecting import ExpectingLauncher
from launch.stopping import StopRequest
from pipeline.config.cluster import ClusterConfig
from pipeline.config.load import load_cluster
from pipeline.config.schema import RunConfig
from pipeline.tracking.expectation import QUANTITIES, error_name
from pipeline.tracking.store import read_result
from tests.bench.timing import cpu_model
from tests.training.cases import write_prepared, write_run

FAMILIES = ("gpt", "lstm_attention")
SIZES: dict[str, dict[str, Any]] = {
    "small": {"width": 192, "depth": 5, "heads": 6, "vocab_size": 3000, "batch": (4, 160)},
    "large": {"width": 448, "depth": 7, "heads": 7, "vocab_size": 6000, "batch": (2, 96)},
}
"""Held out: what `bench --machine` measures has none of these widths, lengths and vocabularies."""
ACCUMULATION_STEPS = 2
NUM_STEPS = 9
"""Three of them warm up."""
MIB = 2.0**20
HEADER = """\
| family, size, ZeRO, ranks | step, ms: measured, predicted, error \
| peak, MiB: measured, predicted, error | state, bytes: measured, error |
|---|---|---|---|"""


def main() -> None:
    """Run the grid, print its table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cluster", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    options = parser.parse_args()
    cluster = load_cluster(options.cluster)
    cells = []
    print(HEADER)
    with TemporaryDirectory() as directory:
        prepared = write_prepared(Path(directory) / "prepared", 100_000)
        for cell in every_cell(options.families, options.sizes, options.stages, options.ranks):
            cells.append(cell | measure(cell, cluster, prepared))
            print(row(cells[-1]), flush=True)
            report = {"cpu": cpu_model(), "cells": cells, "summary": summarise(cells)}
            options.result.write_text(json.dumps(report, indent=2))
    for line in summary_lines(cells):
        print(line)


def every_cell(
    families: Sequence[str], sizes: Sequence[str], stages: Sequence[int], ranks: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Give the cells in the order in which they run."""
    for family in families:
        for size in sizes:
            for num_ranks in ranks:
                for stage in stages:
                    yield {"family": family, "size": size, "stage": stage, "ranks": num_ranks}


def cell_run(cell: dict[str, Any]) -> RunConfig:
    """Give the run of a cell, in which each rank has the same work at every world size."""
    model = {"family": cell["family"], **SIZES[cell["size"]]}
    micro, length = model.pop("batch")
    batch_tokens = micro * length * ACCUMULATION_STEPS * cell["ranks"]
    return RunConfig.model_validate(
        {
            "name": "cell",
            "model": model,
            "train": {
                "sequence_tokens": length,
                "micro_batch_samples": micro,
                "global_batch_tokens": batch_tokens,
                "total_tokens": NUM_STEPS * batch_tokens,
            },
            "zero": {"stage": cell["stage"]},
            "eval": {"max_tokens": micro * length * cell["ranks"]},
        }
    )


def measure(cell: dict[str, Any], cluster: ClusterConfig, prepared: Path) -> dict[str, Any]:
    """Run a cell and give measured and expected values by quantity."""
    run_dir = write_run(prepared.parent / "cell", prepared, cell_run(cell))
    stop = StopRequest(print)
    launcher = ExpectingLauncher(launcher=build_launcher(cluster, stop), cluster=cluster, say=print)
    launcher.run(run_dir, num_workers=cell["ranks"])
    metrics = {name: metric.value for name, metric in read_result(run_dir).metrics.items()}
    shutil.rmtree(run_dir)
    return {
        quantity: {
            "measured": metrics[name],
            "predicted": metrics[f"estimate/{field}"],
            "error": metrics[error_name(quantity)],
        }
        for quantity, (field, name) in QUANTITIES.items()
    } | {
        "parts": {
            part: metrics[f"perf/{part}_seconds"] for part in ("forward", "backward", "optimizer")
        }
    }


def row(cell: dict[str, Any]) -> str:
    """Give a line of the table."""
    step, peak, state = (cell[quantity] for quantity in ("step", "peak", "state"))
    return (
        f"| {cell['family']}, {cell['size']}, {cell['stage']}, {cell['ranks']} "
        f"| {1e3 * step['measured']:,.0f}, {1e3 * step['predicted']:,.0f}, {step['error']:+.0%} "
        f"| {peak['measured'] / MIB:,.0f}, {peak['predicted'] / MIB:,.0f}, {peak['error']:+.1%} "
        f"| {state['measured']:,.0f}, {state['error']:+.2%} |"
    )


def summarise(cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Give median and largest absolute error by quantity."""
    return {
        quantity: {
            "median": statistics.median(abs(cell[quantity]["error"]) for cell in cells),
            "largest": max(abs(cell[quantity]["error"]) for cell in cells),
        }
        for quantity in QUANTITIES
    }


def summary_lines(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Say the same in words."""
    return [
        f"{quantity}: median error {found['median']:.1%}, largest {found['largest']:.1%}, "
        f"{len(cells)} cells"
        for quantity, found in summarise(cells).items()
    ]


if __name__ == "__main__":
    main()
