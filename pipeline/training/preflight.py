"""Before the first step: whether all ranks have the same config, code, packages and data.

Ranks that differ in any of these train something that nobody asked for, and nothing else would say
so: the collectives work all the same.
"""

import hashlib
import importlib.metadata
import json
import platform
import socket
import sys
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.errors import LaunchError
from pipeline.tracking.environment import source_hashes
from pipeline.training.distributed import RankContext, gather_json

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors")
"""What computes or stores numbers."""
LOCAL_FIELDS = ("output_dir", "data.output_dir", "data.prepared_dir")
"""Config fields that name a place, which may differ from host to host."""
SHOWN_DIFFERENCES = 10
SHOWN_DIGITS = 12


def check_same_on_all_ranks(run: RunConfig, data_fingerprint: str, ranks: RankContext) -> list[str]:
    """Compare this rank's facts with those of the others; collective.

    Args:
        run: The config that this rank has read.
        data_fingerprint: Of the shards that it sees.
        ranks: This rank among the others.

    Returns:
        The differences, where the config of every rank allows them; none otherwise.

    Raises:
        LaunchError: The ranks differ; each key is named with its values, ranks and hosts.
    """
    facts = collect_facts(run, data_fingerprint)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if len(set(gather_json(digest, ranks))) == 1:
        return []
    gathered = gather_json({"host": socket.gethostname(), "facts": facts}, ranks)
    differences = list_differences([g["facts"] for g in gathered], [g["host"] for g in gathered])
    if all(g["facts"]["config.guard.allow_mismatch"] == "True" for g in gathered):
        return differences
    shown = "\n".join(f"  {line}" for line in differences[:SHOWN_DIFFERENCES])
    left = len(differences) - SHOWN_DIFFERENCES
    more = f"\n  and {left} more" if left > 0 else ""
    raise LaunchError(
        f"the ranks differ, so no step was taken:\n{shown}{more}\n"
        "Give every host the same run.yaml, code, packages and data; guard.allow_mismatch=true "
        "starts in spite of it and records the differences"
    )


def collect_facts(run: RunConfig, data_fingerprint: str) -> dict[str, str]:
    """Give what must not differ between ranks, as flat names and text."""
    config = _flatten(run.model_dump(mode="json"), "")
    facts = {f"config.{k}": str(v) for k, v in config.items() if k not in LOCAL_FIELDS}
    facts |= {f"code.{name}": digest[:SHOWN_DIGITS] for name, digest in source_hashes().items()}
    facts |= {f"package.{name}": _version(name) for name in PACKAGES}
    facts |= {
        "python": platform.python_version(),
        "byte_order": sys.byteorder,
        "data.fingerprint": data_fingerprint,
    }
    return facts


def list_differences(facts: list[dict[str, str]], hosts: list[str]) -> list[str]:
    """List the keys whose values differ, each with its values and who has them.

    Args:
        facts: Of every rank, in rank order.
        hosts: Name of every rank's host.
    """
    lines = []
    for key in sorted({key for own in facts for key in own}):
        owners: dict[str, list[str]] = {}
        for rank, own in enumerate(facts):
            value = own.get(key, "absent")
            owners.setdefault(value, []).append(f"rank {rank} on {hosts[rank]}")
        if len(owners) > 1:
            told = "; ".join(f"{value} ({_shorten(who)})" for value, who in owners.items())
            lines.append(f"{key}: {told}")
    return lines


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _flatten(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
