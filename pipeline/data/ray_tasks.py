"""From a function and its items to results, as Ray Data tasks on a cluster or a local Ray."""

import logging
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

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

    Items and results are small: they travel through Ray, what they describe does not.

    Args:
        function: Called in a worker; it and the items are pickled.
        items: What to call it with.
        explain: Says in a worker what went wrong, for the person who waits.

    Raises:
        DataError: A task failed; the message is the one of `explain`.
    """
    import ray.data
    import ray.exceptions

    def run(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"result": function(row["item"]), "error": None}
        except Exception as exc:  # Ray would hand over a traceback as text instead of this message
            return {"result": None, "error": explain(exc)}

    rows = [{"item": item} for item in items]
    if not rows:
        return
    try:
        with _quiet_ray_data():
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(run)
            for row in dataset.iter_rows():
                if row["error"] is not None:
                    raise DataError(row["error"])
                yield row["result"]
    except ray.exceptions.RayError as exc:
        raise DataError(f"a data task was lost: {str(exc).splitlines()[0]}") from exc


def explain_failure(directory: Path, exc: Exception) -> str:
    """Say what went wrong in a task that writes to a directory."""
    if isinstance(exc, DataError):
        return str(exc)
    if isinstance(exc, OSError):
        return f"cannot write to {directory}: {exc.strerror or exc}"
    return f"a data task failed: {''.join(traceback.format_exception(exc))}"


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    from ray.data import DataContext

    context = DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    context.enable_progress_bars = context.print_on_execution_start = False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before
        logger.setLevel(level)
