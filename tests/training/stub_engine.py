"""An engine of four fixed tensors, for tests of checkpoints that need no training."""

from collections.abc import Collection
from pathlib import Path

import torch

from pipeline.config.schema import RunConfig
from pipeline.data.loader import LoaderState
from pipeline.training.checkpoint import Checkpointer, TrainState
from pipeline.training.checkpoint_store import CheckpointStore
from pipeline.training.distributed import RankContext
from pipeline.training.engine import EngineState
from pipeline.training.guard import SkippedSteps
from tests.training.cases import small_run

SIZES = {"embedding": 12, "matrix": 8, "bias": 4, "gain": 4}


class StubEngine:
    """Holds a state of fixed tensors, and remembers what it is given."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.imported: EngineState | None = None

    def export_state(self, names: Collection[str] | None = None) -> EngineState:
        kept = {k: n for k, n in SIZES.items() if names is None or k in names}
        return EngineState(
            parameters={k: torch.arange(n) * self.scale for k, n in kept.items()},
            exp_avg={k: torch.arange(n) * self.scale + 1 for k, n in kept.items()},
            exp_avg_sq={k: torch.arange(n) * self.scale + 2 for k, n in kept.items()},
            step=3,
        )

    def import_state(self, state: EngineState) -> None:
        # Read now: they are on disk, where a later save may remove them.
        self.imported = EngineState(
            parameters=dict(state.parameters),
            exp_avg=dict(state.exp_avg),
            exp_avg_sq=dict(state.exp_avg_sq),
            step=state.step,
        )


def stub_model() -> torch.nn.Module:
    model = torch.nn.Module()
    for name, size in SIZES.items():
        model.register_parameter(name, torch.nn.Parameter(torch.zeros(size)))
    return model


def checkpointer(
    ranks: RankContext,
    run_dir: Path,
    run: RunConfig | None = None,
    fingerprint: str = "data",
    store: CheckpointStore | None = None,
) -> Checkpointer:
    return Checkpointer(run_dir, run or small_run(), fingerprint, stub_model(), ranks, store)


def train_state(step: int) -> TrainState:
    return TrainState(
        step=step,
        loader=LoaderState(num_samples=8 * step),
        skipped=SkippedSteps(total=2, in_a_row=1),
        guard={"losses": [4.5, 4.25]},
        event_seq=7,
    )
