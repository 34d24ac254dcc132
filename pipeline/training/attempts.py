"""From the events of earlier attempts to the account of their time, and to whether to try again."""

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import takewhile

from pipeline.errors import LaunchError
from pipeline.tracking.events import Event, surviving_events

ACCOUNT = "spent_seconds"
"""Field of an event: wall time of all attempts by what it went into, as `spent_seconds` gives."""
REWIND = "rewind"
"""Field of a resume event: why the attempt before went back to a checkpoint by itself."""
AGREED_ENDS = ("stop", "finish")


def spent_before(
    events: Sequence[Event], step: int, started_unix_seconds: float
) -> dict[str, float]:
    """Take over the account of earlier attempts; what they trained after `step` is lost.

    Args:
        events: All of the log.
        step: Where the new attempt begins.
        started_unix_seconds: When its process began.

    Returns:
        Seconds by part and `wall`, up to that moment; empty where no account was kept.
    """
    accounts = [event for event in events if ACCOUNT in event.values]
    if not accounts:
        return {}
    # Not the last in the log: the event of a checkpoint may tell the account of its begin.
    newest = max(accounts, key=lambda event: float(event.values[ACCOUNT]["wall"]))
    spent = dict(newest.values[ACCOUNT])
    kept = train_seconds_until(events, step)
    spent["lost"] = spent.get("lost", 0.0) + spent["train"] - kept
    spent["train"] = kept
    last = events[-1]
    away = "idle" if last.kind in AGREED_ENDS else "restart"
    # Between hosts only the wall clock is common; one that was set back must not give time back.
    gaps = {
        "detect": last.time_unix_seconds - _moment_of(newest, accounts),
        away: started_unix_seconds - last.time_unix_seconds,
    }
    for name, seconds in gaps.items():
        for part in (name, "wall"):
            spent[part] = spent.get(part, 0.0) + max(0.0, seconds)
    return spent


def _moment_of(account: Event, accounts: Sequence[Event]) -> float:
    """Give when an account was taken, in Unix seconds, by its wall time since the attempt began."""
    began = next(
        (e for e in accounts if e.attempt == account.attempt and e.kind in ("start", "resume")),
        account,
    )
    since = account.values[ACCOUNT]["wall"] - began.values[ACCOUNT]["wall"]
    return began.time_unix_seconds + float(since)


def train_seconds_until(events: Sequence[Event], step: int) -> float:
    """Give the seconds of kept steps up to `step`, by the accounts of the surviving lineage."""
    kept = [e for e in surviving_events(events) if ACCOUNT in e.values and e.step <= step]
    # By step, as the event of a checkpoint may stand behind those of later steps.
    newest = max(kept, key=lambda e: (e.step, e.values[ACCOUNT]["wall"]), default=None)
    return float(newest.values[ACCOUNT]["train"]) if newest else 0.0


def check_progress(events: Sequence[Event], step: int, max_attempts: int) -> None:
    """Refuse to start again where the attempts before have led nowhere.

    Args:
        events: All of the log.
        step: Where the run would begin.
        max_attempts: `guard.max_attempts_without_progress`.

    Raises:
        LaunchError: So many attempts in a row began at this step and ended without a later
            checkpoint or an agreed stop.
    """
    starts = _split_by_start(events)
    vain = list(takewhile(lambda a: a[0].step == step and not _has_progress(a), reversed(starts)))
    if len(vain) < max_attempts:
        return
    told = "\n".join(f"  {_describe(attempt)}" for attempt in reversed(vain))
    raise LaunchError(
        f"{len(vain)} attempts in a row began at step {step} and ended without a later checkpoint "
        f"(guard.max_attempts_without_progress={max_attempts}), so another is not made:\n{told}\n"
        "What the ranks printed last stands at the end of rank-*.log beside events.jsonl. Once the "
        f"cause is mended, go on with guard.max_attempts_without_progress={len(vain) + 1}"
    )


def _split_by_start(events: Sequence[Event]) -> list[list[Event]]:
    """Give the events of each start of a process; a rewind goes on in the same one."""
    starts: list[list[Event]] = []
    for event in events:
        if event.kind in ("start", "resume") and REWIND not in event.values:
            starts.append([])
        if starts:
            starts[-1].append(event)
    return starts


def _has_progress(attempt: Sequence[Event]) -> bool:
    first = attempt[0].step
    return any(
        e.kind in AGREED_ENDS or (e.kind == "checkpoint" and e.step > first) for e in attempt
    )


def _describe(attempt: Sequence[Event]) -> str:
    last = attempt[-1]
    when = datetime.fromtimestamp(last.time_unix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    reached = max(event.step for event in attempt)
    error = last.values.get("error", "no error, so its process was killed")
    return f"attempt {last.attempt}: reached step {reached}, last event {last.kind} {when}: {error}"
