"""From findings to lines for a person, one a finding with the advice below, and to JSON."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from launch.doctor_finding import SCHEMA_VERSION, Finding

MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
NAME_WIDTH = 16
INDENT = " " * (2 + 4 + 2 + NAME_WIDTH + 1)


def lines_of(finding: Finding, width: int, previous_subject: str | None) -> Iterator[str]:
    """Give the lines of one finding.

    Args:
        finding: What to show.
        width: Of the terminal, in characters.
        previous_subject: Of the finding above; another one begins a new part.
    """
    if finding.subject != previous_subject:
        yield finding.subject
    where = f"{finding.host}: " if finding.host else ""
    head = f"  {MARKS[finding.verdict]}  {finding.name:{NAME_WIDTH}} "
    yield from _wrapped(where + finding.found, head, INDENT, width)
    if finding.advice is not None:
        yield from _wrapped(finding.advice, f"{INDENT}-> ", f"{INDENT}   ", width)


def summary(findings: Sequence[Finding]) -> str:
    """Count the verdicts in one line."""
    counts = _counts(findings)
    return (
        f"{len(findings)} checks: {counts['ok']} ok, {counts['warn']} to look at, "
        f"{counts['fail']} that would make a run fail"
    )


def answer(findings: Sequence[Finding]) -> dict[str, Any]:
    """Give the findings for a program; every finding has the same keys."""
    return {
        "schema_version": SCHEMA_VERSION,
        "num_findings": _counts(findings),
        "findings": [asdict(finding) for finding in findings],
    }


def _counts(findings: Sequence[Finding]) -> dict[str, int]:
    counted = Counter[str](finding.verdict for finding in findings)
    return {verdict: counted[verdict] for verdict in MARKS}


def _wrapped(text: str, head: str, indent: str, width: int) -> Iterator[str]:
    # Words are kept whole: a path or a command that is cut cannot be copied.
    yield from textwrap.wrap(
        text,
        max(width, len(indent) + 20),
        initial_indent=head,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [head]
