"""From a hostfile to findings: who answers, and what is not the same on all hosts."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from launch.doctor_finding import Finding, Reporter, one_line_if_all_agree
from launch.doctor_link import CONNECT_SECONDS, Link, ask_all
from launch.doctor_versions import COMPARED_PACKAGES
from launch.hostfile import is_here, read_hostfile
from pipeline.errors import ConfigError

FIRST_ANSWER_SECONDS = 60.0
"""A Python of a cold network disk takes its time; an unreachable host is known much earlier."""
PDSH_SECONDS = 60
SHOWN_FILES = 3
PASSED_ON = ("GLOO_", "NCCL_")
"""Prefixes of the variables about networks, which ranks get from whoever starts them."""
report = Reporter("hosts")

Links = Mapping[str | None, Link]
"""Host of the hostfile, or None for this machine, to its process."""

SSH_ADVICE = {
    "Host key verification failed": (
        "log in once by hand (`ssh {host}`), compare the fingerprint, and say yes; if the key "
        "changed and that is right: ssh-keygen -R {host}"
    ),
    "Permission denied": "ssh-copy-id {host}: the key must open it without a password",
    "Could not resolve hostname": "write {host} into /etc/hosts or ~/.ssh/config, or mend its name",
    "Connection refused": "start sshd on {host}, or name its port in ~/.ssh/config",
    "timed out": "is {host} on, and does a firewall or route keep port 22 from here?",
    "No route to host": "is {host} on, and in the same network?",
    "Network is unreachable": "this machine has no route to {host}",
    "No such file or directory": (
        "{host} lacks this directory or this Python: install the same checkout and the same "
        "virtual environment under the same paths on every host"
    ),
}
"""Words of ssh or of the remote shell to what helps. `deepspeed` uses ssh the same way."""


def read_hosts(hostfile: Path | None) -> tuple[dict[str, int], list[Finding]]:
    """Give the hosts to reach with ssh and their slots; none where all ranks run here."""
    if hostfile is None:
        return {}, []
    try:
        slots = read_hostfile(hostfile)
    except ConfigError as exc:
        advice = "write one line `NAME slots=NUMBER` for each host, each name once"
        return {}, [report.fail("hostfile", str(exc), advice)]
    found = f"{len(slots)} hosts, {sum(slots.values())} slots"
    if all(is_here(host) for host in slots):
        return {}, [report.ok("hostfile", f"{found}, this machine: no ssh is needed")]
    return slots, [report.ok("hostfile", found)]


def reach(hosts: Sequence[str], stack: ExitStack) -> tuple[dict[str | None, Link], list[Finding]]:
    """Start a process on this machine and on every host that answers.

    Args:
        hosts: From `read_hosts`.
        stack: Ends the processes.

    Returns:
        The processes of those that answered, this machine under None, and the findings.
    """
    keys: list[str | None] = [None, *hosts]
    links: dict[str | None, Link] = {}
    for host in keys:
        links[host] = stack.enter_context(Link(host))
    answers, errors = ask_all(links, "clock", seconds=FIRST_ANSWER_SECONDS)
    links = {host: links[host] for host in answers}
    variables = {n: value for n, value in os.environ.items() if n.startswith(PASSED_ON)}
    ask_all(links, "set_defaults", variables=variables)
    findings = [explain_ssh(str(host), error) for host, error in errors.items()]
    if hosts and not findings:
        findings = [report.ok("ssh", f"{len(hosts)} hosts answer, their keys are known")]
    return links, findings


def explain_ssh(host: str, error: str) -> Finding:
    """Tell from the words of ssh or of the remote shell what helps."""
    for words, advice in SSH_ADVICE.items():
        if words in error:
            return report.about(host).fail("ssh", error, advice.format(host=host))
    return report.about(host).fail("ssh", error, f"make `ssh -o BatchMode=yes {host} true` work")


def pdsh(hosts: Sequence[str]) -> Iterator[Finding]:
    """Tell which hosts pdsh reaches: `deepspeed` starts ranks with it."""
    if shutil.which("pdsh") is None:
        yield report.fail("pdsh", "not installed", "apt install pdsh, on this machine")
        return
    options = f"-o BatchMode=yes -o ConnectTimeout={CONNECT_SECONDS}"
    command = ["env", "PDSH_RCMD_TYPE=ssh", f"PDSH_SSH_ARGS_APPEND={options}", "pdsh", "-S"]
    try:
        shown = subprocess.run(
            [*command, "-w", ",".join(hosts), "echo here"],
            capture_output=True, text=True, timeout=PDSH_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        yield report.fail("pdsh", f"no end in {PDSH_SECONDS} s", "mend ssh first")
        return
    lines = shown.stdout.splitlines()
    missing = [host for host in hosts if f"{host}: here" not in lines]
    if not missing:
        yield report.ok("pdsh", f"reaches {len(hosts)} hosts")
    errors = shown.stderr.strip().splitlines()
    for host in missing:
        own = [line for line in errors if line.startswith((f"{host}:", f"pdsh@{host}:"))]
        words = next(iter([*own, *errors[:1]]), "no answer").partition(f"{host}: ")
        advice = "mend ssh first; pdsh runs the same ssh"
        yield report.about(host).fail("pdsh", words[2] or words[0], advice)


def compare_hosts(facts: Mapping[str | None, Mapping[str, Any]]) -> Iterator[Finding]:
    """Compare each host with this machine: Python, code, packages.

    Args:
        facts: From `launch.doctor_agent.facts`; this machine's under None.
    """
    here = facts[None]
    others = {host: fact for host, fact in facts.items() if host is not None}
    yield from one_line_if_all_agree(
        [_compare_python(here, fact, report.about(host)) for host, fact in others.items()],
        report.ok("python", f"{here['python']} everywhere"),
    )
    yield from one_line_if_all_agree(
        [_compare_code(here, fact, report.about(host)) for host, fact in others.items()],
        report.ok("code", f"the same everywhere, {_commit(here['code'])}"),
    )
    yield from one_line_if_all_agree(
        [_compare_packages(here, fact, report.about(host)) for host, fact in others.items()],
        report.ok("packages", f"{len(COMPARED_PACKAGES)} packages, the same versions everywhere"),
    )


def examine_machines(links: Mapping[str, Link]) -> Iterator[Finding]:
    """Look at each host by itself as at this machine; only what is not ok is told."""
    answers, errors = ask_all(links, "machine")
    for host, error in errors.items():
        advice = "have the same code and packages there, then look again"
        yield report.about(host).fail("machine", error, advice)
    findings = [Finding(**{**found, "host": host}) for host in answers for found in answers[host]]
    merged = report.ok("machines", f"{len(findings)} checks on {len(answers)} hosts")
    yield from one_line_if_all_agree(findings, merged) if answers else ()


def _compare_python(here: Mapping[str, Any], there: Mapping[str, Any], host: Reporter) -> Finding:
    if here["python"] == there["python"]:
        return host.ok("python", there["python"])
    advice = f"install {here['python']} there, in the same virtual environment path"
    return host.fail("python", f"{there['python']}, here {here['python']}", advice)


def _compare_code(here: Mapping[str, Any], there: Mapping[str, Any], host: Reporter) -> Finding:
    own, other = here["code"], there["code"]
    if own is None or other is None:
        place = "this machine" if own is None else "there"
        advice = "start doctor in the checkout, and have the checkout at the same path on all hosts"
        return host.fail("code", f"no package `launch` on {place}", advice)
    files = sorted(own["files"].keys() | other["files"].keys())
    different = [name for name in files if own["files"].get(name) != other["files"].get(name)]
    if not different:
        return host.ok("code", _commit(other))
    shown = ", ".join(different[:SHOWN_FILES])
    more = f" and {len(different) - SHOWN_FILES} more" if len(different) > SHOWN_FILES else ""
    advice = f"bring {other['root']} to {_commit(own)} of this machine: git pull, or rsync"
    return host.fail("code", f"{_commit(other)} differs in {shown}{more}", advice)


def _commit(code: Mapping[str, Any] | None) -> str:
    if code is None or code["commit"] is None:
        return "no git checkout"
    return f"commit {code['commit']}{' with changes' * code['is_dirty']}"


def _compare_packages(here: Mapping[str, Any], there: Mapping[str, Any], host: Reporter) -> Finding:
    own, other = here["packages"], there["packages"]
    different = [name for name in COMPARED_PACKAGES if own.get(name) != other.get(name)]
    if not different:
        return host.ok("packages", "the same versions")
    shown = ", ".join(f"{name} {other.get(name, 'absent')}" for name in different)
    wanted = " ".join(f"{name}=={own[name]}" for name in different if name in own)
    advice = f"there: {there['executable']} -m pip install {wanted}"
    return host.fail("packages", f"differ from here: {shown}", advice)
