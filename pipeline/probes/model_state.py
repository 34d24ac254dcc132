"""How many bytes of parameters, gradients and optimizer state a rank holds at each ZeRO stage."""

import gc
from collections.abc import Mapping
from typing import Any

from pipeline.config.batching import plan_batches
from pipeline.config.schema import RunConfig
from pipeline.data.loader import TokenLoader
from pipeline.probes.context import ProbeContext
from pipeline.probes.params import ModelStateParams, at_stage
from pipeline.tracking.store import PROBE_FILE
from pipeline.training.distributed import gather_json
from pipeline.training.engine import build_engine
from pipeline.training.train import build_run_model, load_prepared


def run(runs: Mapping[str, RunConfig], context: ProbeContext) -> list[dict[str, Any]]:
    """Measure model state from the engine's own tensors, after one optimizer step.

    Args:
        runs: Label of a family to its run.
        context: Rank group and arguments.

    Returns:
        One record for each family, stage and rank: `label`, `zero_stage`, `rank`, `num_parameters`
        and `parameter_bytes`, `gradient_bytes`, `optimizer_bytes` of that rank.

    Raises:
        ConfigError: A stage does not exist, or batches do not divide over the ranks.
    """
    params = context.parse_params(ModelStateParams)
    records = []
    for label, base in runs.items():
        for stage in params.stages:
            context.on_event(f"measure {label} at ZeRO stage {stage}")
            run = at_stage(base, stage)
            records += [{"label": label, **record} for record in _measure(run, context)]
            # An engine holds cycles; the next one must not stand beside it.
            gc.collect()
    return records


def _measure(run: RunConfig, context: ProbeContext) -> list[dict[str, Any]]:
    ranks = context.ranks
    manifest = load_prepared(run, context.run_dir / PROBE_FILE)
    model = build_run_model(run, manifest)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    plan = plan_batches(run.train, ranks.world_size)
    engine = build_engine(model, run, plan, ranks)
    loader = TokenLoader(manifest, run.data.mixture, plan, ranks.rank, run.seed)
    engine.train_step(loader.next_step(), run.train.optimizer.learning_rate)
    state = engine.state_bytes()
    measured = {
        "parameter_bytes": state.parameters,
        "gradient_bytes": state.gradients,
        "optimizer_bytes": state.optimizer,
    }
    return [
        {"zero_stage": run.zero.stage, "rank": rank, "num_parameters": num_parameters, **values}
        for rank, values in enumerate(gather_json(measured, ranks))
    ]
