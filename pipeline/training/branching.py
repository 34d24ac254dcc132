"""From a run that branches off another to the state it begins with: a checkpoint of its trunk.

The trunk has to be the same run up to there, so that the branch is what a run of its own from step
0 would have become: one trunk at a constant rate then gives several lengths of training, each with
a cool-down of its own (Haegele et al. 2024).
"""

from pathlib import Path
from typing import Any

from pipeline.config.load import START_FIELDS, read_run
from pipeline.config.schema import RunConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.training.checkpoint import TrainState, find_damage, open_store, take_state
from pipeline.training.checkpoint_files import checkpoint_name, read_stored_manifest
from pipeline.training.distributed import RankContext, gather_json
from pipeline.training.engine import Engine
from pipeline.training.schedule import learning_rate

OWN_FIELDS = ("total_tokens", "schedule", "automatic", "tokens_per_parameter", "filled_by_rule")
"""Fields of `train` in which a branch may differ from its trunk; the rates are compared instead."""


def first_state(
    run: RunConfig, engine: Engine, data_fingerprint: str, ranks: RankContext
) -> TrainState:
    """Give where a run without checkpoints begins; collective.

    Args:
        run: The run.
        engine: Takes the state of the trunk, if the run has one.
        data_fingerprint: Of the shards the run reads.
        ranks: This rank among the others.

    Raises:
        CheckpointError: The checkpoint of the trunk is not there, or damaged.
        ConfigError: The trunk is not the same run up to there.
    """
    if run.branch is None:
        return TrainState()
    trunk = _read_trunk(run.branch.run_dir, ranks)
    check_same_run(run, trunk, run.branch.run_dir, run.branch.step)
    store, name = open_store(run.branch.run_dir, trunk), checkpoint_name(run.branch.step)
    problems = [p for p in gather_json(find_damage(store, name, ranks), ranks) if p]
    if problems:
        raise CheckpointError(
            f"branch.run_dir={run.branch.run_dir} has no intact checkpoint of step "
            f"{run.branch.step}: {'; '.join(problems)}; train it with checkpoint.keep_steps="
            f"[{run.branch.step}], or choose another step"
        )
    manifest = read_stored_manifest(store, name)
    if manifest.data_fingerprint != data_fingerprint:
        raise ConfigError(
            f"branch.run_dir={run.branch.run_dir} was trained on data "
            f"{manifest.data_fingerprint}, this run reads {data_fingerprint}"
        )
    return take_state(engine, store, name, manifest, ranks)


def check_same_run(run: RunConfig, trunk: RunConfig, run_dir: Path, step: int) -> None:
    """Check that two runs are one up to a step.

    Args:
        run: The branch.
        trunk: What it branches from.
        run_dir: Directory of the trunk, for the message.
        step: Steps that they share.

    Raises:
        ConfigError: They differ in what decides the weights at that step; the fields are named.
    """
    mine, other = (_deciding_fields(one) for one in (run, trunk))
    keys = sorted(mine.keys() | other.keys())
    differing = [key for key in keys if mine.get(key) != other.get(key)]
    if differing:
        told = "; ".join(
            f"{key}: {mine.get(key)} here, {other.get(key)} there" for key in differing
        )
        raise ConfigError(f"branch.run_dir={run_dir} is another run before step {step}: {told}")
    for done in range(step):
        rates = [_rate(one, done) for one in (run, trunk)]
        if rates[0] != rates[1]:
            raise ConfigError(
                f"branch.run_dir={run_dir} took step {done + 1} at the learning rate "
                f"{rates[1]:.6g}, where this run would take {rates[0]:.6g}: a branch may lower the "
                f"rate only after its step {step}; check train.schedule of both, whose fractions "
                "are of all steps"
            )


def _read_trunk(run_dir: Path, ranks: RankContext) -> RunConfig:
    """Read the config of the trunk; where a rank does not see it, all of them say so."""
    trunk, problem = None, None
    try:
        trunk = read_run(run_dir)
    except ConfigError as exc:
        problem = f"rank {ranks.rank}: {exc}"
    problems = [p for p in gather_json(problem, ranks) if p]
    if problems or trunk is None:
        raise ConfigError(f"branch.run_dir={run_dir} holds no run to begin in: {problems[0]}")
    return trunk


def _rate(run: RunConfig, step: int) -> float:
    train = run.train
    return learning_rate(step, train.total_steps, train.optimizer.learning_rate, train.schedule)


def _deciding_fields(run: RunConfig) -> dict[str, Any]:
    """Give what the weights at a step follow from, without the learning rates."""
    tree = run.model_dump(mode="json")
    fields = {f"train.{key}": value for key, value in tree["train"].items()}
    fields = {key: fields[key] for key in fields if key.partition(".")[2] not in OWN_FIELDS}
    fields |= {f"model.{key}": value for key, value in tree["model"].items()}
    fields |= {
        f"guard.{key}": value for key, value in tree["guard"].items() if key not in START_FIELDS
    }
    fields |= {key: tree[key] for key in ("seed", "precision")}
    return fields | {"data.mixture": tree["data"]["mixture"]}
