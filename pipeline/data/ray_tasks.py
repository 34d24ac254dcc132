"""From a function and its items to results, as Ray tasks on a cluster or a local Ray."""

import os
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from pipeline.data.ray_surroundings import (
    check_answers,
    environment_set,
    python_path,
    short_directory,
    unreachable,
)
from pipeline.errors import DataError

OBJECT_STORE_BYTES = 200 << 20
"""Of a local Ray; only manifest rows travel through it."""

SUBMITTED_PER_CPU = 2
"""Tasks that Ray holds at a time: one that runs and one that waits, so that no worker does."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def ray_session(address: str | None = None, num_cpus: int | None = None) -> Iterator[None]:
    """Hold a connection to Ray: the one that is there, the cluster at an address, or a local one.

    A connection found open is left as it is. A cluster is left running. A local Ray is started
    without dashboard, log lines and tokens, is bound to loopback, and is gone afterwards together
    with its directory.

    Args:
        address: Ray address; None takes RAY_ADDRESS, and without that starts a local Ray.
        num_cpus: CPUs of a local Ray; None counts them.

    Raises:
        LaunchError: Nobody answers at the address, or what answers is no Ray of this version.
    """
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    package_root = str(Path(__file__).parents[2])
    if ray.is_initialized():
        yield
    elif address and address != "local":
        # Inside a Ray job the job's own environment brings the package, and Ray refuses a second.
        in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        runtime_env = None if in_job else {"env_vars": {"PYTHONPATH": package_root}}
        check_answers(address)
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR", runtime_env=runtime_env)
        except (ConnectionError, RuntimeError, ValueError) as exc:
            raise unreachable(address, exc) from exc
        try:
            yield
        finally:
            ray.shutdown()
    else:
        with short_directory() as directory:
            variables = {
                "RAY_AUTH_MODE": "disabled",  # else Ray writes a token into the home directory
                "RAY_USAGE_STATS_ENABLED": "0",
                "PYTHONPATH": os.pathsep.join([package_root, *python_path()]),
            }
            with environment_set(variables):
                ray.init(
                    "local",
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    object_store_memory=OBJECT_STORE_BYTES,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=directory,
                )
            try:
                yield
            finally:
                ray.shutdown()


def run_each(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    explain: Callable[[Exception], str],
) -> Iterator[Result]:
    """Run a function once for each item, one task each, and yield results as they come.

    Items and results are small: they travel through Ray, what they describe does not. More tasks
    are submitted than CPUs are there, so that a worker that ends one finds the next waiting. A task
    whose worker dies is run again. After a failure those that are submitted still run, until the
    session ends: `ray.cancel` of a task that is just ending takes this whole process down (a check
    of Ray 2.60, "Tried to complete task that was not pending").

    Args:
        function: Called in a worker; it and the items are pickled.
        items: What to call it with.
        explain: Says in a worker what went wrong, for the person who waits.

    Raises:
        DataError: A task failed; the message is the one of `explain`.
    """
    import ray
    import ray.exceptions

    def run(item: Item) -> tuple[Result | None, str | None]:
        try:
            return function(item), None
        except Exception as exc:  # Ray would hand over a traceback as text instead of this message
            return None, explain(exc)

    task = ray.remote(run)
    waiting = deque(items)
    submitted: list[ray.ObjectRef[Any]] = []
    try:
        while waiting or submitted:
            # Asked again each time: a cluster may grow, from no CPU at all.
            num_cpus = max(1, int(ray.cluster_resources().get("CPU", 0)))
            while waiting and len(submitted) < SUBMITTED_PER_CPU * num_cpus:
                submitted.append(task.remote(waiting.popleft()))
            done, submitted = ray.wait(submitted)
            for result, error in ray.get(done):
                if error is not None:
                    raise DataError(error)
                yield cast("Result", result)
    except ray.exceptions.RayError as exc:
        raise DataError(f"a data task was lost: {str(exc).splitlines()[0]}") from exc


def explain_failure(directory: Path, exc: Exception) -> str:
    """Say what went wrong in a task that writes to a directory."""
    if isinstance(exc, DataError):
        return str(exc)
    if isinstance(exc, OSError):
        return f"cannot write to {directory}: {exc.strerror or exc}"
    return f"a data task failed: {''.join(traceback.format_exception(exc))}"
