"""From a run directory to a trained model and its result: what every rank of a run does."""

from pathlib import Path

from pipeline.config.cluster import check_run_on_cluster
from pipeline.config.load import RUN_FILE, read_run
from pipeline.config.schema import RunConfig
from pipeline.data.loader import TokenLoader
from pipeline.data.shards import ShardManifest, ShardSet, load_manifest
from pipeline.errors import DataError
from pipeline.models import build_model
from pipeline.models.base import LanguageModel
from pipeline.models.documents import DocumentRule
from pipeline.models.execution import set_execution
from pipeline.tracking.store import RunResult
from pipeline.training.checkpoint import Checkpointer
from pipeline.training.device import device_kind, peak_bytes, peak_flops, reset_peak_memory
from pipeline.training.distributed import RankContext, start_distributed, stop_distributed
from pipeline.training.engine import build_engine
from pipeline.training.evaluation import build_evaluator
from pipeline.training.journal import Journal
from pipeline.training.loop import fit
from pipeline.training.memory import explaining_memory
from pipeline.training.meters import StepMeter, WallClock
from pipeline.training.preflight import check_same_on_all_ranks
from pipeline.training.profiling import StepProfiler
from pipeline.training.randomness import seed_dropout
from pipeline.training.result import begin, end_early, finish, finished_result
from pipeline.training.session import Training, save
from pipeline.training.stopping import StopWatch


def train(run_dir: Path, stop_after_steps: int | None = None) -> RunResult | None:
    """Train the run of a directory from its start or its newest checkpoint; called on every rank.

    Args:
        run_dir: Holds `run.yaml`; takes events, checkpoints and the result.
        stop_after_steps: Stop with a checkpoint once this many steps of the run are done.

    Returns:
        What `result.json` holds; None if the ranks agreed to stop before the end.

    Raises:
        ConfigError: The config contradicts itself, the device, or what the directory holds.
        DataError: The shards are not prepared, or too small.
        CheckpointError: A checkpoint cannot be written, or none of those there is intact.
        TrainingDiverged: Too many steps in a row were not finite, or a spike ends the run.
        LaunchError: The process group or the device cannot be used, ranks differ, memory ran out,
            or too many attempts before this one made no progress.
    """
    run = read_run(run_dir)
    if (result := finished_result(run_dir, run)) is not None:
        return result
    clock = WallClock()
    ranks = start_distributed()
    try:
        clock.include_process_start(ranks)
        with (
            # Ranks get a signal one by one, so the watch holds until all have saved.
            StopWatch(run_dir, ranks.rank, stop_after_steps) as stop,
            explaining_memory(ranks.rank, run, lambda: peak_bytes(ranks.device)),
        ):
            return _train(run_dir, run, ranks, clock, stop)
    finally:
        stop_distributed(ranks)


def _train(
    run_dir: Path, run: RunConfig, ranks: RankContext, clock: WallClock, stop: StopWatch
) -> RunResult | None:
    """Build everything, train, and write how it ended."""
    resident_bytes = reset_peak_memory(ranks.device)
    manifest = load_prepared(run, run_dir / RUN_FILE)
    mismatches = check_same_on_all_ranks(run, manifest.fingerprint, ranks)
    plan = check_run_on_cluster(run, ranks.world_size, device_kind(ranks.device))
    loader = TokenLoader(manifest, run.data.mixture, plan, ranks.rank, run.seed)
    evaluator = build_evaluator(run, ShardSet(manifest, "validation"), ranks)
    model = build_run_model(run, manifest)
    checkpointer = Checkpointer(run_dir, run, manifest.fingerprint, model, ranks)
    checkpointer.check_space()
    engine = build_engine(model, run, plan, ranks)
    seed_dropout(run.seed, ranks)
    vocab_size = run.model.resolved_vocab_size(manifest.vocab_size)
    flops_per_token = run.model.flops_per_token(vocab_size, run.train.sequence_tokens)
    meter = StepMeter(ranks.world_size, flops_per_token, peak_flops(ranks.device, run.precision))
    with (
        checkpointer,
        Journal(run_dir, run, ranks) as journal,
        StepProfiler(run_dir, run.profile.first_and_last, ranks) as profiler,
    ):
        training = Training(
            run=run, ranks=ranks, engine=engine, loader=loader, evaluator=evaluator,
            checkpointer=checkpointer, journal=journal, meter=meter, clock=clock,
            profiler=profiler, flops_per_token=flops_per_token,
        )  # fmt: skip
        facts = {
            "data_fingerprint": manifest.fingerprint,
            "resident_bytes_before": resident_bytes,
            "mismatches": mismatches,
        }
        state = begin(run_dir, training, facts)
        state, reason = fit(training, state, stop)
        save(training, state)
        if reason is not None:
            end_early(run_dir, training, state, reason)
            return None
        return finish(run_dir, training, state, manifest, stop)


def build_run_model(run: RunConfig, manifest: ShardManifest) -> LanguageModel:
    """Build the model of a run, which keeps within documents what the run says.

    Its blocks compute again or are compiled where the run says so.
    """
    rule = DocumentRule(
        end_of_document_id=manifest.end_of_document_id, switches=run.train.documents
    )
    model = build_model(run.model, manifest.vocab_size, run.seed, rule)
    set_execution(model, run.train)
    return model


def load_prepared(run: RunConfig, origin: Path) -> ShardManifest:
    """Load the manifest of the shards that a resolved run names.

    Args:
        run: The run.
        origin: The file it stands in.

    Raises:
        DataError: The run names none, or they are not there; the message has the command to run.
    """
    if run.data.prepared_dir is None:
        raise DataError(
            f"{origin} names no prepared data: run `python -m launch prepare RUN` "
            "and set data.prepared_dir to the directory it prints"
        )
    return load_manifest(run.data.prepared_dir)
