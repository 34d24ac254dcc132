"""From pairs of hosts to findings: what ranks compute on, and how fast they sum over two hosts."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from launch.doctor_finding import Finding, Reporter
from launch.doctor_link import HostError, Link, ask_all

IMPORT_SECONDS = 120.0
"""Loading torch takes 3 to 13 s, and more from a cold network disk."""
PAIR_SECONDS = 90.0
SIZES = (4096, 1 << 20, 1 << 24)
"""Bytes: what a flag or a norm costs (latency), one layer's gradients, one bucket."""
LEAST_BYTES_PER_SECOND = 50e6
"""Half of gigabit Ethernet: below it the gradients of 10 million parameters take a second."""
SLOW_FRACTION = 0.5
"""Of the median pair: one slow link slows every step of all ranks."""
MOST_LATENCY_SECONDS = 0.005

Rank = tuple[str, Link]
"""A name to show, and the process that plays the rank."""


def judge_devices(
    answers: Mapping[str | None, Mapping[str, Any]], slots: Mapping[str, int]
) -> Iterator[Finding]:
    """Judge GPUs, driver, CUDA, NCCL and gloo of every host.

    Args:
        answers: From `launch.doctor_agent.devices`; this machine's under None.
        slots: Host of the hostfile to its ranks.
    """
    for host, answer in answers.items():
        report = Reporter("device", host)
        yield judge_device(answer, report)
        num_gpus, num_slots = len(answer["usable"]), slots.get(host or "", 0)
        if 0 < num_gpus < num_slots:
            advice = f"write `{host} slots={num_gpus}`: each rank takes a GPU of its own"
            yield report.fail("slots", f"{num_slots} slots, {num_gpus} GPUs", advice)
    kinds = {host: sorted(answer["usable"]) for host, answer in answers.items()}
    if len({str(kind) for kind in kinds.values()}) > 1:
        shown = ", ".join(f"{host} has {len(kind)}" for host, kind in kinds.items())
        advice = "ZeRO shares work equally: the slowest GPU sets the pace, and slots must fit"
        yield Reporter("device").warn("same devices", f"GPUs differ: {shown}", advice)


def judge_device(answer: Mapping[str, Any], report: Reporter) -> Finding:
    """Judge one host's devices."""
    listed, usable = answer["listed"], answer["usable"]
    shown = f"torch {answer['torch']}"
    if listed and not usable and not answer["is_hidden"]:
        found = f"{len(listed)} GPUs ({listed[0]}), unusable by {shown}"
        advice = "install the torch wheel that fits the driver, or set CUDA_VISIBLE_DEVICES=-1"
        return report.fail("device", found, advice)
    if usable and answer["nccl"] is None:
        found = f"{len(usable)} x {usable[0]}, {shown} without NCCL"
        return report.fail("device", found, "install a torch wheel that brings NCCL")
    if usable:
        nccl = ".".join(str(part) for part in answer["nccl"])
        driver = listed[0].rpartition(", ")[2] if listed else "unknown"
        found = f"{len(usable)} x {usable[0]}, driver {driver}, CUDA {answer['cuda']}, NCCL {nccl}"
        return report.ok("device", found)
    if not answer["has_gloo"]:
        return report.fail("device", f"CPU, {shown} without gloo", "install torch's own wheel")
    hidden = f"CPU; CUDA_VISIBLE_DEVICES hides {len(listed)} GPUs" if listed else "CPU, no GPU"
    return report.ok("device", f"{hidden}; {shown} with gloo")


def choose_backend(devices: Sequence[Mapping[str, Any]], *, on_one_host: bool) -> str:
    """Give nccl where each of the two ranks has a GPU of its own, else gloo."""
    needed = 2 if on_one_host else 1
    return "nccl" if all(len(answer["usable"]) >= needed for answer in devices) else "gloo"


