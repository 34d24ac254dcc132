"""From one thing that was looked at to a verdict, what was found, and how to mend it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]
Subject = Literal["machine", "versions", "device", "network", "hosts", "bandwidth", "ray", "mlflow"]
SCHEMA_VERSION = 1
"""Of `doctor --json`; raised when a key is removed or changes its meaning."""
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at."""

    subject: Subject
    name: str
    verdict: Verdict
    found: str
    advice: str | None = None
    """How to mend it; what is ok has none."""
    host: str | None = None
    """The host of the hostfile that it is about, or `HOST - HOST` where it is about two; None for
    this machine, or for all hosts."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Measured numbers, each named with its unit."""


@dataclass(frozen=True)
class Reporter:
    """Makes the findings about one subject, and about one host where one is named."""

    subject: Subject
    host: str | None = None

    def ok(self, name: str, found: str, **values: float) -> Finding:
        """Say that a thing will do."""
        return self._finding(name, "ok", found, None, values)

    def warn(self, name: str, found: str, advice: str, **values: float) -> Finding:
        """Say that a thing may go wrong or be slow."""
        return self._finding(name, "warn", found, advice, values)

    def fail(self, name: str, found: str, advice: str, **values: float) -> Finding:
        """Say that a run would fail."""
        return self._finding(name, "fail", found, advice, values)

    def about(self, host: str | None) -> "Reporter":
        """Give a reporter of the same subject for one host."""
        return Reporter(self.subject, host)

    def _finding(
        self,
        name: str,
        verdict: Verdict,
        found: str,
        advice: str | None,
        values: Mapping[str, float],
    ) -> Finding:
        return Finding(
            subject=self.subject,
            name=name,
            verdict=verdict,
            found=found,
            advice=advice,
            host=self.host,
            values=dict(values),
        )


def one_line_if_all_agree(findings: Iterable[Finding], merged: Finding) -> Iterator[Finding]:
    """Give one finding for all hosts where nothing is wrong, else only what is wrong.

    Args:
        findings: The same check on every host.
        merged: What to say where every host is ok.
    """
    wrong = [finding for finding in findings if finding.verdict != "ok"]
    yield from wrong or [merged]
