"""Where a run runs: launcher, ranks, threads; and the checks that need run and cluster together."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config.batching import BatchPlan, plan_batches
from pipeline.config.hardware import HardwareConfig
from pipeline.config.schema import RunConfig
from pipeline.config.section import Section
from pipeline.errors import ConfigError


class ClusterConfig(Section):
    """The machines: what changes between a laptop and a cluster while the run YAML stays."""

    launcher: Literal["local", "ray", "hostfile"] = "local"
    """Processes on this machine, Ray Train workers, or `deepspeed` over the hosts of a hostfile."""
    num_workers: int = Field(default=1, ge=1)
    """World size: number of ranks over all hosts; the largest one where `min_workers` is given."""
    min_workers: int | None = Field(default=None, ge=1)
    """Smallest world size that a run under Ray goes on with after it lost nodes, and from which it
    grows again, keeping its global batches; None waits for room for `num_workers`. Sizes over which
    the global batch does not divide are left out."""
    max_failures: int = Field(default=3, ge=1)
    """Failures in a row, without a new checkpoint between them, that end a run under Ray; 1 never
    restarts. Three tell a lost node from a fault that repeats itself. Other launchers do not
    restart: the same command goes on from the newest checkpoint."""
    wait_seconds: float = Field(default=300.0, ge=0)
    """How long a run under Ray waits for nodes that can hold it: one that starts again is back by
    then; a cloud may take longer to give one. A run that had to leave its nodes then stops and can
    be resumed; any other fails."""
    threads_per_worker: int = Field(default=1, ge=1)
    """CPU threads of one rank (OMP_NUM_THREADS); ranks x threads should not exceed the cores."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where an NVIDIA device is present; an unusable one is then an error."""
    ray_address: str | None = None
    """An existing Ray cluster; None uses the one RAY_ADDRESS names, else starts a local one."""
    hostfile: Path | None = None
    """Hosts and slots in DeepSpeed's format; hostfile launcher only."""
    placement: Literal["pack", "spread"] = "pack"
    """Whether Ray puts ranks on few nodes or on many."""
    hardware: HardwareConfig | None = None
    """What the machines can do, for `estimate`, a study's dry run and the check of memory in
    `train`; None leaves them out."""

    @model_validator(mode="after")
    def _sizes_are_ordered(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers={self.min_workers} is above num_workers={self.num_workers}; "
                f"nearest: min_workers={self.num_workers}"
            )
        return self

    @model_validator(mode="after")
    def _ranks_have_devices(self) -> Self:
        machine = self.hardware
        if machine is None or machine.kind == "cpu" or self.num_workers <= machine.num_devices:
            return self
        raise ValueError(
            f"num_workers={self.num_workers} ranks, but hardware has num_nodes={machine.num_nodes} "
            f"x devices_per_node={machine.devices_per_node}={machine.num_devices} GPUs; "
            f"nearest: num_workers={machine.num_devices}"
        )


def check_run_on_cluster(
    run: RunConfig, num_workers: int, accelerator: Literal["cpu", "cuda"]
) -> BatchPlan:
    """Refuse contradictions between a run and the machines, before any process starts.

    Args:
        run: The run.
        num_workers: World size.
        accelerator: What the ranks will compute on.

    Returns:
        The batch plan of the run at this world size.

    Raises:
        ConfigError: The global batch does not divide over the ranks, or fp16 is asked for on a CPU.
    """
    if run.precision == "fp16" and accelerator == "cpu":
        raise ConfigError(
            "precision=fp16 on a CPU is 10 to 20 times slower than fp32; nearest: bf16 or fp32"
        )
    return plan_batches(run.train, num_workers)
