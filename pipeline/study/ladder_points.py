"""From the finished runs of a ladder to points of a scaling law."""

from pipeline.study.planned import Rung
from pipeline.study.records import StudyRecords
from pipeline.study.scaling import ScalingPoint
from pipeline.tracking.store import RunRecord

SPENT = "spent_seconds"
"""Field of an event: seconds of all attempts by what they went into; `train` are those of steps."""


def collect_points(records: StudyRecords) -> list[ScalingPoint]:
    """Give a point for each finished branch whose trunk is there too.

    Parameters are all of them, embedding included; FLOPs and device seconds are those from step 0,
    so that of the trunk the part before the branch counts, once for each branch.
    """
    points = []
    for cell in records.plan.train_cells:
        rung, record = cell.rung, records.runs.get(cell.name)
        if rung is None or rung.is_trunk or record is None:
            continue
        loss = record.result.metrics.get("eval/loss")
        if loss is None:
            continue
        points.append(
            ScalingPoint(
                family=cell.label,
                run=cell.name,
                trunk=rung.trunk,
                num_parameters=float(record.result.num_parameters.total),
                tokens=float(record.result.tokens),
                loss=loss.value,
                flops=record.result.flops_per_token * record.result.tokens,
                device_seconds=_device_seconds(record, records.runs.get(rung.trunk), rung),
            )
        )
    return points


def _device_seconds(branch: RunRecord, trunk: RunRecord | None, rung: Rung) -> float | None:
    """Give the seconds of optimizer steps times ranks, from step 0; None where not counted."""
    start = branch.config.branch
    own = branch.result.goodput.get("train_seconds")
    if trunk is None or start is None or own is None:
        return None
    shared = seconds_until(trunk, start.step)
    if shared is None:
        return None
    return shared * trunk.result.world_size + float(own) * branch.result.world_size


def seconds_until(record: RunRecord, step: int) -> float | None:
    """Give the seconds of a run's steps up to a checkpoint, by the event that tells of it."""
    if step == record.result.steps:
        seconds = record.result.goodput.get("train_seconds")
        return None if seconds is None else float(seconds)
    told = [
        float(event.values[SPENT]["train"])
        for event in record.events
        if event.kind == "checkpoint" and event.step == step and SPENT in event.values
    ]
    return told[-1] if told else None
