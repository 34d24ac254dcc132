"""From this machine, and the hosts and services that are named, to a list of findings."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from launch.doctor_bandwidth import IMPORT_SECONDS, judge_devices, measure_pairs
from launch.doctor_finding import Finding, Reporter
from launch.doctor_hosts import compare_hosts, examine_machines, pdsh, reach, read_hosts
from launch.doctor_link import Link, ask_all
from launch.doctor_machine import examine_machine
from launch.doctor_mlflow import examine_mlflow
from launch.doctor_network import judge_networks
from launch.doctor_ray import examine_ray
from launch.doctor_storage import examine_clocks, examine_storage
from launch.doctor_versions import COMPARED_PACKAGES, examine_versions


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to look at beyond this machine."""

    hostfile: Path | None = None
    """As `cluster.hostfile`; its hosts are asked over ssh."""
    ray_address: str | None = None
    """Dashboard or GCS of a Ray cluster."""
    tracking_uri: str | None = None
    """An MLflow store."""
    shared_dir: Path | None = None
    """Where runs are to stand; with hosts the current directory, as for a run without more."""


def examine(request: Request) -> Iterator[Finding]:
    """Look at everything that a run needs, one finding after the other; changes nothing.

    Args:
        request: What to look at beyond this machine.
    """
    yield from examine_machine()
    yield from examine_versions()
    yield from examine_hosts(request)
    yield from examine_ray(request.ray_address, os.environ)
    if request.tracking_uri is not None:
        yield from examine_mlflow(request.tracking_uri, os.environ)


def examine_hosts(request: Request) -> Iterator[Finding]:
    """Look at devices, network and storage of this machine, or of all hosts of a hostfile."""
    slots, findings = read_hosts(request.hostfile)
    yield from findings
    with ExitStack() as stack:
        links, findings = reach(list(slots), stack)
        yield from findings
        yield from pdsh(list(slots)) if slots else ()
        others = {host: link for host, link in links.items() if host is not None}
        if others:
            yield from _same_on_all(links)
            yield from examine_clocks(others)
        shared_dir = request.shared_dir or (_usual_output() if slots else None)
        if shared_dir is not None:
            yield from examine_storage(shared_dir, others)
        yield from examine_machines(others) if others else ()
        networks, errors = ask_all(links, "network", names=list(slots))
        yield from _unanswered("network", errors)
        yield from judge_networks(networks)
        of_ranks = {host: link for host, link in links.items() if host is not None or not others}
        yield from _ranks_on(of_ranks, slots, stack)


def _same_on_all(links: Mapping[str | None, Link]) -> Iterator[Finding]:
    facts, errors = ask_all(links, "facts", packages=COMPARED_PACKAGES)
    yield from _unanswered("facts", errors)
    if None in facts:
        yield from compare_hosts(facts)


def _ranks_on(
    links: Mapping[str | None, Link], slots: Mapping[str, int], stack: ExitStack
) -> Iterator[Finding]:
    """Load torch where ranks would run, and let each pair of hosts sum."""
    devices, errors = ask_all(links, "devices", seconds=IMPORT_SECONDS)
    yield from _unanswered("torch", errors)
    yield from judge_devices(devices, slots)
    ranks = [(host or "rank 0", links[host]) for host in devices]
    if len(ranks) == 1:
        # Two processes of one host, which meet on loopback as local ranks do.
        (host,) = devices
        ranks.append((f"{host} again" if host else "rank 1", stack.enter_context(Link(host))))
        ask_all(dict(ranks), "set_defaults", variables={"GLOO_SOCKET_IFNAME": "lo"})
    if ranks:
        yield from measure_pairs(ranks, on_one_host=len(devices) == 1)


def _unanswered(question: str, errors: Mapping[str | None, str]) -> Iterator[Finding]:
    for host, error in errors.items():
        advice = "mend the installation there: `pip install -e .` in the same environment"
        yield Reporter("hosts", host).fail(question, error, advice)


def _usual_output() -> Path:
    return Path(os.environ.get("TANDEM_OUTPUT") or Path.cwd())
