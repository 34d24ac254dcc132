"""Times checkpoints beside a bare write + fsync and a bare read of the same bytes on the same disk.

    DS_ACCELERATOR=cpu python -m tests.bench.checkpoint_speed DIRECTORY > checkpoint.json

One rank, a state of that size in 96 tensors and three files, arms in turns. `bare_write` writes
three files of random bytes with one call each and syncs them; `save` is a whole synchronous save:
copy, check that all is finite, hash, write, sync, manifest, move, pointer, removal of the oldest.
`bare_read` reads the three files into memory that is there; `restore` is a whole restore: claim,
hash and compare, copy into the engine's tensors. Both read from the disk: the page cache is emptied
of the files first. `hash` is sha256 over the same bytes in memory, in one thread; what a save or a
restore takes without it is its time less the hash's of the same round. Then a GPT of four layers
trains with a save after every tenth step. Steps beside a save stand apart from the others; what a
run's goodput counts as `checkpoint`, in which training waits, is given as a share of each interval.
"""

import argparse
import hashlib
import json
import os
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from pipeline.config.batching import plan_batches
from pipeline.config.schema import RunConfig
from pipeline.data.loader import TokenBatch
from pipeline.models import build_model
from pipeline.training.checkpoint import Checkpointer, TrainState
from pipeline.training.checkpoint_files import list_checkpoints
from pipeline.training.distributed import RankContext, start_distributed, stop_distributed
from pipeline.training.engine import EngineState, build_engine
from pipeline.training.meters import WallClock
from tests.bench.interleaved import ratios, summarise, time_rounds
from tests.bench.timing import cpu_model

NUM_TENSORS = 32
KINDS = ("parameters", "exp_avg", "exp_avg_sq")
INTERVAL_STEPS = 10
VOCAB_SIZE = 4096


