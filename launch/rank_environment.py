"""From the launching process's variables to those of ranks on other hosts, by way of a file.

DeepSpeed would put variables on the remote command line and into its log, for all to read. Here
they stand in the run directory, readable by their owner only, and only while ranks run.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "rank-environment.json"

PASSED_ON = (
    "TANDEM_", "OMP_", "GLOO_", "NCCL_", "TORCH_", "DS_", "UCX_", "FI_",
    "AWS_", "GOOGLE_", "FSSPEC_",
)  # fmt: skip
"""Prefixes of variables that ranks read: ours, threads, networks, torch, DeepSpeed's choices, and
the keys to object stores."""

SECRETS = "MLFLOW"
"""Prefix of variables that `deepspeed` would put on the remote command line and into its log."""


@contextmanager
def rank_environment_file(run_dir: Path) -> Iterator[None]:
    """Hold the file while the block runs.

    Args:
        run_dir: A directory that every host sees.
    """
    path = run_dir / FILE
    path.unlink(missing_ok=True)
    chosen = {name: value for name, value in os.environ.items() if is_passed_on(name)}
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        json.dump(chosen, stream)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def take_rank_environment(run_dir: Path) -> None:
    """Set what the launcher left for ranks; called before torch is loaded.

    What this host sets itself stays, as interfaces may have another name here. PATH is what a login
    by ssh gives, so the launcher's directories come before it: DeepSpeed looks there for a
    compiler's tools.
    """
    path = run_dir / FILE
    if not path.is_file():
        return
    for name, value in json.loads(path.read_text()).items():
        if name == "PATH":
            here = os.environ.get("PATH", "").split(os.pathsep)
            wanted = value.split(os.pathsep)
            os.environ["PATH"] = os.pathsep.join(dict.fromkeys([*wanted, *here]))
        elif is_passed_on(name):
            os.environ.setdefault(name, value)


def is_passed_on(name: str) -> bool:
    """Tell whether ranks get a variable of the launching process."""
    return name == "PATH" or name.startswith(PASSED_ON)


def environment_of_deepspeed(project_dir: Path) -> dict[str, str]:
    """Give the variables of the `deepspeed` process, which passes some on where all can read them.

    Args:
        project_dir: Where this package stands, here and on every host.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SECRETS)}
    # Reaches the hosts as well: `deepspeed` passes PYTHON* on.
    lean = str(project_dir / "launch" / "deepspeed_path")
    paths = [lean, str(project_dir), *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    return kept | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        # Its own way to pass variables on: every line of that file ends on a command line.
        "DS_ENV_FILE": os.devnull,
        # A host that asks for a password or does not answer is an error, not a wait.
        "PDSH_SSH_ARGS_APPEND": (
            f"{kept.get('PDSH_SSH_ARGS_APPEND', '')} -o BatchMode=yes -o ConnectTimeout=10".strip()
        ),
    }
