"""From a verb and a config to a job on a running Ray cluster, followed to its end."""

import asyncio
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

from launch.local import own_variables
from pipeline.data.ray_surroundings import environment_set
from pipeline.errors import ConfigError, LaunchError
from pipeline.tracking.environment import collect_environment

PROJECT_DIR = Path(__file__).resolve().parent.parent
SHIPPED = ("pipeline", "launch", "configs", "pyproject.toml")
"""What a job gets. An allow-list: Ray's own rule would ship keys, `.env` files and data as well."""

JOB_ENVIRONMENT = {
    # Ray gives a stopped job 3 seconds; a checkpoint takes longer.
    "RAY_JOB_STOP_WAIT_TIME_S": "120",
}
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def entrypoint(verb: str, config: Path, arguments: Sequence[str]) -> str:
    """Give the command that the cluster runs, the config relative to the shipped project.

    Raises:
        ConfigError: The config is missing, or outside of what is shipped.
    """
    if not config.is_file():
        raise ConfigError(f"cannot read config {config}: no such file")
    try:
        relative = config.resolve().relative_to(PROJECT_DIR)
    except ValueError:
        relative = None
    if relative is None or relative.parts[0] not in SHIPPED:
        raise ConfigError(
            f"{config} is not among the files that a job gets; put it below {PROJECT_DIR}/configs"
        )
    return shlex.join(["python", "-m", "launch", verb, str(relative), *arguments])


def submit(command: str, address: str, on_line: Callable[[str], None]) -> int:
    """Submit a job, show its output, and wait for its end.

    Args:
        command: From `entrypoint`.
        address: The cluster's dashboard, such as http://127.0.0.1:8265.
        on_line: Called with each piece of the job's output.

    Returns:
        The exit code of the job's command.

    Raises:
        LaunchError: The cluster cannot be reached or refuses, or the job was lost.
    """
    with tempfile.TemporaryDirectory() as staging:
        _stage(Path(staging))
        try:
            # Ray lets these variables overrule the address that its client is given.
            with environment_set(dict.fromkeys(ADDRESS_VARIABLES, address)):
                client = JobSubmissionClient(address)
            job = client.submit_job(
                entrypoint=command,
                runtime_env={"working_dir": staging, "env_vars": job_environment()},
            )
        except (RuntimeError, ConnectionError, ValueError) as exc:
            raise LaunchError(f"cannot submit a job to {address}: {exc}") from exc
    on_line(f"job {job}; stop it with: ray job stop --address {address} {job}\n")
    asyncio.run(_follow(client, job, on_line))
    details = client.get_job_info(job)
    if details.driver_exit_code is not None:
        return int(details.driver_exit_code)
    if details.status == JobStatus.SUCCEEDED:
        return 0
    raise LaunchError(f"job {job} ended as {details.status}: {details.message}")


def job_environment() -> dict[str, str]:
    """Give the variables of a job: what this process passes on, and the commit that is shipped."""
    # The files that a job gets are no checkout and could not tell.
    commit = collect_environment().get("git_commit")
    return JOB_ENVIRONMENT | own_variables() | ({"TANDEM_GIT_COMMIT": commit} if commit else {})


def _stage(directory: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
    for name in SHIPPED:
        source = PROJECT_DIR / name
        if source.is_dir():
            shutil.copytree(source, directory / name, ignore=ignore)
        else:
            shutil.copy2(source, directory / name)


async def _follow(client: JobSubmissionClient, job: str, on_line: Callable[[str], None]) -> None:
    async for text in client.tail_job_logs(job):
        on_line(text)
