"""From a run directory to the estimate that stands in it before its ranks start."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config.cluster import ClusterConfig
    from pipeline.study.execute import Launcher
    from pipeline.tracking.expectation import Expectation
    from pipeline.tracking.store import Verdict


@dataclass(frozen=True, kw_only=True)
class ExpectingLauncher:
    """A launcher whose runs are estimated first, so that their result says how far off that was."""

    launcher: "Launcher"
    cluster: "ClusterConfig"
    say: Callable[[str], None]
    """Takes one line for people."""

    def run(
        self, run_dir: Path, *, num_workers: int, stop_after_steps: int | None = None
    ) -> "Verdict":
        """Write what is expected of a training run, then run as the launcher does."""
        from pipeline.config.load import RUN_FILE
        from pipeline.errors import PipelineError
        from pipeline.tracking.expectation import ESTIMATE_FILE, write_expectation

        # What another attempt expected, on other machines, must not pass for this one's.
        try:
            (run_dir / ESTIMATE_FILE).unlink(missing_ok=True)
            if (run_dir / RUN_FILE).is_file():
                expected = expect(run_dir, self.cluster, num_workers)
                if expected is not None:
                    write_expectation(run_dir, expected)
        except (PipelineError, OSError, ValueError, ArithmeticError) as exc:
            # An estimate is beside the point of a run; pydantic's errors are values'.
            self.say(f"{run_dir.name} runs without an estimate: {exc}")
        return self.launcher.run(
            run_dir, num_workers=num_workers, stop_after_steps=stop_after_steps
        )

    def command(self, run_dir: Path, *, num_workers: int) -> list[str]:
        """Give the launcher's command."""
        return self.launcher.command(run_dir, num_workers=num_workers)


def expect(run_dir: Path, cluster: "ClusterConfig", num_workers: int) -> "Expectation | None":
    """Estimate the run of a directory.

    Args:
        run_dir: Holds `run.yaml`, which names prepared data.
        cluster: Without hardware, memory alone is estimated.
        num_workers: World size.

    Returns:
        None where this machine cannot know what the ranks compute on.

    Raises:
        PipelineError: A figure of the hardware is missing, there are more ranks than devices, or
            the data are not there.
    """
    from launch.environment import expected_accelerator
    from pipeline.config.load import read_run
    from pipeline.data.shards import load_manifest
    from pipeline.estimate.forecast import forecast, machines_of
    from pipeline.estimate.memory import memory_table, peak_bytes
    from pipeline.estimate.state import largest_state_bytes
    from pipeline.tracking.expectation import Expectation

    run, machines = read_run(run_dir), machines_of(cluster, num_workers)
    kind = expected_accelerator(cluster.launcher, cluster.accelerator)
    if machines is not None:
        kind = machines.hardware.kind
    if kind is None or run.data.prepared_dir is None:
        return None
    vocab_size = run.model.resolved_vocab_size(load_manifest(run.data.prepared_dir).vocab_size)
    step = None if machines is None else forecast(run, vocab_size, machines).step
    return Expectation(
        device=kind if machines is None else machines.hardware.device,
        kind=kind,
        family=run.model.family,
        num_ranks=num_workers,
        step_seconds=None if step is None else step.seconds,
        peak_bytes=peak_bytes(memory_table(run, vocab_size, num_workers, kind)),
        state_bytes=largest_state_bytes(run, vocab_size, num_workers),
    )
