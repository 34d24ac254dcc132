"""Isolates a test session from the machine, and fails it when a process of ours outlives it.

Processes that tests start inherit a HOME below one fresh directory; leftovers are found by it.
"""

import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import pytest
import yaml

FIXED = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # A local ray.init would otherwise write a token that later clusters demand and clients lack.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_enable_metrics_collection": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}
# At once, because a directory's conftest may load torch, which then counts the threads it may use.
os.environ.update(FIXED)
REMOVED = ("TANDEM_", "RAY_ADDRESS", "RAY_JOB_", "MLFLOW_TRACKING_", "MASTER_")
REMOVED_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
STOPS_BY_ITSELF = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")
"""Direct children of the test process that end with it; what they fork does not count as these."""

ON_REQUEST = ("gpu", "medium", "bench", "long")
"""Markers whose tests run only when `-m` names them, whatever else it says."""

ROOT = pytest.StashKey[Path]()
NAMESPACE_PROGRAMS = ("ip", "nsenter", "unshare", "setpriv", "mount", "pdsh", "ssh", "ssh-keygen")
"""What tests on several hosts need, beside root."""

LONGEST_FIRST = ("hosts", "e2e", "training", "chaos", "data", "launch", "contracts")
"""Directories in the order in which workers take them, so that both end together; others follow."""

LEFT_OUT = pytest.StashKey[dict[str, int]]()
"""Why tests are left out, to their number."""


def pytest_configure(config: pytest.Config) -> None:
    # Short, because Ray puts Unix sockets below TMPDIR and their paths end at 107 characters.
    root = Path(tempfile.mkdtemp(prefix="td-", dir="/tmp"))
    config.stash[ROOT] = root
    for name in list(os.environ):
        if name.startswith(REMOVED) or name in REMOVED_RANK:
            del os.environ[name]
    places = {
        "HOME": root / "home",
        "TMPDIR": root,
        "XDG_CACHE_HOME": root / "home" / ".cache",
        "HF_HOME": root / "home" / "huggingface",
        "TORCH_EXTENSIONS_DIR": root / "torch_extensions",
    }
    (root / "home").mkdir()
    os.environ.update({name: str(place) for name, place in places.items()})
    tempfile.tempdir = None
    # After multiprocessing has removed its own directory (priority -100), which stands below.
    Finalize(None, shutil.rmtree, args=(root,), kwargs={"ignore_errors": True}, exitpriority=-200)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = set(re.findall(r"\w+", config.option.markexpr))
    left_out = set(ON_REQUEST) - named
    dropped = [item for item in items if left_out & {mark.name for mark in item.iter_markers()}]
    lacking = config.stash.setdefault(LEFT_OUT, {})
    for item in items:
        if item not in dropped and (reason := reason_to_leave_out(item)) is not None:
            lacking[reason] = lacking.get(reason, 0) + 1
            dropped.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
    rank = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.parent.name, len(rank)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    # Every worker collects all tests, so that one speaks for all.
    if left_out := getattr(node, "workeroutput", {}).get("left_out"):
        node.config.stash[LEFT_OUT] = left_out


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each directory to one worker, because its tests share ranks, clusters and runs."""
    from xdist.scheduler import LoadScopeScheduling

    class ByDirectory(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0].rpartition("/")[0]

    return ByDirectory(config, log)


def reason_to_leave_out(item: pytest.Item) -> str | None:
    """Say what a test needs and this machine lacks; in CI every test has to run."""
    if os.environ.get("CI") == "true":
        return None
    needed = [program for mark in item.iter_markers("needs_program") for program in mark.args]
    if item.get_closest_marker("mounts") is not None and os.geteuid() != 0:
        return "only root mounts filesystems"
    if item.get_closest_marker("netns") is not None:
        if os.geteuid() != 0:
            return "only root makes network namespaces"
        needed += NAMESPACE_PROGRAMS
    missing = next((program for program in needed if shutil.which(program) is None), None)
    return None if missing is None else f"{missing} is not installed"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for reason, number in config.stash.get(LEFT_OUT, {}).items():
        terminalreporter.write_line(f"{number} tests left out: {reason}")


@pytest.fixture(scope="session")
def tiny_run(pytestconfig: pytest.Config) -> Path:
    """A run YAML that two ranks finish in seconds; whoever prepares its text, others reuse it."""
    root = pytestconfig.stash[ROOT] / "tiny"
    path = root / "tiny.yaml"
    if path.exists():
        return path
    root.mkdir()
    words = ["sun", "moon", "river", "stone", "light", "dark", "old", "new", "runs", "falls"]
    choose = random.Random(0)
    with (root / "text.jsonl").open("w") as stream:
        for number in range(60):
            text = " ".join(choose.choices(words, k=60))
            stream.write(json.dumps({"id": f"document-{number}", "text": text}) + "\n")
    run = {
        "name": "tiny",
        "output_dir": str(root / "runs"),
        "data": {
            "source": {"kind": "jsonl", "path": str(root / "text.jsonl")},
            "tokenizer": {"vocab_size": 300},
            "validation_fraction": 0.2,
        },
        "model": {"family": "gpt", "width": 16, "depth": 1, "heads": 2, "max_positions": 64},
        "train": {
            "global_batch_tokens": 128,
            "sequence_tokens": 32,
            "micro_batch_samples": 2,
            "total_tokens": 768,
        },
        "eval": {"every_steps": None},
        "tracking": {"log_every_steps": 1},
    }
    path.write_text(yaml.safe_dump(run))
    return path


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store; making its tables takes seconds, copying it does not."""
    from pipeline.tracking.mlflow_client import connected, default_uri

    output_dir = tmp_path_factory.mktemp("store")
    with connected(default_uri(output_dir), print) as client:
        client.search_experiments()
    return output_dir / "mlflow.db"


@pytest.fixture(scope="session", autouse=True)
def _no_process_is_left(pytestconfig: pytest.Config) -> Iterator[None]:
    root = pytestconfig.stash[ROOT]
    yield
    deadline = time.monotonic() + 10
    while (left := processes_of(root)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    assert not left, f"processes outlived the tests that started them: {left}"


def processes_of(root: Path) -> dict[int, str]:
    """Find live processes whose environment names the session's directory: pid to command."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        try:
            environment = (entry / "environ").read_bytes()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        own_child = parent == os.getpid() and any(name in command for name in STOPS_BY_ITSELF)
        if command and pid != os.getpid() and f"={root}".encode() in environment and not own_child:
            found[pid] = command[:200]
    return found


@pytest.fixture(scope="session")
def s3_variables() -> Iterator[dict[str, str]]:
    """Start an S3 server on loopback; give the environment by which clients find it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()
