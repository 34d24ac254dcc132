"""What a study did and when: one JSON line per finished step, kept when it is continued later.

A step is preparing the data, one cell, or analysis and report. A skipped cell adds no line, so the
sum over all lines is the time that the study took, however often it was interrupted.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Phase = Literal["prepare", "train", "probe", "report"]
Outcome = Literal["complete", "failed", "stopped"]

FILE_NAME = "timeline.jsonl"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One finished step of a study."""

    phase: Phase
    cell: str | None
    """Name of the cell; None for preparing and reporting."""
    started_unix_seconds: float
    seconds: float
    outcome: Outcome
    reason: str | None = None
    """Why the step failed."""


def append_step(study_dir: Path, step: Step) -> None:
    """Add a step to the timeline of a study, after cutting off a half-written last line."""
    path = study_dir / FILE_NAME
    with path.open("ab") as stream:
        stream.truncate(path.read_bytes().rfind(b"\n") + 1)
        stream.write(json.dumps(asdict(step)).encode() + b"\n")


def read_timeline(study_dir: Path) -> list[Step]:
    """Read all complete lines; one that a killed process left half-written is passed over."""
    path = study_dir / FILE_NAME
    if not path.exists():
        return []
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            steps.append(Step(**json.loads(line)))
    return steps


def list_failures(timeline: list[Step]) -> dict[str, str]:
    """Give each cell whose latest attempt failed, with the reason."""
    latest = {step.cell: step for step in timeline if step.cell is not None}
    return {
        cell: step.reason or "no reason was recorded"
        for cell, step in latest.items()
        if step.outcome == "failed"
    }
