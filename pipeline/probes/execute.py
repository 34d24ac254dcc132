"""From the directory of a probe cell to its result: what one rank of a probe runs."""

import datetime
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from pipeline.config.explain import validate
from pipeline.config.schema import RunConfig
from pipeline.config.tree import read_yaml
from pipeline.errors import ConfigError
from pipeline.probes import PROBES
from pipeline.probes.context import ProbeContext
from pipeline.tracking.environment import collect_environment
from pipeline.tracking.store import PROBE_FILE, ProbeResult, write_result
from pipeline.training.distributed import start_distributed, stop_distributed

Probe = Callable[[Mapping[str, RunConfig], ProbeContext], list[dict[str, Any]]]


def run_probe(run_dir: Path, accelerator: str = "auto") -> None:
    """Run the probe that `probe.yaml` names, on this rank; rank 0 writes `result.json` last.

    Args:
        run_dir: Directory of the probe cell.
        accelerator: auto, cpu or cuda.

    Raises:
        ConfigError: `probe.yaml` is missing or wrong, the probe is unknown, or its arguments are.
        DataError: The prepared text is missing.
        LaunchError: The ranks cannot find each other.
    """
    tree = read_yaml(run_dir / PROBE_FILE)
    probe = find_probe(tree["probe"])
    runs = {
        label: validate(RunConfig, fields, f"{run_dir / PROBE_FILE}: runs.{label}")
        for label, fields in tree["runs"].items()
    }
    started = datetime.datetime.now(datetime.UTC)
    ranks = start_distributed(accelerator)
    try:
        on_event = _print_line if ranks.rank == 0 else _ignore
        context = ProbeContext(
            ranks=ranks, run_dir=run_dir, params=tree["params"], on_event=on_event
        )
        records = probe(runs, context)
        if ranks.rank == 0:
            result = ProbeResult(
                run=run_dir.name,
                study=tree.get("study"),
                probe=tree["probe"],
                world_size=ranks.world_size,
                params=tree["params"],
                records=records,
                environment=collect_environment(),
                started=started,
                ended=datetime.datetime.now(datetime.UTC),
            )
            write_result(run_dir, result)
    finally:
        stop_distributed(ranks)


def find_probe(name: str) -> Probe:
    """Load a probe by its name in `PROBES`.

    Raises:
        ConfigError: No probe has this name.
    """
    if name not in PROBES:
        raise ConfigError(f"probe {name!r} is not one of {', '.join(sorted(PROBES))}")
    module, _, attribute = PROBES[name].partition(":")
    return cast(Probe, getattr(importlib.import_module(module), attribute))


def _print_line(line: str) -> None:
    print(line, flush=True)


def _ignore(line: str) -> None:
    del line
