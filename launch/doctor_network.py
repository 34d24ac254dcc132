"""From what hosts tell about their networks to findings: names, interfaces, slow look-ups."""

from collections.abc import Iterator, Mapping
from typing import Any

from launch.doctor_finding import Finding, Reporter, one_line_if_all_agree

MOST_REVERSE_SECONDS = 1.0
"""Every rank looks its peers up at its start; a DNS server that is silent costs 10 s a peer."""
VIRTUAL = ("docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "tun", "ifb")
"""Prefixes of interfaces that reach no other host."""

Answers = Mapping[str | None, Mapping[str, Any]]
"""Host of the hostfile, or None for this machine, to its answer about its network."""


def judge_networks(answers: Answers) -> Iterator[Finding]:
    """Judge the networks of all hosts, or of this machine alone."""
    several = len(answers) > 1
    for host, answer in answers.items():
        # This machine holds no rank unless the hostfile names it.
        is_reached = several and host is not None
        yield interfaces(answer, Reporter("network", host), needs_outside=is_reached)
    yield from one_line_if_all_agree(
        [name_of_own(answer, Reporter("network", host)) for host, answer in answers.items()],
        Reporter("network").ok("own name", _own_names(answers)),
    )
    if several:
        yield from one_line_if_all_agree(
            [finding for host, answer in answers.items() for finding in names(answer, host)],
            Reporter("network").ok("names", "every host resolves every name"),
        )
    slowest = max((max_reverse_seconds(answer) for answer in answers.values()), default=0.0)
    yield from one_line_if_all_agree(
        [reverse(answer, Reporter("network", host)) for host, answer in answers.items()],
        Reporter("network").ok(
            "reverse names", f"looked up in {slowest:.2f} s", slowest_seconds=slowest
        ),
    )


def interfaces(answer: Mapping[str, Any], report: Reporter, *, needs_outside: bool) -> Finding:
    """Tell which interface gloo and NCCL take on a host, and which one they should.

    Args:
        answer: From `launch.doctor_agent.network`.
        report: Of the host.
        needs_outside: Whether ranks of other hosts must reach this one.
    """
    listed = {
        name: [address for address in addresses if not address.startswith("fe80")]
        for name, addresses in answer["interfaces"].items()
    }
    gloo, nccl = gloo_interface(answer), nccl_interface(answer)
    shown = ", ".join(f"{name} {' '.join(found[:2])}" for name, found in listed.items() if found)
    taken = f"gloo {gloo}" if gloo == nccl else f"gloo {gloo}, nccl {nccl}"
    found = f"{taken}; {shown}"
    outside = [name for name in listed if listed[name] and _is_outside(name)]
    if not set(gloo.split(",")) <= listed.keys():
        advice = f"set GLOO_SOCKET_IFNAME to one of {', '.join(listed)}"
        return report.fail("interfaces", f"{gloo} does not exist; there are {shown}", advice)
    if needs_outside and outside and not _is_outside(gloo):
        advice = (
            f"no other host reaches {gloo}: set GLOO_SOCKET_IFNAME={outside[0]} for the ranks, or "
            f"map {answer['hostname']} to {listed[outside[0]][0]} in /etc/hosts"
        )
        return report.warn("interfaces", found, advice)
    return report.ok("interfaces", found)


def gloo_interface(answer: Mapping[str, Any]) -> str:
    """Give the interface that gloo takes: the one named, else that of the host's own name.

    Source: createDefaultDevice in torch/csrc/distributed/c10d/ProcessGroupGloo.cpp.
    """
    named = answer["chosen"].get("GLOO_SOCKET_IFNAME")
    if named is not None:
        return str(named)
    for address in answer["bindable"][:1]:
        for name, addresses in answer["interfaces"].items():
            if address in addresses:
                return str(name)
    return "lo"


def nccl_interface(answer: Mapping[str, Any]) -> str:
    """Give the interface that NCCL takes first for its sockets.

    Source: "NCCL_SOCKET_IFNAME" in the NCCL user guide, environment variables.
    """
    named = answer["chosen"].get("NCCL_SOCKET_IFNAME")
    if named is not None:
        return str(named)
    usable = [name for name, addresses in answer["interfaces"].items() if addresses]

    def is_later(name: str) -> tuple[bool, bool, bool]:
        return name == "lo", name.startswith("docker"), not name.startswith("ib")

    return min(usable, key=is_later, default="lo")


def name_of_own(answer: Mapping[str, Any], report: Reporter) -> Finding:
    """Tell whether a host's own name resolves to an address of it."""
    name, addresses = answer["hostname"], answer["resolved"][answer["hostname"]]
    advice = f"add a line `ADDRESS {name}` to /etc/hosts: gloo listens where the name points"
    if not addresses:
        return report.warn("own name", f"{name} does not resolve", advice)
    if not answer["bindable"]:
        found = f"{name} resolves to {addresses[0]}, which is not this host's"
        return report.warn("own name", found, advice)
    return report.ok("own name", f"{name} is {addresses[0]}")


def names(answer: Mapping[str, Any], host: str | None) -> Iterator[Finding]:
    """Tell which names of the hostfile a host does not know; this machine knows them by ssh."""
    missing = [name for name, found in answer["resolved"].items() if not found]
    missing = [name for name in missing if name != answer["hostname"]]
    if missing and host is not None:
        advice = "add all hosts of the hostfile to /etc/hosts or to the DNS"
        found = f"cannot resolve {', '.join(missing)}"
        yield Reporter("network", host).fail("names", found, advice)


def reverse(answer: Mapping[str, Any], report: Reporter) -> Finding:
    """Tell how long a host takes to turn addresses into names."""
    slowest = max_reverse_seconds(answer)
    if slowest <= MOST_REVERSE_SECONDS:
        return report.ok("reverse names", f"looked up in {slowest:.2f} s", slowest_seconds=slowest)
    address = max(answer["reverse_seconds"], key=answer["reverse_seconds"].__getitem__)
    advice = (
        "the DNS server of /etc/resolv.conf is silent, and each rank waits as long per peer: make "
        "it answer reverse queries, or list all hosts in /etc/hosts AND say `hosts: files` in "
        "/etc/nsswitch.conf (the list alone does not help)"
    )
    found = f"{address} takes {slowest:.1f} s"
    return report.warn("reverse names", found, advice, slowest_seconds=slowest)


def max_reverse_seconds(answer: Mapping[str, Any]) -> float:
    """Give the time of a host's slowest reverse look-up, 0 where nothing was looked up."""
    return float(max(answer["reverse_seconds"].values(), default=0.0))


def _is_outside(name: str) -> bool:
    return name != "lo" and not name.startswith(VIRTUAL)


def _own_names(answers: Answers) -> str:
    shown = [f"{a['hostname']} is {a['resolved'][a['hostname']][:1]}" for a in answers.values()]
    return ", ".join(line.replace("['", "").replace("']", "") for line in dict.fromkeys(shown))