def plan_rounds(num_ranks: int) -> list[list[tuple[int, int]]]:
    """Arrange all pairs in rounds in which no rank stands twice, so that pairs do not disturb.

    Source: the circle method of round-robin tournaments.
    """
    seats: list[int | None] = [*range(num_ranks), *([None] if num_ranks % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        facing = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(a, b) for a, b in facing if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def measure_pairs(ranks: Sequence[Rank], *, on_one_host: bool) -> Iterator[Finding]:
    """Sum over each pair of ranks, and judge latency and bandwidth.

    Args:
        ranks: At least two.
        on_one_host: Whether they stand on one host, and meet on loopback.
    """
    report = Reporter("bandwidth")
    answers, errors = ask_all(dict(enumerate(link for _, link in ranks)), "devices",
                              seconds=IMPORT_SECONDS)  # fmt: skip
    for number, error in errors.items():
        advice = "mend the installation there: `python -c 'import torch'` must work"
        yield report.fail("torch", f"{ranks[number][0]}: {error}", advice)
    able = [rank for number, rank in enumerate(ranks) if number in answers]
    backend = choose_backend(list(answers.values()), on_one_host=on_one_host)
    measured: dict[str, list[Any]] = {}
    for pairs in plan_rounds(len(able)):
        with ThreadPoolExecutor(max_workers=max(1, len(pairs))) as pool:
            jobs = {
                pool.submit(_measure, able[a], able[b], backend, on_one_host): (able[a], able[b])
                for a, b in pairs
            }
        for job, (first, second) in jobs.items():
            name = f"{first[0]} - {second[0]}"
            try:
                measured[name] = job.result()
            except HostError as exc:
                pair = report.about(name)
                advice = _connect_advice(first[0], backend)
                yield pair.fail("all-reduce", f"{backend}: {exc}", advice)
    yield from judge_pairs(measured, backend)


def _measure(first: Rank, second: Rank, backend: str, on_one_host: bool) -> list[Any]:
    """Give rank 0's sizes, seconds and repeats.

    Raises:
        HostError: The two do not meet, or one is lost.
    """
    ranks = {0: first[1], 1: second[1]}
    port = first[1].ask("free_port")
    settings = {
        "port": port,
        "backend": backend,
        "sizes": SIZES,
        "address": "127.0.0.1" if on_one_host else first[0].rpartition("@")[2],
    }

    def ask(rank: int) -> Any:
        return ranks[rank].ask("all_reduce", seconds=PAIR_SECONDS, rank=rank, **settings)

    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [pool.submit(ask, rank) for rank in ranks]
    # The one that fails first tells more than the one that waited for it.
    errors = [str(job.exception()) for job in jobs if job.exception() is not None]
    if errors:
        raise HostError(min(errors, key=len))
    measured: list[Any] = jobs[0].result()
    return measured


def judge_pairs(measured: Mapping[str, list[Any]], backend: str) -> Iterator[Finding]:
    """Judge each pair by itself and beside the others.

    Args:
        measured: Pair to its sizes in bytes, seconds and repeats.
        backend: gloo or nccl.
    """
    speeds = {name: max(size / seconds for size, seconds, _ in rows)
              for name, rows in measured.items()}  # fmt: skip
    for name, rows in measured.items():
        report = Reporter("bandwidth", name)
        latency, speed, median = rows[0][1], speeds[name], statistics.median(speeds.values())
        found = f"{backend} {speed / 1e9:.2f} GB/s, {latency * 1e3:.2f} ms for {rows[0][0]} bytes"
        values = {"bytes_per_second": speed, "latency_seconds": latency}
        if speed < SLOW_FRACTION * median:
            advice = f"the median pair has {median / 1e9:.2f} GB/s: look at the cable, port or "
            advice += "interface of the host that stands in several slow pairs"
            yield report.warn("all-reduce", found, advice, **values)
        elif speed < LEAST_BYTES_PER_SECOND or latency > MOST_LATENCY_SECONDS:
            advice = "training will wait for this network: take a faster interface with "
            advice += "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, or fewer hosts"
            yield report.warn("all-reduce", found, advice, **values)
        else:
            yield report.ok("all-reduce", found, **values)


def _connect_advice(first: str, backend: str) -> str:
    return (
        f"let all TCP ports through between the hosts, have the name {first} mean the same address "
        f"on both, and set {backend.upper()}_SOCKET_IFNAME to the interface between them"
    )