class FixedEngine:
    """Holds random tensors, which every save copies and every restore fills."""

    def __init__(self, num_bytes: int) -> None:
        size = num_bytes // (4 * NUM_TENSORS * len(KINDS))
        self.tensors = {
            kind: {f"layer{i:02d}": torch.randn(size) for i in range(NUM_TENSORS)} for kind in KINDS
        }

    def export_state(self, names: Collection[str] | None = None) -> EngineState:
        copies: dict[str, Mapping[str, torch.Tensor]] = {
            kind: {name: tensor.clone() for name, tensor in group.items()}
            for kind, group in self.tensors.items()
        }
        return EngineState(**copies, step=1)

    def import_state(self, state: EngineState) -> None:
        for kind, group in self.tensors.items():
            for name, tensor in group.items():
                tensor.copy_(getattr(state, kind)[name])


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="on the disk that is measured")
    parser.add_argument("--mebibytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--intervals", type=int, default=7)
    options = parser.parse_args()
    ranks = start_distributed("cpu")
    try:
        with TemporaryDirectory(dir=options.directory) as directory:
            report = {
                "cpu": cpu_model(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                **time_files(Path(directory), ranks, options.mebibytes << 20, options.rounds),
                "training": time_training(Path(directory) / "gpt", ranks, options.intervals),
            }
    finally:
        stop_distributed(ranks)
    print(json.dumps(report, indent=2))


def time_files(root: Path, ranks: RankContext, num_bytes: int, num_rounds: int) -> dict[str, Any]:
    """Time saves and loads of a state beside bare files of its size."""
    engine = FixedEngine(num_bytes)
    model = torch.nn.Module()
    for name, tensor in engine.tensors["parameters"].items():
        model.register_parameter(name, torch.nn.Parameter(tensor))
    run = RunConfig.model_validate({"model": {"family": "gpt"}})
    payload = np.random.default_rng(0).bytes(num_bytes // len(KINDS))
    memory = memoryview(bytearray(payload))
    run_dir, bare = root / "run", root / "bare"
    steps = iter(range(1, 1_000_000))

    def save() -> None:
        saver.save(engine, TrainState(step=next(steps)), 1)  # type: ignore[arg-type]

    def restore() -> None:
        assert saver.restore(engine, print) is not None  # type: ignore[arg-type]

    def bare_write() -> None:
        bare.mkdir()
        for kind in KINDS:
            with (bare / kind).open("wb", buffering=0) as file:
                file.write(payload)
                os.fsync(file.fileno())

    def bare_read() -> None:
        for kind in KINDS:
            with (bare / kind).open("rb", buffering=0) as file:
                assert file.readinto(memory) == len(payload)

    with Checkpointer(run_dir, run, "data", model, ranks) as saver:
        arms = {
            "bare_write": bare_write,
            "save": save,
            "hash": lambda: [hashlib.sha256(payload).digest() for _ in KINDS],
            "bare_read": bare_read,
            "restore": restore,
        }
        before = {
            "bare_write": lambda: shutil.rmtree(bare, ignore_errors=True),
            "bare_read": lambda: forget(bare),
            "restore": lambda: forget(list_checkpoints(run_dir)[0]),
        }
        save()
        bare_write()
        seconds, _ = time_rounds(arms, num_rounds, before=before)
    return {
        "state_bytes": num_bytes,
        "seconds": {name: summarise(values) for name, values in seconds.items()},
        **compare(seconds, "save", "bare_write"),
        **compare(seconds, "restore", "bare_read"),
    }


def compare(seconds: Mapping[str, list[float]], name: str, base: str) -> dict[str, Any]:
    """Give how long one takes beside the other, with and without what a hash takes."""
    rounds = zip(seconds[name], seconds["hash"], seconds[base], strict=True)
    return {
        f"{name}_over_{base}": ratios(seconds, name, base),
        f"{name}_without_hash_over_{base}": summarise([(s - h) / b for s, h, b in rounds]),
    }


def forget(directory: Path) -> None:
    """Drop files, which are on the disk, from the page cache."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def time_training(run_dir: Path, ranks: RankContext, num_intervals: int) -> dict[str, Any]:
    """Train a GPT of four layers with asynchronous saves; give what they cost by interval."""
    train = {"global_batch_tokens": 1024, "sequence_tokens": 256, "micro_batch_samples": 4}
    gpt = {"family": "gpt", "width": 256, "depth": 4, "heads": 4}
    run = RunConfig.model_validate(
        {
            "model": gpt,
            "train": {**train, "total_tokens": 1024 * 10_000},
            "checkpoint": {"every_steps": INTERVAL_STEPS},
        }
    )
    model = build_model(run.model, VOCAB_SIZE, 0)
    with Checkpointer(run_dir, run, "data", model, ranks) as saver:
        engine = build_engine(model, run, plan_batches(run.train, ranks.world_size), ranks)
        batch = made_batch()
        clock, is_saving, waited = WallClock(), False, 0.0
        intervals, blocked, whole = [], [], []
        steps: dict[bool, list[float]] = {False: [], True: []}
        begin, step = time.perf_counter(), 0
        # The first interval holds the warm-up; the last save is only waited for.
        while len(intervals) < num_intervals + 2:
            step += 1
            step_begin = time.perf_counter()
            engine.train_step([batch], 1e-4)
            steps[is_saving].append(time.perf_counter() - step_begin)
            with clock.phase("checkpoint"):
                commits = saver.advance(engine, TrainState(step=step), 1, dict)
            whole += [commit.values["seconds"] for commit in commits]
            is_saving = step % INTERVAL_STEPS == 0 or (is_saving and not commits)
            if step % INTERVAL_STEPS == 0:
                intervals.append(time.perf_counter() - begin)
                begin = time.perf_counter()
                blocked.append(clock.spent()["checkpoint"] - waited)
                waited += blocked[-1]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "interval_steps": INTERVAL_STEPS,
        "interval_seconds": summarise(intervals[1:]),
        "save_seconds": summarise(whole[1:]),
        "step_seconds": summarise(steps[False][INTERVAL_STEPS:]),
        "step_beside_a_save_seconds": summarise(steps[True]),
        "blocked_seconds": summarise(blocked[1:]),
        "blocked_fraction": summarise(
            [b / i for b, i in zip(blocked[1:], intervals[1:], strict=True)]
        ),
    }


def made_batch() -> TokenBatch:
    """Give a batch of random tokens."""
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (4, 257))
    return TokenBatch(
        inputs=tokens[:, :-1].copy(),
        labels=tokens[:, 1:].copy(),
        text_bytes=np.ones((4, 256), dtype=np.int32),
        sample_ids=np.arange(4),
    )


if __name__ == "__main__":
    main()
