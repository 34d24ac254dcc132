"""The benchmark's table and its verdicts on the targets."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tests.bench.timing import Spread

PEERS = ("datasets", "datatrove", "megatron", "ray_rows")
BESIDE = ("megatron_fast",)
"""Shown, but none of those that the target names: it is built on another fast encoder."""
TARGET_OVER_PEER = 15.0
TARGET_OVER_BARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one contender took for one corpus."""

    text_bytes: int
    seconds: Spread
    """Counted seconds; start excluded."""
    start_seconds: Spread
    """Of the same on eight short documents."""
    cpu_seconds: Spread | None = None
    """Of the whole machine, start included."""
    whole_seconds: Spread | None = None
    """Ours: with the start of `prepare` left in."""
    task_seconds: Spread | None = None
    """Ours: from the first task to the last."""
    ray_seconds: Spread | None = None
    """Ours: start of Ray."""
    first_seconds: Spread | None = None
    """Ours: the first `prepare` of eight short documents, which starts Ray's workers."""
    differing_documents: int | None = None

    @property
    def rate(self) -> float:
        """Text bytes per second at the median."""
        return self.text_bytes / self.seconds.median

    def as_json(self) -> dict[str, Any]:
        """Give every field and the rate."""
        return {**asdict(self), "text_bytes_per_second": self.rate}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether one claim holds."""

    claim: str
    is_met: bool
    found: str

    @property
    def line(self) -> str:
        """Give the verdict as a line."""
        return f"{'met   ' if self.is_met else 'MISSED'} {self.claim}: {self.found}"


def judge(
    results: Mapping[str, Result], absent: Mapping[str, str], unequal: list[str] | None
) -> list[Verdict]:
    """Hold the results against the targets."""
    verdicts = []
    rates = {name: results[name].rate for name in PEERS if name in results}
    ours = {name: result for name, result in results.items() if name.startswith("tandem/")}
    for name, result in ours.items():
        if rates:
            fastest = max(rates, key=lambda peer: rates[peer])
            ratio = result.rate / rates[fastest]
            verdicts.append(
                Verdict(
                    claim=f"{name} at least {TARGET_OVER_PEER:g} times the fastest peer",
                    is_met=ratio >= TARGET_OVER_PEER,
                    found=f"{ratio:.1f} times {fastest}",
                )
            )
        bare = results[name.replace("tandem", "bare")]
        ratio = result.rate / bare.rate
        found = f"{ratio:.2f} times"
        if result.whole_seconds is not None:
            whole = result.text_bytes / result.whole_seconds.median / bare.rate
            found += f", {whole:.2f} times with the start of prepare left in"
        verdicts.append(
            Verdict(
                claim=f"{name} at least {TARGET_OVER_BARE:g} times bare",
                is_met=ratio >= TARGET_OVER_BARE,
                found=found,
            )
        )
    differing = {
        name: result.differing_documents
        for name, result in results.items()
        if result.differing_documents
    }
    verdicts.append(
        Verdict(
            claim="ids equal those of tokenizers on every document",
            is_met=not differing,
            found=str(differing) if differing else "no document differs",
        )
    )
    if unequal is not None:
        verdicts.append(
            Verdict(
                claim="shards equal Megatron's byte for byte",
                is_met=not unequal,
                found=", ".join(unequal) or "all",
            )
        )
    if absent:
        verdicts.append(
            Verdict(claim="every peer ran", is_met=False, found=f"absent: {', '.join(absent)}")
        )
    return verdicts


def print_table(
    results: Mapping[str, Result], absent: Mapping[str, str], unequal: list[str] | None
) -> None:
    """Print a line for each contender: rate, spread, start, and how ours compares with it."""
    print(
        f"\n{'contender':<14}{'text MB':>9}{'seconds: median (min-max)':>28}{'MB/s':>8}"
        f"{'start s':>9}{'cpu s':>8}{'ours/it':>9}{'ids differ':>12}"
    )
    for name, result in sorted(results.items(), key=lambda item: item[1].rate):
        seconds = result.seconds
        spread = f"{seconds.median:.2f} ({seconds.min:.2f}-{seconds.max:.2f})"
        cpu = f"{result.cpu_seconds.median:.1f}" if result.cpu_seconds else "-"
        ours = results["tandem/zst" if name.endswith("/zst") else "tandem/plain"]
        differing = result.differing_documents
        print(
            f"{name:<14}{result.text_bytes / 1e6:>9.1f}{spread:>28}{result.rate / 1e6:>8.1f}"
            f"{result.start_seconds.median:>9.2f}{cpu:>8}{ours.rate / result.rate:>9.2f}"
            f"{'-' if differing is None else differing:>12}"
        )
    for name, result in results.items():
        if result.whole_seconds and result.task_seconds:
            print(
                f"{name}: {result.whole_seconds.median:.2f} s with the start of prepare, "
                f"{result.task_seconds.median:.2f} s of them from the first task to the last"
            )
        if name == "tandem/plain" and result.ray_seconds and result.first_seconds:
            print(
                f"Ray starts in {result.ray_seconds.median:.2f} s; the first prepare, of eight "
                f"documents, takes {result.first_seconds.median:.2f} s"
            )
    for name, reason in absent.items():
        print(f"{name}: absent, {reason}")
    if unequal is not None:
        print(f"shards unlike Megatron's: {', '.join(unequal) or 'none'}")
    print()
