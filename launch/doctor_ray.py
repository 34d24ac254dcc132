"""From a Ray address to findings: token, version, nodes, resources, room for objects.

Everything is asked over the dashboard's HTTP API, so that Ray itself is not loaded; only the
dashboard's address behind a `HOST:PORT` is asked with Ray, in a process of its own.
"""

import importlib.metadata
import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from packaging.specifiers import SpecifierSet

from launch.doctor_finding import GIB, Finding, Reporter
from launch.doctor_versions import FLOORS
from launch.doctor_web import ANSWER_SECONDS, Answer, Unreachable, ask_web

ASK_RAY_SECONDS = 90.0
"""Loading Ray takes 2 to 10 s, and it tries a cluster that is silent for about 20 s."""
LEAST_STORE_BYTES = 1e8
"""Three hosts tokenized and trained with as much each; Ray's own minimum is 75 MB."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
TOKEN_ADVICE = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's own: "
    "`ray get-auth-token` on its head"
)
report = Reporter("ray")


def examine_ray(address: str | None, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Look at the token, and at the cluster where one is named.

    Args:
        address: `http://HOST:8265` as `submit` takes it, or `HOST:6379` as `cluster.ray_address`.
        environment: RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH and HOME.
    """
    yield judge_token(environment)
    if address is None:
        return
    try:
        dashboard = address if "://" in address else _find_dashboard(address)
        headers = _token_header(environment)
        version = ask_web(f"{dashboard}/api/version", headers)
    except Unreachable as exc:
        if "nauthenticat" in str(exc) or "token" in str(exc).lower():
            yield report.fail("address", f"{address}: {exc}", TOKEN_ADVICE)
            return
        advice = (
            "start it (`ray start --head`), name the head's dashboard (http://HEAD:8265) or "
            "HEAD:6379, and let both ports through; the dashboard listens on loopback unless "
            "`ray start --dashboard-host` says otherwise"
        )
        yield report.fail("address", f"{address} gives no answer: {exc}", advice)
        return
    yield from _judge_cluster(version, dashboard, headers)


def judge_token(environment: Mapping[str, str]) -> Finding:
    """Judge whether clusters and clients that are started here agree about the token.

    Source: ray 2.60 _private/authentication/authentication_token_setup.py, scripts/scripts.py.
    """
    mode = environment.get("RAY_AUTH_MODE", "").strip().lower()
    file = _token_file(environment)
    place = "RAY_AUTH_TOKEN" if environment.get("RAY_AUTH_TOKEN") else str(file)
    has_token = place == "RAY_AUTH_TOKEN" or file.is_file()
    if mode == "disabled":
        return report.ok("token", "RAY_AUTH_MODE=disabled: whoever reaches a port runs code")
    if mode == "token" and has_token:
        return report.ok("token", f"RAY_AUTH_MODE=token, from {place}")
    if mode == "token":
        advice = "ray get-auth-token --generate, and give every node and client the same token"
        return report.fail("token", "RAY_AUTH_MODE=token, and there is no token", advice)
    if has_token:
        advice = (
            "half on: the next `ray start --head` demands the token, while workers and clients do "
            "not send it; set RAY_AUTH_MODE to token or disabled on every node and client"
        )
        return report.warn("token", f"RAY_AUTH_MODE is unset, and {place} exists", advice)
    return report.ok("token", "none, and RAY_AUTH_MODE is unset")


def _token_file(environment: Mapping[str, str]) -> Path:
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    return Path(named) if named else Path(environment.get("HOME", "~")) / ".ray" / "auth_token"


def _token_header(environment: Mapping[str, str]) -> dict[str, str]:
    """Give the header that Ray's client would send: one in token mode only."""
    if environment.get("RAY_AUTH_MODE", "").strip().lower() != "token":
        return {}
    file = _token_file(environment)
    token = environment.get("RAY_AUTH_TOKEN") or (file.read_text() if file.is_file() else "")
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}


