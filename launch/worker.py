"""What one rank runs: a run directory in, result.json or stopped.json out.

`python -m launch.worker --run DIR` is the entry that every launcher ends in; who the rank is comes
from RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* in the environment.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from launch.environment import base_environment, detect_accelerator
from launch.rank_environment import take_rank_environment
from launch.rank_record import recorded
from pipeline.config.load import read_run
from pipeline.errors import PipelineError


def run_rank(run_dir: Path, stop_after_steps: int | None = None) -> None:
    """Train the run, or measure the probe, that a directory describes; called on every rank.

    Args:
        run_dir: Holds `run.yaml` (a training run) or `probe.yaml` (a probe cell); absolute.
        stop_after_steps: Stop with a checkpoint once this many optimizer steps are done.

    Raises:
        PipelineError: The run cannot start or go on; the message says why.
    """
    if (run_dir / "probe.yaml").is_file():
        from pipeline.probes.execute import run_probe

        run_probe(run_dir)
    else:
        from launch.rank_watch import watched
        from pipeline.data.staging import stage
        from pipeline.training.phases import enter
        from pipeline.training.train import train

        stage(read_run(run_dir).data)
        with watched(run_dir):
            train(run_dir, stop_after_steps)
            enter("exit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank from the command line.

    Args:
        arguments: Command line without the program; None takes the process's own.

    Returns:
        Exit code: 0 done or stopped, 1 failed, 2 wrong config.
    """
    parser = argparse.ArgumentParser(prog="launch.worker", description="Run one rank of a run.")
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--stop-after-steps", type=int, help="stop with a checkpoint at this step")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="given by deepspeed; unused")
    parser.add_argument("--threads", type=int, help="CPU threads of a rank; default: 1")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "cuda"], default="auto")
    options = parser.parse_args(arguments)
    run_dir = options.run.absolute()
    take_rank_environment(run_dir)
    set_environment(options.accelerator, options.threads)
    try:
        with recorded(run_dir, int(os.environ.get("RANK", "0"))):
            run_rank(run_dir, options.stop_after_steps)
    except PipelineError as exc:
        print(f"{exc.kind}: {exc}", file=sys.stderr, flush=True)
        return exc.exit_code
    return 0


def set_environment(accelerator: Literal["auto", "cpu", "cuda"], threads: int | None) -> None:
    """Set what torch and DeepSpeed read when they are loaded.

    Variables that are set already stay, unless an argument states otherwise.

    Args:
        accelerator: What to compute on; auto takes what is there.
        threads: CPU threads of this rank; None takes OMP_NUM_THREADS, else 1.
    """
    stated = {"OMP_NUM_THREADS"} if threads is not None else set()
    if accelerator != "auto":
        stated |= {"DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"}
    for name, value in base_environment(detect_accelerator(accelerator), threads or 1).items():
        if name in stated or name not in os.environ:
            os.environ[name] = value


def exit_at_once(arguments: Sequence[str] | None = None) -> None:
    """Run one rank and leave the process without waiting for its peers.

    A rank that failed must be gone at once: its closed sockets are what its peers notice, and
    tearing down a process group whose other side waits in a collective can take minutes.
    """
    try:
        code = main(arguments)
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    exit_at_once()
