"""From a tracking URI to findings: whether runs can be sent there, known within seconds."""

import base64
import importlib.metadata
import json
import os
import socket
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from urllib.parse import unquote, urlsplit, urlunsplit

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from launch.doctor_finding import Finding, Reporter
from launch.doctor_versions import FLOORS
from launch.doctor_web import ANSWER_SECONDS, Answer, Unreachable, ask_web
from pipeline.tracking.redaction import redact

SEARCH = "/api/2.0/mlflow/experiments/search"
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
report = Reporter("mlflow")


def examine_mlflow(uri: str, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Look at a tracking store as `sync` would use it, without loading MLflow.

    Args:
        uri: As `sync --uri` takes it.
        environment: May hold MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN.
    """
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme in ("http", "https"):
        yield from _examine_server(uri, environment)
    elif scheme == "sqlite":
        yield _examine_sqlite(uri)
    elif scheme in DATABASE_PORTS:
        yield _examine_database(uri, DATABASE_PORTS[scheme])
    else:
        advice = "use sqlite:///PATH or the http address of a server; MLflow 3.7 gave files up"
        yield report.fail("store", f"{redact(uri)} is no store of this MLflow", advice)


def _examine_server(uri: str, environment: Mapping[str, str]) -> Iterator[Finding]:
    shown = redact(uri)
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    base = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
    headers = _credentials(parts.username, parts.password, environment)
    try:
        version = ask_web(f"{base}/version", headers)
        found = ask_web(base + SEARCH, headers, json.dumps({"max_results": 1}).encode())
    except Unreachable as exc:
        advice = (
            "start the server, or mend address and firewall: runs go on without it and "
            "`python -m launch sync` sends them later; a plain client blocks 247 s a call"
        )
        yield report.fail("server", f"{shown} gives no answer: {redact(str(exc))}", advice)
        return
    if version.status == 200:
        yield _judge_version(version.text.strip())
    yield _judge_answer(found, shown, host)


def _judge_version(server: str) -> Finding:
    """Judge a server's version beside the one installed here."""
    floor = FLOORS["mlflow"]
    try:
        parsed = Version(server)
    except InvalidVersion:
        return report.warn("server version", server[:40], "is this an MLflow server?")
    if not SpecifierSet(floor.versions).contains(parsed, prereleases=True):
        advice = f"pip install 'mlflow{floor.versions}' on the server: {floor.reason}"
        return report.fail("server version", f"{server}, not {floor.versions}", advice)
    try:
        here = Version(importlib.metadata.version("mlflow"))
    except importlib.metadata.PackageNotFoundError:
        return report.ok("server version", server)
    if parsed.release[:2] < here.release[:2]:
        advice = "upgrade the server: it may lack calls that the newer client makes"
        return report.warn("server version", f"{server}, the client here is {here}", advice)
    return report.ok("server version", f"{server}, the client here is {here}")


def _judge_answer(answer: Answer, shown: str, host: str) -> Finding:
    """Judge the answer to a question that reads the store."""
    if answer.status == 200:
        return report.ok("server", f"{shown} answers and reads its store")
    if answer.status == 403 and "Host" in answer.text:
        advice = (
            f"start the server with --allowed-hosts '{host},localhost:*' "
            "(or MLFLOW_SERVER_ALLOWED_HOSTS): it serves only names that it was told"
        )
        return report.fail("server", f"{shown} refuses the name {host} (403)", advice)
    if answer.status in (401, 403):
        advice = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ..._TOKEN"
        return report.fail("server", f"{shown} refuses who asks ({answer.status})", advice)
    first = redact(answer.text.strip().partition("\n")[0][:80])
    advice = "is it an MLflow server, and does its --backend-store-uri work? See the server's log"
    return report.fail("server", f"{shown} answers {answer.status}: {first}", advice)


def _credentials(
    user: str | None, password: str | None, environment: Mapping[str, str]
) -> dict[str, str]:
    """Give the header that MLflow's client would send."""
    user = user or environment.get("MLFLOW_TRACKING_USERNAME")
    password = password or environment.get("MLFLOW_TRACKING_PASSWORD")
    if user and password:
        pair = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
        return {"Authorization": f"Basic {pair}"}
    token = environment.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _examine_sqlite(uri: str) -> Finding:
    from pipeline.tracking.mlflow_client import sqlite_path

    path = sqlite_path(uri)
    if path is None:
        return report.fail("store", uri, "write sqlite:/// and an absolute path: four slashes")
    if not path.exists():
        above = next(place for place in path.parents if place.exists())
        if os.access(above, os.W_OK):
            return report.ok("store", f"{path} will be made at the first sync")
        return report.fail("store", f"{above} cannot be written", "choose another directory")
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            database.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error as exc:
        advice = f"it holds no MLflow store: move {path} away, or name another file"
        return report.fail("store", f"{path}: {exc}", advice)
    if not os.access(path, os.W_OK):
        return report.fail("store", f"{path} cannot be written", f"chmod u+w {path}")
    return report.ok("store", f"{path} opens")


def _examine_database(uri: str, port: int) -> Finding:
    parts = urlsplit(uri)
    place = (parts.hostname or "localhost", parts.port or port)
    try:
        socket.create_connection(place, timeout=ANSWER_SECONDS).close()
    except OSError as exc:
        advice = "start the database, or mend address and firewall"
        return report.fail("store", f"{redact(uri)} gives no answer: {exc}", advice)
    return report.ok("store", f"{redact(uri)} takes connections; its login was not tried")