def _find_dashboard(address: str) -> str:
    """Ask the cluster behind `HOST:PORT`, or behind `auto`, where its dashboard is.

    Raises:
        Unreachable: Nobody listens there, or who does is no Ray cluster.
    """
    host, _, port = address.rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
        except OSError as exc:
            raise Unreachable(str(exc)) from exc
    command = [sys.executable, "-m", "launch.ray_dashboard", address]
    try:
        shown = subprocess.run(
            command, capture_output=True, text=True, timeout=ASK_RAY_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as exc:
        raise Unreachable(f"Ray found no dashboard in {ASK_RAY_SECONDS:g} s") from exc
    if shown.returncode != 0:
        lines = shown.stderr.strip().splitlines() or ["no reason was given"]
        raise Unreachable(lines[-1])
    return shown.stdout.strip().splitlines()[-1]


def _judge_cluster(
    version: Answer, dashboard: str, headers: Mapping[str, str]
) -> Iterator[Finding]:
    """Judge what the dashboard says, once it answers."""
    if version.status in (401, 403):
        found = f"{dashboard} demands a token: " + ("ours is wrong" if headers else "none is sent")
        yield report.fail("address", f"{found} ({version.status})", TOKEN_ADVICE)
        return
    if version.status != 200 or "ray_version" not in version.text:
        found = f"{dashboard} answers {version.status}, not as Ray"
        yield report.fail("address", found, "name the head's dashboard, such as http://HEAD:8265")
        return
    host = urlsplit(dashboard).hostname
    if headers or host in LOOPBACK:
        yield report.ok("address", f"{dashboard} answers")
    else:
        advice = (
            "RAY_AUTH_MODE=token on every node and client: without, whoever reaches this port runs "
            "code there (CVE-2023-48022)"
        )
        yield report.warn("address", f"{dashboard} answers without a token", advice)
    yield _judge_version(json.loads(version.text)["ray_version"])
    try:
        listed = ask_web(f"{dashboard}/api/v0/nodes?detail=true", headers)
    except Unreachable as exc:
        listed = Answer(0, str(exc))
    if listed.status != 200:
        found = f"no list of nodes: {listed.status} {listed.text[:80]}"
        yield report.fail("nodes", found, "see dashboard.log on the head")
        return
    yield from judge_nodes(json.loads(listed.text)["data"]["result"]["result"])


def _judge_version(there: str) -> Finding:
    here = importlib.metadata.version("ray")
    floor = FLOORS["ray"]
    if not SpecifierSet(floor.versions).contains(there, prereleases=True):
        advice = f"pip install 'ray{floor.versions}' on all nodes: {floor.reason}"
        return report.fail("cluster version", f"{there}, not {floor.versions}", advice)
    if there != here:
        advice = f"install ray {there} here, or {here} on all nodes: Ray joins equal versions only"
        return report.fail("cluster version", f"{there}, here {here}", advice)
    return report.ok("cluster version", f"{there}, as here")


def judge_nodes(nodes: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Judge the nodes and their room.

    Args:
        nodes: `node_ip`, `state` and `resources_total` (bytes for memory) of each, the dead
            included, as Ray's state API gives them.
    """
    alive = [node for node in nodes if node["state"] == "ALIVE"]
    dead = [node["node_ip"] for node in nodes if node["state"] != "ALIVE"]
    cpus, gpus = (
        sum(node["resources_total"].get(kind, 0.0) for node in alive) for kind in ("CPU", "GPU")
    )
    found = f"{len(alive)} alive, {cpus:g} CPUs, {gpus:g} GPUs"
    if not nodes:
        advice = "wait some seconds: a head joins its own cluster after its dashboard is up"
        yield report.fail("nodes", found, advice)
    elif cpus == 0:
        advice = "join workers: `ray start --address HEAD:6379 --num-cpus N`"
        yield report.fail("nodes", found, advice)
    elif dead:
        advice = "start Ray there again, unless those hosts were taken away on purpose"
        yield report.warn("nodes", f"{found}; dead: {', '.join(dead)}", advice)
    else:
        yield report.ok("nodes", found, cpus=cpus, gpus=gpus)
    stores = {
        node["node_ip"]: float(node["resources_total"].get("object_store_memory", 0.0))
        for node in alive
    }
    if not stores:
        return
    smallest = min(stores, key=stores.__getitem__)
    room = f"{stores[smallest] / GIB:.2f} GiB at least, on {smallest}"
    values = {"smallest_bytes": stores[smallest]}
    if stores[smallest] < LEAST_STORE_BYTES:
        advice = "ray start --object-store-memory=500000000, with as much room in its /dev/shm"
        yield report.warn("object stores", room, advice, **values)
    else:
        yield report.ok("object stores", room, **values)
