"""From hosts and a directory to findings: clocks that differ, storage that is not shared."""

import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.doctor_finding import GIB, Finding, Reporter, one_line_if_all_agree
from launch.doctor_link import MOST_THREADS, HostError, Link, ask_all

MOST_CLOCK_SECONDS = 1.0
"""Events are ordered by wall clock between attempts, and a lock's age is read across hosts."""
NUM_CLOCK_SAMPLES = 7
LEAST_SHARED_GIB = 20.0
"""Two checkpoints of a model of 800 million parameters with its AdamW state."""
report = Reporter("hosts")


@dataclass(frozen=True, kw_only=True)
class ClockSample:
    """One question about the time: when it was sent and answered here, what was said there."""

    sent_seconds: float
    there_seconds: float
    received_seconds: float


@dataclass(frozen=True, kw_only=True)
class ClockOffset:
    """How far a host's clock is ahead of this machine's, and how wrong that may be."""

    seconds: float
    uncertainty_seconds: float


def clock_offset(samples: Sequence[ClockSample]) -> ClockOffset:
    """Give the offset by the sample of the shortest round trip.

    The host's clock was read somewhere between sending and receiving; the middle is wrong by half
    the round trip at most.

    Source: RFC 5905 section 8 (offset of two time stamps each way), section 10 (the sample of the
        least delay is the best one).
    """
    best = min(samples, key=lambda sample: sample.received_seconds - sample.sent_seconds)
    return ClockOffset(
        seconds=best.there_seconds - (best.sent_seconds + best.received_seconds) / 2,
        uncertainty_seconds=(best.received_seconds - best.sent_seconds) / 2,
    )


def examine_clocks(links: Mapping[str, Link]) -> Iterator[Finding]:
    """Compare the clock of every host with this machine's."""
    with ThreadPoolExecutor(max_workers=MOST_THREADS) as pool:
        findings = list(pool.map(_examine_clock, links, links.values()))
    largest = max(abs(finding.values.get("offset_seconds", 0.0)) for finding in findings)
    merged = report.ok(
        "clock", f"at most {largest * 1e3:.1f} ms from this machine's", offset_seconds=largest
    )
    yield from one_line_if_all_agree(findings, merged)


def _examine_clock(host: str, link: Link) -> Finding:
    try:
        samples = [_sample(link) for _ in range(NUM_CLOCK_SAMPLES)]
    except HostError as exc:
        return report.about(host).fail("clock", str(exc), "the host was lost: is it still on?")
    return judge_clock(clock_offset(samples), report.about(host))


def _sample(link: Link) -> ClockSample:
    sent = time.time()
    there = float(link.ask("clock"))
    return ClockSample(sent_seconds=sent, there_seconds=there, received_seconds=time.time())


def judge_clock(offset: ClockOffset, host: Reporter) -> Finding:
    """Judge how far a host's clock is off, beyond what the round trip explains."""
    direction = "ahead of" if offset.seconds > 0 else "behind"
    found = (
        f"{abs(offset.seconds):.3f} s {direction} this machine's, "
        f"within {offset.uncertainty_seconds:.3f} s"
    )
    values = {
        "offset_seconds": offset.seconds,
        "uncertainty_seconds": offset.uncertainty_seconds,
    }
    if abs(offset.seconds) - offset.uncertainty_seconds > MOST_CLOCK_SECONDS:
        advice = "start chrony or systemd-timesyncd on all hosts: `timedatectl set-ntp true`"
        return host.warn("clock", found, advice, **values)
    return host.ok("clock", found, **values)


def examine_storage(directory: Path, links: Mapping[str, Link]) -> Iterator[Finding]:
    """Write a file here, have every host read and answer it, and read the answers.

    Args:
        directory: Where runs are to stand.
        links: Host to its process; without any only this machine is asked.
    """
    directory = directory.absolute()
    if not directory.is_dir():
        advice = f"mkdir -p {directory}, on a file system that every host mounts at this path"
        yield report.fail("storage", f"{directory} is no directory", advice)
        return
    name = f".tandem-doctor-{secrets.token_hex(8)}"
    text = secrets.token_hex(16)
    try:
        (directory / name).write_text(text)
        answers, errors = ask_all(links, "storage", directory=str(directory), name=name)
        findings = [
            judge_storage(directory, answers[host], text, report.about(host)) for host in answers
        ]
    except OSError as exc:
        found = f"{directory} cannot be written: {exc.strerror}"
        yield report.fail("storage", found, f"give this user write access to {directory}")
        return
    finally:
        for place in directory.glob(f"{name}*"):
            place.unlink(missing_ok=True)
    findings += [_refused(directory, error, report.about(host)) for host, error in errors.items()]
    merged = report.ok("storage", f"{directory} is read and written by {len(links)} hosts")
    yield from one_line_if_all_agree(findings, merged if links else _writable(directory))
    yield _free_space(directory)


def judge_storage(directory: Path, answer: Mapping[str, Any], text: str, host: Reporter) -> Finding:
    """Judge what a host said about the file, and whether its own file is seen here.

    Args:
        directory: Where both stand.
        answer: From `launch.doctor_agent.storage`.
        text: What was written here.
        host: Reports about the host.
    """
    mount = f"mount the same file system at {directory} on every host, or pass --shared elsewhere"
    if not answer:
        return host.fail("storage", f"{directory} is absent there", mount)
    if answer.get("text") != text:
        found = f"{directory} there is another directory: a file written here is not seen"
        return host.fail("storage", found, mount)
    answered = directory / answer["answer_name"]
    if not answered.is_file() or answered.read_text() != text:
        found = f"a file that the host wrote into {directory} is not seen here"
        return host.fail("storage", found, mount)
    return host.ok("storage", f"{directory} is read and written")


def _refused(directory: Path, error: str, host: Reporter) -> Finding:
    advice = f"the user of this run needs write access to {directory} on every host"
    return host.fail("storage", error, advice)


def _writable(directory: Path) -> Finding:
    return report.ok("storage", f"{directory} is written by this machine, the only one")


def _free_space(directory: Path) -> Finding:
    free_bytes = shutil.disk_usage(directory).free
    found = f"{free_bytes / GIB:.1f} GiB free in {directory}"
    if free_bytes < LEAST_SHARED_GIB * GIB:
        advice = f"make room: checkpoints want {LEAST_SHARED_GIB:g} GiB and more"
        return report.warn("storage space", found, advice, free_bytes=free_bytes)
    return report.ok("storage space", found, free_bytes=free_bytes)
